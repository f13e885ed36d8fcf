"""Check each measure against a second implementation, in plain Python or by another library. None shares a line."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.neighbors import NearestNeighbors

from cadd_min.codebench.scores import pass_at_k
from cadd_min.evaluation import image_judge, text_scores
from cadd_min.evaluation.bound import summary
from tests.toys import rng

IDS = torch.randint(9, (7, 40), generator=rng(0)) ** 2 % 9  # tokens of unequal rates
REAL, FAKE = (np.random.default_rng(n).normal(size=(90 + 40 * n, 5)) * [1, 2, 0.3, 1, n + 1] for n in (0, 1))


def grams(row: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]


def entropy(items: list) -> float:
    counts = Counter(items)
    return -sum(c / len(items) * math.log(c / len(items)) for c in counts.values())


def test_measures_of_tokens():
    rows = IDS.tolist()
    assert text_scores.unigram_entropy(IDS) == pytest.approx(sum(map(entropy, rows)) / len(rows))
    for n in (1, 2, 3):
        every = [gram for row in rows for gram in grams(row, n)]
        assert text_scores.ngram_entropy(IDS, n) == pytest.approx(entropy(every))
        assert text_scores.distinct_n(IDS, n) == pytest.approx(len(set(every)) / len(every))
    repeated = [1 - len(set(grams(row, 4))) / len(grams(row, 4)) for row in rows]
    assert text_scores.repetition(IDS) == pytest.approx(sum(repeated) / len(rows))


def test_the_error_of_a_ratio_is_that_of_the_jackknife():
    """The two estimators differ by terms of order 1 / N: by 2% here."""
    above, below = np.random.default_rng(0).gamma(4, 2, 400), np.random.default_rng(1).gamma(9, 1, 400)
    value, error = text_scores.ratio(above, below)
    left_out = (above.sum() - above) / (below.sum() - below)
    jackknife = math.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    assert value == pytest.approx(above.sum() / below.sum()) and error == pytest.approx(jackknife, rel=0.02)


def test_the_frechet_distance():
    root = linalg.sqrtm(np.cov(REAL.T) @ np.cov(FAKE.T)).real
    expected = ((REAL.mean(0) - FAKE.mean(0)) ** 2).sum() + np.trace(np.cov(REAL.T) + np.cov(FAKE.T) - 2 * root)
    assert image_judge.frechet_distance(torch.tensor(REAL), torch.tensor(FAKE)) == pytest.approx(expected)


def test_precision_and_recall():
    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        radius = NearestNeighbors(n_neighbors=4).fit(centres).kneighbors(centres)[0][:, 3]
        return float(np.mean([(np.linalg.norm(centres - point, axis=1) <= radius + 1e-9).any() for point in points]))

    found = image_judge.precision_recall(torch.tensor(REAL), torch.tensor(FAKE))
    assert found == pytest.approx((covered(FAKE, REAL), covered(REAL, FAKE))) and 0.1 < min(found) < max(found) < 1


def test_class_entropies():
    logits = torch.randn(50, 6, generator=rng(1), dtype=torch.float64)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    h = lambda q: -(q * np.log(q)).sum()
    assert image_judge.class_entropies(logits) == pytest.approx((h(p.mean(0)), np.mean([h(q) for q in p])))


def test_the_bound_and_its_error():
    nats = torch.rand(30, 2, generator=rng(2), dtype=torch.float64)
    row, whole = summary(nats, 3.0), nats.numpy().sum(1) / 3
    assert row["bound"] == pytest.approx(whole.mean())
    assert row["standard error"] == pytest.approx(whole.std(ddof=1) / math.sqrt(30))
    assert row["of it tokens"] + row["of it latents"] == pytest.approx(row["bound"])


def test_pass_at_k():
    """Compare with the share of all subsets of k of n programs that hold a right program."""
    from itertools import combinations

    for n, right, k in ((5, 2, 3), (6, 0, 2), (6, 5, 2), (4, 1, 4)):
        subsets = list(combinations([True] * right + [False] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
