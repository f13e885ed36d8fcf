"""Files that are whole or not there, JSON, and downloads."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

from cadd_min.utils.errors import InputError, reason, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks answer


def cache_folder(project: str = "cadd_min") -> str:
    """Return the folder where a project keeps prepared data, as --cache writes it: below ~ or $XDG_CACHE_HOME."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), project)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write a file or a folder to, and rename it to `path` at the end.

    On failure nothing is left of it but parent folders that were missing, and `path` stays as it was. A folder may only
    replace an empty folder.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        for file in (f for f in [part, *part.rglob("*")] if f.is_file()):
            with file.open("rb") as written:
                os.fsync(written.fileno())  # a name must not reach the disk before the content does
        os.replace(part, path)
    finally:
        _remove(part)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, busy: Callable[[], object]) -> Iterator[None]:
    """Hold the lock of a folder, which one process has at a time. The system frees it when the process ends.

    busy(): called where another process holds the lock, before this process waits for it; it may raise instead. Where
    the file system has no locks, the work goes on without the lock, and a line says so.
    """
    with (folder / "lock").open("w") as lock:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"files in {folder} cannot be locked ({error.strerror}): no other run may write to it meanwhile")
        yield


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed `atomic_write` into `folder` left there."""
    for part in folder.glob("*.tmp"):
        _remove(part)


def check_writable(path: Path, option: str) -> None:
    """Raise InputError that names `option` unless a file can be written at `path`. Nothing is left there."""
    if path.is_dir():
        raise InputError(f"{option} must be a file, and {path} is a folder")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{option} {path} cannot be written: {reason(error)}") from None


def new_or_empty(folder: Path | str) -> Path:
    """Return the absolute path of a folder that is new or empty. Raises InputError where something is there."""
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists: name a new folder, or an empty one")
    return folder


def write_json(path: Path, content: dict[str, Any], indent: int | None = None) -> None:
    """Write an object as JSON, whole or not at all."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raises InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not an object in JSON, or it is damaged")
    return content


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the objects of a .jsonl file, gzipped or not, each with the number of its line.

    Raises InputError that names the line which is not an object.
    """
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


def walked(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the files in a folder and below it, and the linked folders, which are not followed.

    Hidden files and folders are left out.
    """
    found = sorted(f for f in folder.rglob("*") if not any(p.startswith(".") for p in f.relative_to(folder).parts))
    return [f for f in found if f.is_file()], [f for f in found if f.is_dir() and f.is_symlink()]


def counted(files: list[Path], linked: list[Path]) -> str:
    """Count files by their endings, and linked folders: "3 .txt, 1 .md, 1 linked folders"."""
    endings = Counter(f.suffix.lower() or "without an ending" for f in files)
    parts = [f"{count:,} {ending}" for ending, count in endings.most_common()]
    return ", ".join(parts + [f"{len(linked)} linked folders"] * bool(linked))


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Return the checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        found = hashlib.new(algorithm)
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def download(url: str, path: Path, dataset: str, md5: str | None = None, option: str = "--dataset") -> Path:
    """Return `path`, downloaded from `url` where it is not there yet. The checksum must be `md5`, if given.

    option: how the file's path can be given instead. Raises InputError where the download fails.
    """
    if path.exists():
        return checked(path, md5)
    try:
        with atomic_write(path) as part:
            with urllib.request.urlopen(url, timeout=30) as response, part.open("wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
                size = response.headers.get("Content-Length")
                if size is not None and int(size) != file.tell():  # urllib does not report it
                    raise OSError(f"it broke off after {file.tell():,} of {int(size):,} bytes")
            checked(part, md5, url)
    except (OSError, urllib.error.URLError, HTTPException) as error:
        raise InputError(
            f"could not download {dataset} from {url} ({error}); "
            f"get the file by hand and put it at {path}, or give its path with {option}"
        ) from None
    return path


def checked(path: Path, md5: str | None, name: object = None) -> Path:
    """Return the same path. Raises InputError if the file's MD5 is not the checksum that its makers state."""
    if md5 is not None and (found := digest(path, "md5")) != md5:
        raise InputError(f"{name or path} has the MD5 checksum {found}, expected {md5}: it is damaged or another file")
    return path
