"""The start at the counts of a corpus, against loops over its tokens."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch

from cadd_min.data.batches import RowBatches, TextBatches
from cadd_min.dit import Size
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.training.counts import fast_start, ppmi, sequences, start_at_counts, word_vectors
from tests.toys import PATCHES

SIZE = Size(layers=1, width=16, heads=2, cond=8)


def classes(count: int, seed: int = 0) -> np.ndarray:
    """Draw tokens 0 to 39 of four classes, v // 10. A token's class is that of the token before it, or the next one.

    Tokens of one class have the same neighbours.
    """
    rng = np.random.default_rng(seed)
    kind = np.cumsum(rng.random(count) < 0.7) % 4
    return (10 * kind + rng.integers(10, size=count)).astype(np.uint16)


def law(data: TextBatches | RowBatches) -> torch.Tensor:
    """Return the law (40,) that a new model of `data` expects where all is masked, its word vectors left out."""
    config = ModelConfig(40, data.length, SIZE, model="mdlm", head_bias=True)
    model = start_at_counts(Denoiser(config), data)
    model.head.weight.data.zero_()
    x_t = torch.full((2, data.length), 40)
    return model(x_t, torch.zeros(*x_t.shape, 0), torch.tensor([0.2, 1.0])).softmax(-1)[1, 3].double()


def test_a_new_model_of_text_knows_the_unigram_law():
    tokens = np.random.default_rng(0).choice(40, 5008, p=np.arange(1, 41) / 820).astype(np.uint16)
    data = TextBatches(tokens, 8, 5)
    counts = np.bincount(sequences(data).flatten(), minlength=40)
    assert counts.sum() == 5000 and np.abs(counts - np.bincount(tokens, minlength=40)).sum() <= 8
    torch.testing.assert_close(law(data), torch.from_numpy((counts + 1) / 5040), atol=1e-6, rtol=1e-5)


def test_a_new_model_of_lines_knows_how_much_is_padding():
    """Check the law of rows of 8 with lines of 1 to 6 tokens, 0 their end, and of one line that is left out.

    Power: in the stream, without the padding, the end is a fourth of the tokens, and half of them in the rows.
    """
    lines = [[1 + n % 9] * (1 + n % 6) + [0] for n in range(120)]
    tokens = np.array([v for line in [*lines, [30] * 9 + [0]] for v in line], np.uint16)
    rows = np.array([line + [0] * (8 - len(line)) for line in lines])
    expected = (np.bincount(rows.flatten(), minlength=40) + 1) / (rows.size + 40)
    torch.testing.assert_close(law(RowBatches(tokens, 8, 4, 0)), torch.from_numpy(expected), atol=1e-6, rtol=1e-5)
    assert expected[0] > 0.5 > 2 * 0.9 * np.mean(tokens == 0)


@pytest.mark.parametrize("gate, vocab_size, model, bias, near", [
    (1.0, 127, "cadd", True, True), (0.1, 127, "ar", True, True), (1.0, 128, "cadd", True, False),
    (1.0, 127, "cdm", True, False), (0.0, 127, "mdlm", False, False),
])  # fmt: skip
def test_who_starts_fast(gate, vocab_size, model, bias, near):
    config = ModelConfig(vocab_size, 8, dataclasses.replace(SIZE, gate=gate), model=model)
    assert fast_start(config) == dataclasses.replace(config, head_bias=bias, neighbours=near)


def test_a_model_of_images_starts_as_ever():
    config = ModelConfig(17, 16, dataclasses.replace(PATCHES, gate=1.0), (4, 4, 1))
    assert fast_start(config) == config


def test_of_a_large_corpus_a_part_is_counted(monkeypatch):
    monkeypatch.setattr("cadd_min.training.counts.MOST", 400)
    tokens = np.arange(4000, dtype=np.uint16)
    found = sequences(TextBatches(tokens, 8, 5))
    assert found.shape == (50, 8) and len(found.unique()) == 400
    assert found.min() < 800 and found.max() > 3200, "the part is from all of the corpus"


def test_ppmi_is_the_definition():
    x_0 = np.random.default_rng(1).integers(6, size=(10, 30)) ** 2 // 6  # 0 to 4
    pairs: Counter = Counter()
    for row in x_0:
        for i, v in enumerate(row):
            for d, weight in ((1, 1.0), (2, 0.5)):
                if i + d < len(row):
                    pairs[int(v), int(row[i + d])] += weight
    total = sum(pairs.values())
    got = ppmi(torch.from_numpy(x_0), 7).to_dense()
    for v in range(7):
        for w in range(7):
            before, behind = (sum(n for pair, n in pairs.items() if pair[k] == u) for k, u in ((0, v), (1, w)))
            n = pairs[v, w]
            assert math.isclose(got[v, w], max(0, math.log(n * total / (before * behind))) if n else 0, abs_tol=1e-5)


def test_tokens_with_the_same_neighbours_get_close_vectors():
    """Compare cosines within a class and across. In a shuffled corpus, where no token predicts another, they agree."""
    torch.manual_seed(0)
    for corpus, apart in ((classes(20_000), True), (np.random.default_rng(2).permutation(classes(20_000)), False)):
        vectors = word_vectors(torch.from_numpy(corpus.astype(np.int64)).view(-1, 50), 41, 8)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(41))
        cosines, kind = vectors[:40] @ vectors[:40].T, torch.arange(40) // 10
        same = kind[:, None] == kind
        within, across = cosines[same & ~torch.eye(40, dtype=torch.bool)].mean(), cosines[~same].mean()
        assert (within - across > 0.5) == apart and abs(vectors[40] @ vectors[:40].mean(0)) < 0.95


def test_what_has_no_neighbours_or_no_room_stays_random():
    tokens = classes(3000)
    data = TextBatches(tokens, 8, 5)
    small = Denoiser(ModelConfig(16, 8, SIZE))
    before = small.embedding.weight.clone()
    start_at_counts(small, TextBatches(tokens % 16, 8, 5))
    assert torch.equal(small.embedding.weight, before), "16 rows of width 16 are as good as orthogonal"
    torch.testing.assert_close(small.head.weight, 0.3 * before[:16])
    large = Denoiser(ModelConfig(60, 8, SIZE))
    mask = large.embedding.weight[60].clone()
    start_at_counts(large, data)
    assert torch.equal(large.embedding.weight[60], mask) and large.head.bias is None
    torch.testing.assert_close(large.head.weight, 0.3 * large.embedding.weight[:60])
    unseen = large.embedding.weight[40:60]
    assert (unseen @ unseen.T - torch.eye(20)).abs().max() < 0.95, "tokens that do not occur are not all the same"
    with torch.device("meta"):
        assert start_at_counts(Denoiser(ModelConfig(60, 8, SIZE)), data).embedding.weight.is_meta
    alone = start_at_counts(Denoiser(ModelConfig(60, 1, SIZE)), TextBatches(tokens, 1, 5))  # tokens without neighbours
    assert torch.isfinite(alone.embedding.weight).all()
