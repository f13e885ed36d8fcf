"""Documents in text, .jsonl and .parquet files, read a piece at a time: memory does not grow with the file's size.

A file is cut into spans of about 64 MB. A span is read without the rest of the file. So spans can be read on different
cores, and a run that was killed continues with the spans that are left.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cadd_min.data.tokenizer import EOT
from cadd_min.utils.errors import InputError, described, first_line, shown

PIECE = 1 << 20  # characters: a longer document is read in pieces
PART = 1 << 26  # about this many bytes are in a span, and in a part of a corpus
TRIES = 5  # attempts to read a file on the network
KINDS = {".txt": "text", ".text": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
BOM = "\ufeff"  # what some editors write before a text
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class Piece(NamedTuple):
    """A piece of a document. `last` tells whether the document ends with it. An empty document is one empty piece.

    held_out: see Span.
    """

    text: str
    last: bool
    held_out: bool | None = None


class Span(NamedTuple):
    """The range [start, end) of a file, in bytes, or in row groups of a .parquet file.

    path: local, or a URL; size: bytes of text; held_out: whether its documents are held out, by the file's folder, or
    None where each document's own text decides; lines: whether each line of a document is a document of its own.
    """

    path: str
    start: int
    end: int
    size: int
    held_out: bool | None = None
    lines: bool = False

    @property
    def remote(self) -> bool:
        """Whether the file is read over a network."""
        return "://" in self.path


def kind(path: str) -> str | None:
    """Return "text", "jsonl" or "parquet" by a file's ending, in any case, or None. Without an ending it is text."""
    return KINDS.get(Path(path).suffix.lower(), None if Path(path).suffix else "text")


def spans(path: str, lines: bool = False) -> list[Span]:
    """Cut a file into spans of about PART bytes, each of which ends where a document ends.

    lines: see Span. Raises InputError where the file cannot be read.
    """
    found = _parquet_spans(path) if kind(path) == "parquet" else _byte_spans(path, lines)
    return [span._replace(lines=lines) for span in found]


def _byte_spans(path: str, lines: bool) -> list[Span]:
    size = Path(path).stat().st_size
    mark = b"\n" if lines or kind(path) == "jsonl" else EOT.encode()
    if size == 0:
        return [Span(path, 0, 0, 0)]  # an empty document, which is counted
    cuts = [0]
    while cuts[-1] + PART < size:
        cuts.append(_after(path, mark, cuts[-1] + PART, size))
    return [Span(path, start, end, end - start) for start, end in zip(cuts, [*cuts[1:], size]) if end > start]


def pieces(span: Span) -> Iterator[Piece]:
    """Yield the documents of a span, or their lines, in pieces. The file's ending tells its format."""
    readers = {"parquet": _parquet_texts, "jsonl": _jsonl_texts}
    reader = readers.get(kind(span.path) or "text")
    found = _text_pieces(span) if reader is None else _in_pieces(text if text.strip() else "" for text in reader(span))
    return _in_lines(found) if span.lines else found


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"--dataset {path} cannot be read: {error.strerror}") from None


def _after(path: str, mark: bytes, at: int, size: int) -> int:
    """Find the first `mark` that begins at byte `at` or later, and return the byte after it.

    Returns the file's `size` where there is no such mark.
    """
    with _open(path) as file:
        while at < size:
            file.seek(at)
            begin = file.read(PIECE + len(mark) - 1).find(mark)  # a mark may begin in this PIECE and end in the next
            if begin >= 0:
                return at + begin + len(mark)
            at += PIECE
    return size


def _in_lines(found: Iterable[Piece]) -> Iterator[Piece]:
    """Yield each line of documents that is not blank as a document of its own.

    A line that goes on in the next piece of its document is whole, unless it is longer than a PIECE itself.
    """
    rest, begun = "", False  # of a line that has not ended: its text, and whether the text before it was yielded
    for piece in found:
        *complete, rest = (rest + piece.text + "\n" * piece.last).split("\n")
        for line in complete:
            if line.strip() or begun:
                yield from _in_pieces([line.removesuffix("\r")])
            begun = False
        while len(rest) > 2 * PIECE:
            cut = _cuts(rest)[0]
            yield Piece(rest[:cut], False)
            rest, begun = rest[cut:], True


def _in_pieces(texts: Iterable[str]) -> Iterator[Piece]:
    """Yield whole documents in pieces."""
    for text in texts:
        cuts = [*_cuts(text), len(text)]
        for start, end in zip([0, *cuts], cuts):
            yield Piece(text[start:end], end == len(text))


def _cuts(text: str) -> list[int]:
    """Return the places at which to cut a text into pieces of at most PIECE characters.

    A word begins at each place, so a byte-level BPE makes the same tokens with and without the cut. A text is cut
    anyway after half a PIECE without such a place.
    """
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
    """Yield the documents of a text file, in pieces. <|endoftext|> ends a document. Newlines around it are dropped."""
    rest = ""  # text that has been read and not yet yielded
    between, found = True, span.start > 0  # no document has been begun and not ended; the file has had a document
    after_mark = span.start > 0  # nothing but newlines since the last mark
    for block in _text_blocks(span):
        rest += block
        if after_mark:  # the mark ended the previous block or span
            rest = rest.lstrip("\n")
        *complete, rest = rest.split(EOT)
        for text in complete:
            yield from _in_pieces(iter([text.strip("\n") if text.strip() or not between else ""]))
            between = found = True
        if complete:
            rest = rest.lstrip("\n")
        after_mark = (after_mark or bool(complete)) and not rest
        while len(rest) > 2 * PIECE:  # a document goes on: the end of `rest` may still be part of a mark
            cut = _cuts(rest)[0]
            yield Piece(rest[:cut], False)
            rest, between = rest[cut:], False
    if rest.strip() or not between:
        yield from _in_pieces(iter([rest]))
    elif not found:
        yield Piece("", True)


def _text_blocks(span: Span) -> Iterator[str]:
    """Yield the text of a span of a text file, PIECE bytes at a time, with line ends as newlines and without a BOM.

    Raises InputError for bytes that are no UTF-8 text.
    """
    decoder, at = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True), span.start
    with _open(span.path) as file:
        file.seek(at)
        while block := file.read(min(PIECE, span.end - at)):
            at += len(block)
            if at == len(block) and block.startswith(UTF_16):
                raise InputError(f"--dataset {span.path} is UTF-16 text: save it as UTF-8")
            if b"\0" in block:
                raise InputError(f"--dataset {span.path} is binary, not text (it has zero bytes)")
            try:
                text = decoder.decode(block, final=at == span.end)
                yield text.removeprefix(BOM) if at == len(block) else text
            except UnicodeDecodeError as error:
                wrong = at - len(error.object) + error.start
                byte = error.object[error.start]
                raise InputError(
                    f"--dataset {span.path} is not UTF-8 text (byte {wrong} is {byte:#x}): save it as UTF-8"
                ) from None


def _jsonl_texts(span: Span) -> Iterator[str]:
    """Yield the texts of a span of a .jsonl file."""
    at = span.start
    with _open(span.path) as file:
        file.seek(at)
        while at < span.end and (line := file.readline()):
            if line.strip():
                yield _json_text(line, span.path, at)
            at += len(line)


def _json_text(line: bytes, path: str, at: int) -> str:
    """Return the text of one line, which begins at byte `at`. Raises InputError that names the line."""
    try:
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            return row["text"].encode("utf-8", "replace").decode()  # JSON may hold lone surrogates
        why = "expected an object with a string 'text' (finetune.py: or 'prompt' and 'response' on every line)"
    except UnicodeDecodeError:
        raise InputError(f"--dataset {path} is not UTF-8 text") from None
    except (ValueError, RecursionError):
        why = "not valid JSON"
    with _open(path) as file:
        number = 1 + sum(file.read(min(PIECE, at - start)).count(b"\n") for start in range(0, at, PIECE))
    raise InputError(f"--dataset {path}, line {number}: {why}")


def _open_parquet(path: str) -> Any:
    """Open the parquet file at a path, or at a URL that fsspec can open, such as hf://. Raises InputError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("reading .parquet needs pyarrow: pip install pyarrow") from None
    source: Any = path
    if "://" in path:
        import fsspec  # installed with datasets, which made the URL

        system, name = fsspec.core.url_to_fs(path)
        source = system.open(name, "rb")
    try:  # with buffer_size a row group, which may be the whole file, is read page by page and not at once
        file = pyarrow.parquet.ParquetFile(source, buffer_size=1 << 22, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"--dataset {path} is not a readable .parquet file: {first_line(error)}") from None
    schema = file.schema_arrow
    if "text" not in schema.names:
        raise InputError(f"--dataset {path} has no column 'text', only {', '.join(schema.names)}")
    found = schema.field("text").type
    if not (pyarrow.types.is_string(found) or pyarrow.types.is_large_string(found)):
        raise InputError(f"--dataset {path}: its column 'text' must hold strings, not {shown(found)}")
    return file


def _parquet_spans(path: str) -> list[Span]:
    """Cut a parquet file into spans of about PART bytes of text, each of whole row groups."""
    with _open_parquet(path) as file:
        groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
        leaves = [file.schema.column(n).path for n in range(len(file.schema))]  # a nested column has several
        column = leaves.index("text")
        sizes = [group.column(column).total_uncompressed_size for group in groups]
    cut, start, total = [], 0, 0
    for end, size in enumerate(sizes, 1):
        total += size
        if total >= PART or end == len(sizes):
            cut.append(Span(path, start, end, total))
            start, total = end, 0
    return cut


def _parquet_texts(span: Span) -> Iterator[str]:
    """Yield the texts of a span of a parquet file. Where the network fails, continue with the text that is next.

    Raises InputError where the last attempt fails.
    """
    done = 0
    for attempts_left in reversed(range(TRIES if span.remote else 1)):
        try:
            for text in itertools.islice(_parquet_rows(span), done, None):
                done += 1
                yield text
            return
        except Exception as error:
            if attempts_left:
                time.sleep(2.0 ** (TRIES - attempts_left) - 1)  # seconds: 1, 3, 7, 15
            elif isinstance(error, InputError):
                raise
            else:
                raise InputError(f"--dataset {span.path} cannot be read: {described(error)}") from None


def _parquet_rows(span: Span) -> Iterator[str]:
    with _open_parquet(span.path) as file:
        batches = file.iter_batches(256, range(span.start, span.end), ["text"], use_threads=False)
        for batch in batches:
            yield from (text or "" for text in batch.column(0).to_pylist())
