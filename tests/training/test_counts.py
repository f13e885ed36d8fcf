"""The start at the counts of a corpus, against loops over its tokens."""

import math
from collections import Counter

import numpy as np
import torch

from cadd_min.dit import Size
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.training.counts import ppmi, start_at_counts, word_vectors

SIZE = Size(layers=1, width=16, heads=2, cond=8)


def classes(count: int, seed: int = 0) -> np.ndarray:
    """Draw tokens 0 to 39 of a corpus in which a token of class k = v // 10 is followed by class k + 1 or k, at random.

    Tokens of one class have the same neighbours.
    """
    rng = np.random.default_rng(seed)
    kind = np.cumsum(rng.random(count) < 0.7) % 4
    return (10 * kind + rng.integers(10, size=count)).astype(np.uint16)


def test_a_new_model_of_text_knows_the_unigram_law():
    tokens = np.random.default_rng(0).choice(40, 5000, p=np.arange(1, 41) / 820).astype(np.uint16)
    law = np.bincount(tokens, minlength=40) / 5000
    model = start_at_counts(Denoiser(ModelConfig(40, 8, SIZE, model="mdlm", head_bias=True)), tokens)
    model.head.weight.data.zero_()
    x_t, t = torch.full((2, 8), 40), torch.tensor([0.2, 1.0])
    p = model(x_t, torch.zeros(2, 8, 0), t).softmax(-1)
    torch.testing.assert_close(p[1, 3].double(), torch.from_numpy((5000 * law + 1) / 5040), atol=1e-6, rtol=1e-5)


def test_ppmi_is_the_definition():
    tokens = np.random.default_rng(1).integers(6, size=300) ** 2 // 6  # 0 to 4
    pairs: Counter = Counter()
    for i, v in enumerate(tokens):
        for d, weight in ((1, 1.0), (2, 0.5)):
            if i + d < len(tokens):
                pairs[int(v), int(tokens[i + d])] += weight
    total = sum(pairs.values())
    got = ppmi(torch.from_numpy(tokens), 7).to_dense()
    for v in range(7):
        for w in range(7):
            before, behind = (sum(n for pair, n in pairs.items() if pair[k] == u) for k, u in ((0, v), (1, w)))
            n = pairs[v, w]
            assert math.isclose(got[v, w], max(0, math.log(n * total / (before * behind))) if n else 0, abs_tol=1e-5)


def test_tokens_with_the_same_neighbours_get_close_vectors():
    """Compare cosines within a class and across. In a shuffled corpus, where no token predicts another, they agree."""
    torch.manual_seed(0)
    for corpus, apart in ((classes(20_000), True), (np.random.default_rng(2).permutation(classes(20_000)), False)):
        vectors = word_vectors(torch.from_numpy(corpus.astype(np.int64)), 41, 8)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(41))
        cosines, kind = vectors[:40] @ vectors[:40].T, torch.arange(40) // 10
        same = kind[:, None] == kind
        within, across = cosines[same & ~torch.eye(40, dtype=torch.bool)].mean(), cosines[~same].mean()
        assert (within - across > 0.5) == apart and abs(vectors[40] @ vectors[:40].mean(0)) < 0.95


def test_what_has_no_neighbours_or_no_room_stays_random():
    tokens = classes(3000)
    small = Denoiser(ModelConfig(16, 8, SIZE))
    before = small.embedding.weight.clone()
    start_at_counts(small, tokens % 16)
    assert torch.equal(small.embedding.weight, before), "16 rows of width 16 are as good as orthogonal"
    large = Denoiser(ModelConfig(60, 8, SIZE))
    mask = large.embedding.weight[60].clone()
    start_at_counts(large, tokens)
    assert torch.equal(large.embedding.weight[60], mask) and large.head.bias is None
    torch.testing.assert_close(large.head.weight, 0.3 * large.embedding.weight[:60])
    unseen = large.embedding.weight[40:60]
    assert (unseen @ unseen.T - torch.eye(20)).abs().max() < 0.95, "tokens that do not occur are not all the same"
    with torch.device("meta"):
        assert start_at_counts(Denoiser(ModelConfig(60, 8, SIZE)), tokens).embedding.weight.is_meta
