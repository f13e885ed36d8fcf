"""Text as tokens: a folder of token files (shards.py says what is in it), read a slice at a time, and batches of it."""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cadd_min.data.codec import tokenizer_from_spec
from cadd_min.data.corpus import Corpus
from cadd_min.data.shards import INDEX, check_part, write_folder
from cadd_min.data.tokenizer import Tokenizer
from cadd_min.utils.cli import Parser, run
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import digest

OPEN = 256  # files at a time: a process may often have no more than 1024


class Stretch(NamedTuple):
    """Tokens that follow one another in one file: those from its `offset`-th are the folder's [start, end)."""

    path: Path
    offset: int
    start: int
    end: int


class TokenFolder:
    """A folder of token files: `split(name)` is a read-only sequence of ids.

    Files are read, not mapped: a mapped file that shrinks kills the process, and reading random sequences is as fast.
    Raises InputError if the folder is not one, or if a file is missing or cut short.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.header: dict[str, Any] = json.loads((path / INDEX).read_bytes())
            self.dtype = np.dtype(self.header["dtype"]).newbyteorder("<")
            parts, self._splits = self.header["parts"], self.header["splits"]
            self._check_header()
            files = {path / part["file"]: part for part in parts}
            self._stretches = list(self._layout(files))
        except OSError as error:
            raise InputError(f"cannot read the token folder {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{path / INDEX} is damaged, or no index of a token folder") from None
        for file, part in files.items():
            _check_size(file, part["bytes"])
        self._starts = [stretch.start for stretch in self._stretches]
        self._open: dict[Path, io.FileIO] = {}

    def _check_header(self) -> None:
        """Raise ValueError, or what Python raises, where the index is not as `write_folder` writes it."""
        parts = self.header["parts"]
        for part in parts:
            check_part(part)
        total = sum(part["train"] + part["val"] for part in parts)
        fit = all(part["bytes"] == self.dtype.itemsize * (part["train"] + part["val"]) for part in parts)
        for start, end in [self._splits["train"], self._splits["val"], *self._splits.values()]:
            fit = fit and type(start) is type(end) is int and 0 <= start <= end <= total
        if not fit or self.dtype.kind != "u" or not isinstance(self.header["tokenizer"], dict):
            raise ValueError

    @functools.cached_property
    def _tokens(self) -> int:
        return self.tokenizer().vocab_size

    def _layout(self, files: dict[Path, dict[str, Any]]) -> Iterator[Stretch]:
        """The folder's order of tokens: the training tokens of all files, then the held-out ones of all."""
        start = 0
        for split in ("train", "val"):
            for path, part in files.items():
                if part[split]:
                    yield Stretch(path, part["train"] if split == "val" else 0, start, start + part[split])
                    start += part[split]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made it."""
        return tokenizer_from_spec(self.header["tokenizer"])

    def split(self, name: str) -> TokenView:
        """Token ids of "train", "val" or (text8) "test"."""
        return TokenView(self, *self._splits[name])

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) in the folder's order. Raises InputError where a file has shrunk."""
        found = []
        at = bisect.bisect_right(self._starts, start) - 1
        while start < end:
            path, offset, first, last = self._stretches[at]
            count = min(end, last) - start
            found.append(self._read_file(path, offset + start - first, count))
            start, at = start + count, at + 1
        ids = found[0] if len(found) == 1 else np.concatenate(found or [np.empty(0, self.dtype)])
        if len(ids) and ids.max() >= self._tokens:
            raise InputError(f"{self.path} is damaged: it has the token {ids.max()} of a vocabulary of {self._tokens}")
        return ids

    def _read_file(self, path: Path, offset: int, count: int) -> np.ndarray:
        content, wanted, offset = b"", count * self.dtype.itemsize, offset * self.dtype.itemsize
        try:
            while len(content) < wanted:  # one read gives at most 2 GB
                block = os.pread(self._file(path).fileno(), wanted - len(content), offset + len(content))
                if not block:
                    raise InputError(f"{path} has shrunk since it was opened: delete it and run again")
                content += block
        except OSError as error:
            raise InputError(f"{path} cannot be read any more: {error.strerror}") from None
        return np.frombuffer(content, self.dtype)

    def _file(self, path: Path) -> io.FileIO:
        file = self._open.get(path)
        if file is None:
            if len(self._open) >= OPEN:
                self._open.pop(next(iter(self._open))).close()
            file = self._open[path] = io.FileIO(path)
        return file

    def verify(self) -> None:
        """Read everything. Raises InputError that names the files which are not what they were when written."""
        damaged = [part["file"] for part in self.header["parts"] if digest(self.path / part["file"]) != part["sha256"]]
        if damaged:
            raise InputError(
                f"damaged in {self.path}, by their SHA-256: {', '.join(damaged)}; delete them and run again"
            )


class TokenView:
    """Ids [start, end) of a token folder: len(view), and view[a:b] as an array that is read from the files then."""

    def __init__(self, folder: TokenFolder, start: int, end: int):
        self.folder, self.start, self.end = folder, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, index: slice) -> np.ndarray:
        start, end, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read one after another: step must be 1, not {step}")
        return self.folder.read(self.start + start, self.start + end)


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read the token file {path}: {error.strerror}") from None
    if found != size:
        raise InputError(
            f"{path} is cut short or not the one of its index: it should have {size:,} bytes, not {found:,}"
        )


def is_folder(dataset: str) -> bool:
    """Whether --dataset is a folder of tokens."""
    return (Path(dataset) / INDEX).is_file()


def prepare(corpus: Corpus, tokenizer: Tokenizer, cache: Path) -> TokenFolder:
    """The tokens of this corpus under this tokenizer: from the cache, or made now, or made whole."""
    key = hashlib.sha256(f"{corpus.identity}|{tokenizer.fingerprint()}".encode()).hexdigest()[:12]
    path = cache / f"{corpus.name}-{tokenizer.kind}{tokenizer.vocab_size}-{key}"
    if isinstance(found := _look(path, tokenizer), TokenFolder):
        return found
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if isinstance(found := _look(path, tokenizer), TokenFolder):  # made by the process that was waited for
                return found
            if (path / INDEX).exists():
                print(f"{found}: making it again")
                (path / INDEX).unlink()
            write_folder(corpus, tokenizer, path)
    except OSError as error:
        raise InputError(f"cannot write the tokens to {path}: {error.strerror}") from None
    return TokenFolder(path)


def _look(path: Path, tokenizer: Tokenizer) -> TokenFolder | str:
    """The folder at that path, or why there is none of use."""
    try:
        found = TokenFolder(path)
    except InputError as error:
        return str(error)
    return found if found.header["tokenizer"] == tokenizer.spec() else f"{path} was made by another tokenizer"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time comes in; the lock goes with it, however it ends."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that fills {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    """python -m cadd_min.data.token_folder FOLDER: read a token folder and compare its checksums."""
    parser = Parser(main.__doc__)
    parser.add_argument("folder", type=Path, help="one in --cache: it has an index.json")
    tokens = TokenFolder(parser.parse_args().folder)
    tokens.verify()
    counts = ", ".join(f"{name} {end - start:,}" for name, (start, end) in tokens.header["splits"].items())
    print(f"{tokens.path} is whole: {len(tokens.header['parts'])} files; tokens: {counts}")


if __name__ == "__main__":
    run(main)
