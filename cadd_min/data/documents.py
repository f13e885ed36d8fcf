"""Documents of text files, one piece at a time, from spans of about 64 MB: the memory is flat whatever a file's size.

A span is a range of one file that can be read without the rest of it, and so on another core or after a kill.
"""

from __future__ import annotations

import codecs
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cadd_min.data.tokenizer import EOT
from cadd_min.utils.errors import InputError, described, first_line

PIECE = 1 << 20  # characters: longer documents are handed on in pieces
PART = 1 << 26  # bytes in a span, and in a part of a corpus, about
TRIES = 5  # for a file on the network
ENDINGS = (".txt", ".jsonl", ".parquet")


class Piece(NamedTuple):
    """Part of a document; `last` says that the document ends here."""

    text: str
    last: bool


class Span(NamedTuple):
    """[start, end) of a file: bytes, or row groups of a .parquet file. path: local or a URL; size: bytes of text."""

    path: str
    start: int
    end: int
    size: int

    @property
    def remote(self) -> bool:
        return "://" in self.path


def spans(path: str) -> list[Span]:
    """A file cut at about every PART bytes where a document ends. Raises InputError where it cannot be read."""
    if path.endswith(".parquet"):
        return _parquet_spans(path)
    size = Path(path).stat().st_size
    mark = b"\n" if path.endswith(".jsonl") else EOT.encode()
    cuts = [0]
    while cuts[-1] + PART < size:
        cuts.append(_after(path, mark, cuts[-1] + PART, size))
    return [Span(path, start, end, end - start) for start, end in zip(cuts, [*cuts[1:], size]) if end > start]


def pieces(span: Span) -> Iterator[Piece]:
    """The documents of a span, by the file's ending."""
    if span.path.endswith(".parquet"):
        return _documents(_parquet_texts(span))
    if span.path.endswith(".jsonl"):
        return _documents(_jsonl_texts(span))
    return _text_pieces(span)


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"--dataset {path} cannot be read: {error.strerror}") from None


def _after(path: str, mark: bytes, at: int, size: int) -> int:
    """The place after the first `mark` that begins at byte `at` or later; `size`, the file's, if there is none."""
    with _open(path) as file:
        while at < size:
            file.seek(at)
            found = file.read(PIECE + len(mark) - 1).find(mark)  # also one that begins at the end of this PIECE
            if found >= 0:
                return at + found + len(mark)
            at += PIECE
    return size


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


def _text_pieces(span: Span) -> Iterator[Piece]:
    """A text file, documents parted by <|endoftext|>, read block by block."""
    rest, ended, fresh = "", True, span.start > 0
    for block in _text_blocks(span):
        rest += block
        if fresh:  # the newlines after a mark that ended the block or the span before
            rest = rest.lstrip("\n")
        *whole, rest = rest.split(EOT)
        for text in whole:
            yield from _documents(iter([text.strip("\n")] if text.strip() or not ended else []))
            ended = True
        if whole:
            rest = rest.lstrip("\n")
        fresh = (fresh or bool(whole)) and not rest
        while len(rest) > 2 * PIECE:  # the document goes on: hand on what is surely in it
            cut = _cuts(rest)[0]
            yield Piece(rest[:cut], False)
            rest, ended = rest[cut:], False
    if rest.strip() or not ended:
        yield from _documents(iter([rest]))


def _text_blocks(span: Span) -> Iterator[str]:
    """The text of a span of a text file, about PIECE characters at a time."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(), span.start
    with _open(span.path) as file:
        file.seek(at)
        while block := file.read(min(PIECE, span.end - at)):
            at += len(block)
            if b"\0" in block:
                raise InputError(f"--dataset {span.path} is binary, not text (it has zero bytes)")
            try:
                yield decoder.decode(block, final=at == span.end)
            except UnicodeDecodeError as error:
                place = at - len(error.object) + error.start
                byte = error.object[error.start]
                raise InputError(f"--dataset {span.path} is not UTF-8 text (byte {place} is {byte:#x})") from None


def _jsonl_texts(span: Span) -> Iterator[str]:
    at = span.start
    with _open(span.path) as file:
        file.seek(at)
        while at < span.end and (line := file.readline()):
            if line.strip():
                yield _json_text(line, span.path, at)
            at += len(line)


def _json_text(line: bytes, path: str, at: int) -> str:
    """The text of one line, which begins at byte `at`."""
    try:
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            return row["text"].encode("utf-8", "replace").decode()  # JSON may have halves of characters
        why = "expected an object with a string 'text'"
    except UnicodeDecodeError:
        raise InputError(f"--dataset {path} is not UTF-8 text") from None
    except (ValueError, RecursionError):
        why = "not valid JSON"
    with _open(path) as file:
        number = 1 + sum(file.read(min(PIECE, at - start)).count(b"\n") for start in range(0, at, PIECE))
    raise InputError(f"--dataset {path}, line {number}: {why}")


def _parquet(path: str) -> Any:
    """The open parquet file at a path or a URL of any kind that fsspec knows, hf:// among them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("reading .parquet needs pyarrow: pip install pyarrow") from None
    source: Any = path
    if "://" in path:
        import fsspec  # it comes with datasets, which made the URL

        system, name = fsspec.core.url_to_fs(path)
        source = system.open(name, "rb")
    try:  # buffer_size: a row group is read page by page; by default all of it at once, which may be a whole file
        file = pyarrow.parquet.ParquetFile(source, buffer_size=1 << 22, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"--dataset {path} is not a readable .parquet file: {first_line(error)}") from None
    schema = file.schema_arrow
    if "text" not in schema.names:
        raise InputError(f"--dataset {path} has no column 'text', only {', '.join(schema.names)}")
    if "string" not in str(schema.field("text").type):
        raise InputError(f"--dataset {path}: its column 'text' must hold strings, not {schema.field('text').type}")
    return file


def _parquet_spans(path: str) -> list[Span]:
    with _parquet(path) as file:
        column = file.schema_arrow.names.index("text")
        groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
        sizes = [group.column(column).total_uncompressed_size for group in groups]
    found, start, total = [], 0, 0
    for end, size in enumerate(sizes, 1):
        total += size
        if total >= PART or end == len(sizes):
            found.append(Span(path, start, end, total))
            start, total = end, 0
    return found


def _parquet_texts(span: Span) -> Iterator[str]:
    """The texts of a span; where the network fails, they are read again from the one that was to come."""
    done = 0
    for left in reversed(range(TRIES if span.remote else 1)):
        try:
            for text in itertools.islice(_parquet_rows(span), done, None):
                done += 1
                yield text
            return
        except Exception as error:
            if left:
                time.sleep(2.0 ** (TRIES - left) - 1)  # seconds: 1, 3, 7, 15
            elif isinstance(error, InputError):
                raise
            else:
                raise InputError(f"--dataset {span.path} cannot be read: {described(error)}") from None


def _parquet_rows(span: Span) -> Iterator[str]:
    with _parquet(span.path) as file:
        rows = file.iter_batches(256, range(span.start, span.end), ["text"], use_threads=False)
        for batch in rows:
            yield from (text for text in batch.column(0).to_pylist() if text)
