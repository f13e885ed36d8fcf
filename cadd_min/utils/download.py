"""Files from the network: whole and checked, or not there."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from cadd_min.utils.errors import InputError


def download(url: str, path: Path, dataset: str, md5: str | None = None, option: str = "--dataset") -> Path:
    """`path`, downloaded if it is not there; it exists only once it is whole and has the checksum `md5`, if given.

    Raises InputError where that fails; `option` is how the file's path can be given instead.
    """
    if path.exists():
        return checked(path, md5)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, part.open("wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
            size = response.headers.get("Content-Length")
            if size is not None and int(size) != file.tell():  # urllib says nothing of it
                raise OSError(f"it broke off after {file.tell():,} of {int(size):,} bytes")
        os.replace(checked(part, md5, url), path)
    except (OSError, urllib.error.URLError, HTTPException) as error:
        raise InputError(
            f"could not download {dataset} from {url} ({error}); "
            f"get the file by hand and put it at {path}, or give its path with {option}"
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return path


def checked(path: Path, md5: str | None, name: object = None) -> Path:
    """The same path. Raises InputError if the file's MD5 is not the one that its makers state."""
    if md5 is None:
        return path
    digest = hashlib.md5()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if found != md5:
        raise InputError(f"{name or path} has the MD5 checksum {found}, expected {md5}: it is damaged or another file")
    return path
