"""A file with a line of JSON for each finished piece of work. Work that is cut off goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from cadd_min.codebench.problems import load
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import write_json

Key = tuple[str, int]  # of a sample: the task's id, and the sample's number among the task's samples
SETTINGS = "settings.json"


class Journal:
    """The rows of a file by their key. `add` appends a row.

    Opening the file drops a half-written last line. Raises InputError where an earlier line is damaged.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)
        wanted: dict[str, type] = {"task_id": str, "sample": int}
        self.rows = {(row["task_id"], row["sample"]): row for row in load(path, dict, wanted, empty=True)}

    def add(self, key: Key, **values: Any) -> None:
        """Append a row, and wait until it is on the disk."""
        row = {"task_id": key[0], "sample": key[1], **values}
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows[key] = row

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Return the keys that have no row yet, in their order."""
        return [key for key in keys if key not in self.rows]

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def settle(folder: Path, name: str, values: dict[str, Any]) -> None:
    """Record the settings `values` under which the folder's file `name` is made.

    Raises InputError where the file was begun with other settings.
    """
    path = folder / SETTINGS
    try:
        recorded = json.loads(path.read_text()) if path.exists() else {}
        before = recorded.get(name, values)
        differing = [key for key in values if before.get(key) != values[key]]
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is damaged: give another --out") from None
    if differing:
        was, now = before.get(differing[0]), values[differing[0]]
        raise InputError(
            f"{folder / name} was made with {differing[0]} {was}, not {now}: give another --out, or delete it"
        )
    write_json(path, {**recorded, name: values}, indent=1)
