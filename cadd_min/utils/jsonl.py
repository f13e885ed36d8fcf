"""Files of JSON objects, one a line, read with the numbers of their lines, so that a wrong one can be named."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cadd_min.utils.errors import InputError, shown


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl file, gzipped or not, with their line numbers. Raises InputError, with the line's."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("it is no object")
                    yield number, row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is damaged after line {number}: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number}: expected a JSON object ({shown(error)})") from None
