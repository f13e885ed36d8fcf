"""Text as tokens: a folder of token files, read one slice at a time. shards.py describes the files."""

from __future__ import annotations

import bisect
import functools
import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cadd_min.data.codec import tokenizer_from_spec
from cadd_min.data.corpus import Corpus
from cadd_min.data.shards import INDEX, LAYOUT, check_part, write_folder
from cadd_min.data.tokenizer import Tokenizer
from cadd_min.utils.cli import Parser, as_path, run
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import digest, locked

OPEN = 256  # files kept open: a process may often have no more than 1024


class Stretch(NamedTuple):
    """Consecutive tokens of one file: from token `offset` of the file on, they are the folder's tokens [start, end)."""

    path: Path
    offset: int
    start: int
    end: int


class TokenFolder:
    """A folder of token files. `split(name)` gives a read-only sequence of ids.

    Files are read, not mapped: a mapped file that shrinks kills the process. Reading random sequences is as fast.
    Raises InputError where `path` is no token folder, or where a file is missing or cut short.
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
        """Raise an exception where the index is not as `write_folder` writes it.

        It is a ValueError, or the KeyError, TypeError or AttributeError of a value of the wrong kind.
        """
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
    def _vocab_size(self) -> int:
        return self.tokenizer().vocab_size

    def _layout(self, files: dict[Path, dict[str, Any]]) -> Iterator[Stretch]:
        """Yield the folder's order of tokens: the training tokens of all files, then the held-out tokens of all."""
        start = 0
        for split in ("train", "val"):
            for path, part in files.items():
                if part[split]:
                    yield Stretch(path, part["train"] if split == "val" else 0, start, start + part[split])
                    start += part[split]

    def digest(self) -> str:
        """Return a hash of all tokens and of where each split begins and ends, from the hashes of the files."""
        content = [part["sha256"] for part in self.header["parts"]], sorted(self.header["splits"].items())
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def documents(self) -> str:
        """Say how many documents the folder has, and how many of the corpus were empty."""
        counts = [sum(part.get(name, 0) for part in self.header["parts"]) for name in ("documents", "empty")]
        total = f"{counts[0]:,} documents" + (f" ({counts[1]:,} empty ones left out)" if counts[1] else "")
        tokens = sum(part["train"] + part["val"] for part in self.header["parts"])
        return f"{total}, {len(self.split('val')) / max(1, tokens):.1%} of the tokens held out"

    def tokenizer(self) -> Tokenizer:
        """Rebuild the tokenizer that made the folder."""
        return tokenizer_from_spec(self.header["tokenizer"])

    def split(self, name: str, whole: bool = False) -> TokenView:
        """Return the token ids of "train", "val" or, in text8, "test".

        whole: where the split cuts a document in two, the document is of the later split.
        """
        start, end = self._splits[name]
        return TokenView(self, self._begin(start), self._begin(end)) if whole else TokenView(self, start, end)

    def _begin(self, at: int, block: int = 1 << 12) -> int:
        """Return where the document begins that the token `at` is in."""
        eot_id = self.tokenizer().eot_id
        for end in range(at, 0, -block):
            start = max(0, end - block)
            found = np.flatnonzero(self.read(start, end) == eot_id)
            if len(found):
                return start + int(found[-1]) + 1
        return 0

    def read(self, start: int, end: int) -> np.ndarray:
        """Read the tokens [start, end) in the folder's order, (end - start,) uint16 or uint32.

        Raises InputError where a file has shrunk, or where an id is not below the vocabulary's size.
        """
        chunks = []
        at = bisect.bisect_right(self._starts, start) - 1
        while start < end:
            path, offset, first, last = self._stretches[at]
            count = min(end, last) - start
            chunks.append(self._read_file(path, offset + start - first, count))
            start, at = start + count, at + 1
        ids = chunks[0] if len(chunks) == 1 else np.concatenate(chunks or [np.empty(0, self.dtype)])
        if len(ids) and ids.max() >= self._vocab_size:
            raise InputError(
                f"{self.path} is damaged: it has the token {ids.max()} of a vocabulary of {self._vocab_size}"
            )
        return ids

    def _read_file(self, path: Path, offset: int, count: int) -> np.ndarray:
        """Read `count` tokens of one file, from its token `offset` on."""
        content, size, start = b"", count * self.dtype.itemsize, offset * self.dtype.itemsize  # in bytes
        try:
            while len(content) < size:  # one call reads at most 2 GB
                block = _read_at(self._file(path), size - len(content), start + len(content))
                if not block:
                    raise InputError(f"{path} has shrunk since it was opened: delete it and run again")
                content += block
        except OSError as error:
            raise InputError(f"{path} cannot be read any more: {error.strerror}") from None
        return np.frombuffer(content, self.dtype)

    def _file(self, path: Path) -> io.FileIO:
        """Return an open file. Where OPEN files are open, the file that was opened first is closed."""
        file = self._open.get(path)
        if file is None:
            if len(self._open) >= OPEN:
                self._open.pop(next(iter(self._open))).close()
            file = self._open[path] = io.FileIO(path)
        return file

    def verify(self) -> None:
        """Read every file and compare its SHA-256. Raises InputError that names the files which differ."""
        damaged = [part["file"] for part in self.header["parts"] if digest(self.path / part["file"]) != part["sha256"]]
        if damaged:
            raise InputError(
                f"damaged in {self.path}, by their SHA-256: {', '.join(damaged)}; delete them and run again"
            )


class TokenView:
    """The ids [start, end) of a token folder. view[a:b] reads an array from the files; len(view) counts the ids."""

    def __init__(self, folder: TokenFolder, start: int, end: int):
        self.folder, self.start, self.end = folder, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, index: slice) -> np.ndarray:
        start, end, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read one after another: step must be 1, not {step}")
        return self.folder.read(self.start + start, self.start + end)


def _read_at(file: io.FileIO, size: int, start: int) -> bytes:
    """Read up to `size` bytes from byte `start` on. Two threads may read the same file at the same time."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, start)
    with _seeking:  # Windows
        file.seek(start)
        return file.read(size)


_seeking = threading.Lock()


def _check_size(path: Path, size: int) -> None:
    """Raise InputError where a token file is missing or does not have `size` bytes."""
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read the token file {path}: {error.strerror}") from None
    if actual != size:
        raise InputError(
            f"{path} is cut short or not the file of its index: it should have {size:,} bytes, not {actual:,}"
        )


def is_folder(dataset: str) -> bool:
    """Tell whether the path `dataset` is a folder of tokens: it has token files, or the index of a token folder.

    A folder of texts may have an index.json of another kind.
    """
    folder = Path(dataset)
    if not (folder / INDEX).is_file():
        return False
    try:
        index = json.loads((folder / INDEX).read_bytes())
    except (OSError, ValueError, RecursionError):
        index = None
    return (isinstance(index, dict) and "parts" in index) or (folder / "00000.bin").exists()


def prepare(corpus: Corpus, tokenizer: Tokenizer, cache: Path) -> TokenFolder:
    """Return the tokens of a corpus under a tokenizer, from the folder `cache`, or tokenised now.

    A folder in the cache that is incomplete is completed. One process at a time writes to it: others wait. Raises
    InputError where the corpus cannot be read or the cache cannot be written to.
    """
    key = hashlib.sha256(f"{LAYOUT}|{corpus.identity}|{tokenizer.fingerprint()}".encode()).hexdigest()[:12]
    path = cache / f"{corpus.name}-{tokenizer.kind}{tokenizer.vocab_size}-{key}"
    if isinstance(folder_or_reason := _open_cached(path, tokenizer), TokenFolder):
        return folder_or_reason
    try:
        path.mkdir(parents=True, exist_ok=True)
        with locked(path, lambda: print(f"waiting for another process that fills {path}")):
            # another process may have made it while this one waited for the lock
            if isinstance(folder_or_reason := _open_cached(path, tokenizer), TokenFolder):
                return folder_or_reason
            if (path / INDEX).exists():
                print(f"{folder_or_reason}: making it again")
                (path / INDEX).unlink()
            write_folder(corpus, tokenizer, path)
    except OSError as error:
        raise InputError(f"cannot write the tokens to {path}: {error.strerror}") from None
    return TokenFolder(path)


def _open_cached(path: Path, tokenizer: Tokenizer) -> TokenFolder | str:
    """Return the token folder at `path`, or the reason why it cannot be used."""
    try:
        folder = TokenFolder(path)
    except InputError as error:
        return str(error)
    return folder if folder.header["tokenizer"] == tokenizer.spec() else f"{path} was made by another tokenizer"


def main() -> None:
    """Read a token folder and compare its checksums: python -m cadd_min.data.token_folder FOLDER."""
    parser = Parser(main.__doc__)
    parser.add_argument("folder", type=as_path, help="a folder with an index.json, such as those in --cache")
    tokens = TokenFolder(parser.parse_args().folder)
    tokens.verify()
    counts = ", ".join(f"{name} {end - start:,}" for name, (start, end) in tokens.header["splits"].items())
    print(f"{tokens.path} is whole: {len(tokens.header['parts'])} files; tokens: {counts}")


if __name__ == "__main__":
    run(main)
