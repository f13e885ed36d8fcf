"""Check that a document's content decides whether it is held out, however its corpus changes around it."""

import json
import random
from pathlib import Path

import pytest

from cadd_min.data import pairs, shards
from cadd_min.data.pairs import Pair
from cadd_min.data.split import ONE_IN, held_out, unlike
from tests.data.test_token_folder import CODEC, read, texts

DOCS = [f"Document number {i}. Its words: {i * i} and {i**3}." for i in range(400)]


def write(folder: Path, name: str, docs: list[str]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps({"text": doc}) for doc in docs))
    return path


def test_one_text_of_twenty_is_held_out() -> None:
    """Of 20,000 texts 1,000 are held out, give or take 5 deviations of 31: it fails once in a million seeds."""
    assert abs(sum(held_out(f"text {n}") for n in range(20_000)) - 1000) < 154


@pytest.mark.parametrize("by_content", [True, False], ids=["by content", "twin: by place"])
def test_a_corpus_that_grows_and_is_shuffled_keeps_its_split(by_content, tmp_path, monkeypatch) -> None:
    if not by_content:
        count = iter(range(10_000))
        monkeypatch.setattr(shards, "held_out", lambda text: next(count) % ONE_IN == ONE_IN - 1)
    before = texts(read(write(tmp_path, "before", DOCS[:300]), tmp_path).split("val"))
    grown = DOCS.copy()
    random.Random(0).shuffle(grown)
    folder = read(write(tmp_path, "after", grown), tmp_path)
    after, trained_on = texts(folder.split("val")), texts(folder.split("train"))
    assert 5 < len(before) < len(after) and not set(after) & set(trained_on)
    assert (set(before) <= set(after)) is by_content


def test_equal_documents_are_on_the_same_side(tmp_path) -> None:
    folder = read(write(tmp_path, "twice", DOCS[:200] * 2), tmp_path)
    sides = [texts(folder.split(name)) for name in ("train", "val")]
    assert not set(sides[0]) & set(sides[1]) and len(sides[1]) == 2 * len(set(sides[1])) > 0


@pytest.mark.parametrize("size", [4, 4000], ids=["a short one", "a book"])
def test_of_documents_of_very_unlike_sizes_the_last_twentieth_is_held_out(size, tmp_path) -> None:
    documents = [" ".join([f"doc {n} word"] * 40) for n in range(40)]
    documents = [doc for doc in documents if not held_out(doc)]
    odd = next(text for n in range(1000) if held_out(text := f"{n} odd" * size))
    folder = read(write(tmp_path, "books", [*documents, odd]), tmp_path)
    total = len(folder.split("train")) + len(folder.split("val"))
    assert len(folder.split("val")) == total // ONE_IN
    assert "5.0% of the tokens held out" in folder.documents()


def test_the_bounds_of_what_is_unlike() -> None:
    assert [n for n in range(101) if not unlike(n, 100)] == list(range(2, 21))


def test_answers_to_the_same_prompt_are_on_the_same_side() -> None:
    everything = [Pair(f"prompt {n % 150}", f"answer {n}") for n in range(600)]
    kept, rest = pairs.split(everything)
    assert sorted(kept + rest) == sorted(everything) and 10 < len(rest) < 70
    assert not {pair.prompt for pair in kept} & {pair.prompt for pair in rest}
    assert pairs.split([Pair("the same prompt", f"{n}") for n in range(60)])[1] == [
        Pair("the same prompt", f"{n}") for n in (57, 58, 59)
    ]


def test_a_long_document_is_on_one_side(tmp_path, monkeypatch) -> None:
    from cadd_min.data import documents

    monkeypatch.setattr(documents, "PIECE", 64)
    long = [f"{n} " + "word " * 60 for n in range(200)]
    folder = read(write(tmp_path, "long", long), tmp_path)
    sides = [texts(folder.split(name), CODEC) for name in ("train", "val")]
    assert sorted(sides[0] + sides[1]) == sorted(long) and sides[1]
