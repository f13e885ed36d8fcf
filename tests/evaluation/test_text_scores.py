"""The measures of text against sources with known values, and against values computed by hand."""

import math

import numpy as np
import pytest
import torch

from cadd_min.evaluation import text_scores
from cadd_min.evaluation.text_judge import Reading
from cadd_min.evaluation.text_scores import distinct_n, mauve, ngram_entropy, ratio, repetition, score, unigram_entropy
from cadd_min.utils.errors import InputError
from tests.toys import ALPHA, rng


def zipf(k: int) -> torch.Tensor:
    weights = 1 / torch.arange(1, k + 1, dtype=torch.float64)
    return weights / weights.sum()


def normal_quantile(p: float) -> float:
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * p - 1, dtype=torch.float64)))


def test_entropy_of_every_token_equally_often_is_log_k():
    ids = torch.stack([torch.randperm(24, generator=rng(i)) % 8 for i in range(5)])
    assert unigram_entropy(ids) == pytest.approx(math.log(8)) == pytest.approx(ngram_entropy(ids, 1))
    assert unigram_entropy(torch.zeros(3, 9, dtype=torch.long)) == 0
    constant = torch.arange(4).repeat_interleave(6).view(4, 6)  # entropy 0 in each sample, log 4 in all together
    assert unigram_entropy(constant) == 0 and ngram_entropy(constant, 3) == pytest.approx(math.log(4))


def test_entropy_of_a_zipf_source_is_found_and_a_flatter_source_is_not():
    """Check the plug-in entropy of M draws from k tokens: normal about H - (k - 1) / 2M with variance Var(log p) / M.

    A correct estimate fails this two-sided check with probability ALPHA. Draws from p^0.97 must fail it.
    """
    p, count = zipf(50), 200_000
    truth = float(torch.special.entr(p).sum())
    sd = math.sqrt((float((p * p.log().square()).sum()) - truth**2) / count)
    bound = normal_quantile(1 - ALPHA / 2) * sd

    def error(law: torch.Tensor) -> float:
        ids = torch.multinomial(law, count, replacement=True, generator=rng(0)).view(400, 500)
        return abs(ngram_entropy(ids, 1) - (truth - (len(p) - 1) / (2 * count)))

    assert error(p) < bound < error(p**0.97 / (p**0.97).sum())


def test_entropy_of_pairs_is_twice_that_of_independent_tokens_and_no_more_where_the_next_is_certain():
    ids = torch.randint(4, (50, 2000), generator=rng(0))
    assert ngram_entropy(ids, 2) == pytest.approx(2 * math.log(4), abs=1e-3)
    ring = (torch.arange(41)[None] + torch.arange(4)[:, None]) % 4
    assert (
        ngram_entropy(ring, 1)
        == pytest.approx(ngram_entropy(ring, 3), abs=1e-3)
        == pytest.approx(math.log(4), abs=1e-3)
    )


def test_distinct_and_repetition_by_hand():
    ids = torch.tensor([[1, 2, 1, 2, 1, 2], [3, 3, 3, 3, 1, 2]])
    assert distinct_n(ids, 1) == 3 / 12
    assert distinct_n(ids, 2) == 4 / 10  # 12, 21; 33, 31
    assert distinct_n(ids, 6) == 1
    assert repetition(ids, 2) == pytest.approx((3 / 5 + 2 / 5) / 2)
    assert repetition(ids, 1) == pytest.approx((4 / 6 + 3 / 6) / 2)
    assert repetition(ids, 6) == 0


def test_ngrams_of_a_large_vocabulary_are_not_confused():
    """Check 6-grams against Python's sets: 50,257^5 overflows 64 bits, which could give two n-grams one label."""
    ids = torch.randint(50_257, (20, 100), generator=rng(0), dtype=torch.int32)
    assert distinct_n(ids, 6) == len({tuple(row[i : i + 6]) for row in ids.tolist() for i in range(95)}) / (20 * 95)
    assert distinct_n(torch.cat([ids, ids]), 6) == pytest.approx(distinct_n(ids, 6) / 2)


def test_mauve_is_one_of_a_set_with_itself_and_zero_of_noise(capfd):
    real = torch.randn(200, 16, generator=rng(0)).numpy() + 8 * np.eye(16, dtype=np.float32)[np.arange(200) % 2]
    alike = torch.randn(200, 16, generator=rng(1)).numpy() + 8 * np.eye(16, dtype=np.float32)[np.arange(200) % 2]
    noise = torch.randn(200, 16, generator=rng(2)).numpy() - 8 * np.eye(16, dtype=np.float32)[2]
    assert mauve(real, real) > 0.99
    assert mauve(noise, real) < 0.05
    missing = mauve(alike[::2], real)  # samples of only one of two kinds of text
    assert mauve(noise, real) < missing < 0.9 < mauve(alike, real)
    assert mauve(alike, real, seed=3) == mauve(alike, real, seed=3)
    assert capfd.readouterr() == ("", "")


def test_mauve_of_too_few_and_without_its_package(monkeypatch):
    few = np.zeros((text_scores.MAUVE_LEAST - 1, 4))
    with pytest.raises(InputError, match="MAUVE needs 50 samples and as many real texts, not 49 and 60"):
        mauve(few, np.zeros((60, 4)))
    monkeypatch.setattr(text_scores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install mauve-text faiss-cpu"):
        mauve(np.zeros((60, 4)), np.zeros((60, 4)))
    text_scores.check(torch.zeros(49, 4, dtype=torch.long))
    with pytest.raises(InputError, match="pip install mauve-text faiss-cpu"):  # before a judge reads
        text_scores.check(torch.zeros(50, 4, dtype=torch.long))


def test_the_standard_error_of_a_ratio_is_the_spread_of_repeated_ratios():
    """Compare the deviation over 2,000 sets of 100 correlated pairs with the mean standard error, to a twentieth."""
    lengths = 20 + torch.rand(2000, 100, generator=rng(0), dtype=torch.float64) * 80
    nats = lengths * (2 + 0.3 * torch.randn(2000, 100, generator=rng(1), dtype=torch.float64))
    values, errors = np.array([ratio(a, b) for a, b in zip(nats.numpy(), lengths.numpy())]).T
    assert values.mean() == pytest.approx(2, abs=0.01)
    assert errors.mean() == pytest.approx(values.std(), rel=0.05)
    value, error = ratio(np.array([6.0]), np.array([3.0]))
    assert value == 2 and math.isnan(error)


class Stub:
    """A judge whose characters cost log 2 nats each, and whose tokens have two characters."""

    def read(self, texts: list[str]) -> Reading:
        lengths = np.array([len(text) for text in texts])
        features = np.array([[len(text), text.count("a")] for text in texts], dtype=np.float32)
        return Reading(lengths * math.log(2), lengths // 2, lengths, features)


def test_one_row_of_all_and_what_is_left_out():
    ids = torch.randint(5, (60, 8), generator=rng(0))
    texts = ["".join("abcde"[i] for i in row) for row in ids.tolist()]
    row = score(texts, ids, Stub())
    assert row["judge_bpc"] == pytest.approx(1) and row["judge_ppl"] == pytest.approx(4)
    assert row["judge_bpc_se"] == pytest.approx(0, abs=1e-9) and row["judge_ppl_se"] == pytest.approx(0, abs=1e-9)
    assert row["entropy"] == unigram_entropy(ids) and row["distinct_3"] == distinct_n(ids, 3)
    names = {"judge_bpc", "judge_bpc_se", "judge_ppl", "judge_ppl_se", "entropy", "entropy_2", "entropy_3"}
    names |= {"distinct_1", "distinct_2", "distinct_3", "repetition"}
    assert set(row) == names
    features = Stub().read(texts).features
    assert set(score(texts, ids, Stub(), features)) == names | {"mauve"}
    assert score(texts, ids, Stub(), features)["mauve"] > 0.99
    assert set(score(texts, ids, Stub(), features[:49])) == names
    assert set(score(texts[:1], ids[:1], Stub())) == names - {"judge_bpc_se", "judge_ppl_se"}


@pytest.mark.parametrize(
    ("texts", "ids", "message"),
    [
        ([], torch.zeros(0, 8), "one sample at least"),
        (["abc"], torch.zeros(1, 3), "samples must have 4 tokens at least to have a 4-gram, not 3"),
        (["a", "b"], torch.zeros(1, 8), "of the same samples, not 2 and 1"),
        (["a"], torch.zeros(8), "token ids"),
    ],
)
def test_bad_input_is_one_sentence(texts, ids, message):
    with pytest.raises(InputError, match=message):
        score(texts, ids.long(), Stub())
    with pytest.raises(InputError, match="one token at least"):
        distinct_n(torch.zeros(1, 8, dtype=torch.long), 0)
