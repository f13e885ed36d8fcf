"""Lines as sequences: each line of a file is one, whole and once in an epoch, padded, or left out and counted."""

import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from cadd_min.data import corpus, documents, tokenizer
from cadd_min.data.batches import RowBatches, TextBatches, _places, text_batches
from cadd_min.data.split import held_out
from cadd_min.data.token_folder import TokenFolder, prepare
from cadd_min.utils.errors import InputError

CODEC = tokenizer.chars("abcd ")
EOT = CODEC.eot_id
FEW = ["ab", "a d", "bcb", "cabd", "d"]  # of which none is held out by its text


def stream(lines: list[str]) -> np.ndarray:
    return np.array([i for line in lines for i in [*CODEC.encode(line), EOT]], np.uint16)


def rows(batches, index: int) -> list[str]:
    return [CODEC.documents(row)[0] for row in batches(index).x_0.tolist()]


def write(kind: str, texts: list[str], folder):
    path = folder / f"x.{kind}"
    if kind == "txt":
        path.write_text("<|endoftext|>".join(texts), newline="")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    return path


def read(path, lines: bool = True) -> list[tuple[str, bool]]:
    """Read the pieces of a corpus: their texts, and whether a document ends with each."""
    parts = corpus.open_corpus(str(path), path.parent, lines).parts()
    return [(piece.text, piece.last) for part in parts for piece in corpus.read(part)]


# ------------------------------------------------------------------------------------------------ from files to lines


@pytest.mark.parametrize("piece", [14, 1 << 20])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_every_line_is_a_document_of_its_own(kind, piece, tmp_path, monkeypatch):
    """Read documents of several lines, with blank lines and CRLF, in large pieces and in small ones."""
    path = write(kind, ["ab\na d\r\n\n \nbcb\n\n\n\nab\na d\r\nbcb\n", "", "cabd\nd"], tmp_path)
    monkeypatch.setattr(documents, "PIECE", piece)
    assert read(path) == [(line, True) for line in [*FEW[:3], *FEW]]
    monkeypatch.setattr(documents, "PIECE", 1 << 20)
    assert len([text for text, _ in read(path, lines=False) if text]) == 2


def test_a_line_longer_than_a_piece_is_several_pieces_of_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 8)
    long = "abc dab cda bcd abc dab cda"
    found = read(write("txt", [f"a\n{long}\nb"], tmp_path))
    assert found[0] == ("a", True) and found[-1] == ("b", True)
    assert "".join(text for text, _ in found[1:-1]) == long
    assert [last for _, last in found[1:-1]] == [False] * (len(found) - 3) + [True] and len(found) > 5
    assert all(len(text) <= 8 for text, _ in found)


def test_a_large_file_is_cut_between_lines(tmp_path, monkeypatch):
    """Check spans of 10 bytes: a text without <|endoftext|> has several, and each line is in one of them."""
    lines = [f"{'abcd'[n % 4]} {'bcda'[n % 3]}" for n in range(50)]
    path = write("txt", ["\n".join(lines)], tmp_path)
    monkeypatch.setattr(documents, "PART", 10)
    assert len(documents.spans(str(path))) == 1 and len(documents.spans(str(path), lines=True)) > 9
    assert read(path) == [(line, True) for line in lines]


def test_lines_have_tokens_and_sides_of_their_own(tmp_path):
    """Check that the cache tells lines from documents, that EOT ends each line, and that a line's text decides."""
    lines = ["".join(letters) for letters in itertools.product("abcd", repeat=4)]
    path = write("txt", ["\n".join(lines)], tmp_path)
    opened = [corpus.open_corpus(str(path), tmp_path, flag) for flag in (False, True)]
    assert opened[0].identity != opened[1].identity
    assert corpus.open_corpus(str(path), tmp_path, True).identity == opened[1].identity
    assert corpus.alphabet(opened[1]) == "abcd" and corpus.alphabet(opened[0]) == "\nabcd"
    tokens = prepare(opened[1], CODEC, tmp_path)
    assert tokens.documents().startswith("256 documents, ")
    for name, side in (("train", False), ("val", True)):
        expected = [line for line in lines if held_out(line) == side]
        assert expected and tokens.split(name, whole=True)[:].tolist() == stream(expected).tolist()
    other = prepare(opened[0], tokenizer.chars("abcd\n"), tmp_path)
    assert other.path != tokens.path and other.documents().startswith("1 documents, ")


def test_a_split_by_count_cuts_no_line(tmp_path):
    """Split the last 5% of few tokens: the cut is inside a line, and the line is the first one that is held out.

    Power: the split as it is recorded begins within the line.
    """
    lines = [*[a + b for a, b in itertools.product(FEW, FEW) if not held_out(a + b)][:12], "abcdabcdab"]
    assert not any(map(held_out, lines))
    tokens = prepare(
        corpus.open_corpus(str(write("txt", ["\n".join(lines)], tmp_path)), tmp_path, True), CODEC, tmp_path
    )
    whole = [tokens.split(name, whole=True)[:].tolist() for name in ("train", "val")]
    assert whole == [stream(lines[:-1]).tolist(), stream(lines[-1:]).tolist()]
    assert 1 <= len(tokens.split("val")) < 11 and tokens.split("train")[-1:].tolist() != [EOT]
    assert rows(RowBatches(tokens.split("val", whole=True), 12, 1, EOT), 0) == lines[-1:]
    for block in (1, 2, 5):  # EOT is looked for block by block
        assert TokenFolder(tokens.path)._begin(tokens.split("val").start, block) == len(whole[0])
    assert tokens._begin(0) == tokens._begin(1) == 0


# ------------------------------------------------------------------------------------------------ from lines to batches


def test_rows_are_lines_padded_with_their_end():
    batches = text_batches(stream(FEW), 5, 5, eot_id=EOT)
    assert isinstance(batches, RowBatches) and batches.per_epoch == 5 and batches.note == ""
    x_0 = batches(0).x_0
    assert x_0.shape == (5, 5) and x_0.dtype == torch.int64
    expected = [CODEC.encode(line) + [EOT] * (5 - len(line)) for line in FEW]
    assert sorted(x_0.tolist()) == sorted(expected)
    assert isinstance(text_batches(stream(FEW), 5, 5), TextBatches) and TextBatches.note == ""


def test_a_line_that_does_not_fit_is_left_out_and_counted():
    """Check lines of up to length - 1 tokens, whose EOT is the last token, and the count of longer ones."""
    batches = RowBatches(stream(FEW), 4, 4, EOT, name="it")
    assert sorted(rows(batches, 0)) == sorted(line for line in FEW if len(line) <= 3)
    assert batches.note == "it: 1 of 5 lines longer than 3 tokens are left out"
    unfinished = np.concatenate([stream(FEW), [0, 1]])  # what no EOT ends is no line
    assert sorted(rows(RowBatches(unfinished, 5, 5, EOT), 0)) == sorted(FEW)
    with pytest.raises(InputError, match=r"^it: none of its 5 lines fits --length 1 with the token of its end$"):
        RowBatches(stream(FEW), 1, 4, EOT, name="it")
    assert RowBatches(stream(FEW), 4, 4, EOT).note.startswith("the corpus: 1 of 5")
    assert text_batches(stream(FEW), 4, 4, name="it", eot_id=EOT).note.startswith("it: 1 of 5")
    with pytest.raises(InputError, match=r"^it has 18 tokens: fewer than one sequence"):
        text_batches(stream(FEW), 99, 4, name="it")
    for nothing in (stream([]), unfinished[-2:]):
        with pytest.raises(InputError, match=r"^the corpus: none of its 0 lines"):
            text_batches(nothing, 9, 4, eot_id=EOT)


@pytest.mark.parametrize("size", [1, 4, 5, 12])
def test_an_epoch_is_a_permutation_of_all_rows_and_the_next_is_another(size):
    lines = [f"{a}{b}{'d' * n}" for n, (a, b) in enumerate(itertools.product("abc", repeat=2))]
    batches = RowBatches(stream(lines), 12, size, EOT, seed=3)
    drawn = [row for index in range(9 * 6 // size + 1) for row in rows(batches, index)]
    epochs = [drawn[start : start + 9] for start in range(0, 9 * 6, 9)]
    assert all(sorted(epoch) == sorted(lines) for epoch in epochs)
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    again, other = (RowBatches(stream(lines), 12, size, EOT, seed=seed) for seed in (3, 4))
    assert all(torch.equal(again(index).x_0, batches(index).x_0) for index in (5, 1, 0))
    assert [row for index in range(9) for row in rows(other, index)] != drawn[: 9 * size]
    default, zero = RowBatches(stream(lines), 12, 9, EOT), RowBatches(stream(lines), 12, 9, EOT, 0)
    assert torch.equal(default(2).x_0, zero(2).x_0)
    assert torch.equal(text_batches(stream(lines), 12, 9, eot_id=EOT)(2).x_0, zero(2).x_0)


def test_ends_are_found_across_blocks(tmp_path):
    """Read the same rows from an array and from files, with EOTs at the borders of blocks."""
    path = write("txt", ["\n".join(FEW * 3)], tmp_path)
    tokens = prepare(corpus.open_corpus(str(path), tmp_path, True), CODEC, tmp_path)
    view = tokens.split("train", whole=True)
    array = view[:]
    assert torch.equal(RowBatches(view, 5, 3, EOT)(1).x_0, RowBatches(array, 5, 3, EOT)(1).x_0)
    for block in (1, 2, 3, 7, 1000):
        assert _places(array[2:], EOT, block).tolist()[0] == 0, "an EOT may be first"
        assert _places(array, EOT, block).tolist() == np.flatnonzero(array == EOT).tolist()
