"""Check prompts with responses: prompts are never masked or scored, and each pair is used once an epoch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cadd_min.data import pairs
from cadd_min.data.batches import PairBatches
from cadd_min.data.pairs import Pair
from cadd_min.data.tokenizer import chars
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.objective import Batch, Objective, training_loss
from cadd_min.utils.errors import InputError
from tests.toys import NANO, rng

LETTERS = chars("abcdefgh ")


def test_a_sequence_is_prompt_response_and_ends() -> None:
    ids, starts, endless = pairs.encode([Pair("ab", "cde"), Pair("abcd", "efgh abc")], LETTERS, 8, LETTERS.encode)
    assert LETTERS.decode(ids[0][:5].tolist()) == "abcde" and set(ids[0][5:]) == {LETTERS.eot_id}
    assert endless == 1  # the second: nothing says where its answer ends
    assert LETTERS.decode(ids[1].tolist()) == "abcdefgh"  # the response is cut, so no end token follows
    assert starts.tolist() == [2, 4]
    x_0, label, free = PairBatches(ids, starts, 2)(0)
    assert label is None
    for row, given in zip(x_0.numpy(), (~free).sum(1)):
        assert given == (2 if np.array_equal(row, ids[0]) else 4)


def test_of_few_pairs_the_last_are_held_out() -> None:
    all_pairs = [Pair(str(n), "x") for n in range(3)]
    assert pairs.split(all_pairs[:3]) == (all_pairs[:2], all_pairs[2:3])
    with pytest.raises(InputError, match="two pairs"):
        pairs.split(all_pairs[:1])


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a"}', "line 2: needs 'response'"),
        ('{"prompt": "a", "response": "b"}\n\n{"prompt": 3, "response": "b"}', "line 3: needs 'prompt'"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a", "resp', "line 2: expected a JSON object"),
        ('{"prompt": "a", "response": "b"}\n[1]', "line 2: expected a JSON object"),
        ('{"prompt": "a", "response": ""}', "line 1: needs 'response', a text that is not empty"),
        ("\n\n", "holds no pairs"),
    ],
)
def test_malformed_lines_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        pairs.read_pairs(file)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a", "response": "\xff"}\n')
    with pytest.raises(InputError, match="line 1: expected a JSON object"):
        pairs.read_pairs(tmp_path / "p.jsonl")


def test_a_prompt_without_room_is_named(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": prompt, "response": "b"}) for prompt in [*"a" * 24, "abcdefgh"]]
    (tmp_path / "p.jsonl").write_text("\n" + "\n".join(lines))  # with a blank line
    with pytest.raises(InputError, match="line 26: the prompt has 8 tokens and leaves no room"):
        pairs.encode(pairs.read_pairs(tmp_path / "p.jsonl"), LETTERS, 8, LETTERS.encode)


def test_pairs_are_told_from_text(tmp_path: Path) -> None:
    for name, line, expected in [("a", {"prompt": "x"}, True), ("b", {"text": "x"}, False), ("c", [1], False)]:
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(line) + "\n")
        assert pairs.holds_pairs(file) is expected
    assert not pairs.holds_pairs(tmp_path / "none.jsonl")


@pytest.mark.parametrize("model", ["cadd", "mdlm"])
def test_what_is_given_is_never_masked_nor_scored(model: str) -> None:
    denoiser, shown = Denoiser(ModelConfig(vocab_size=20, length=8, size=NANO, model=model)), []
    features = denoiser.features
    denoiser.features = lambda x_t, *rest: shown.append(x_t) or features(x_t, *rest)  # type: ignore[method-assign]
    x_0, u = torch.randint(20, (64, 8), generator=rng(0)), torch.linspace(0.01, 1, 64, dtype=torch.float64)
    free = torch.arange(8) >= torch.randint(1, 8, (64, 1), generator=rng(1))
    for passed in (free, None):  # None: the prompts are masked too, so the check can fail
        loss = training_loss(denoiser, Batch(x_0, free=passed), u, Objective(), rng(2))
        masked = shown.pop() == denoiser.mask_id
        assert loss.masked == masked.sum() > 0
        assert (masked & ~free).any() == (passed is None)
