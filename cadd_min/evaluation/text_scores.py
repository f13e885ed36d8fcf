"""The field's measures of samples of text: their likelihood under a judge, their variety, their likeness to real text.

No single number measures text quality. Text that repeats itself scores well with a judge and has a low entropy; noise
is the opposite. So all measures stand in one row, and the same code makes the row of real text to compare with. Samples
are ids (N, L). Counts of distinct n-grams depend on N and L: compare them only between rows of equal N and L.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cadd_min.evaluation.text_judge import Reading
from cadd_min.utils.errors import InputError

# MAUVE compares histograms with one cell for ten samples. 50 samples give five cells; fewer cells cannot show that a
# kind of text is missing. Its authors use 5,000 samples. Two sets of 50 from the same distribution score 0.97 +- 0.03.
MAUVE_LEAST = 50


class Judge(Protocol):
    """The part of a judge that `score` needs. `text_judge.LanguageJudge` has it."""

    def read(self, texts: list[str]) -> Reading:
        """Score texts, and return what was found."""
        ...


def unigram_entropy(ids: Tensor) -> float:
    """Compute the entropy of the tokens in each sample of ids (N, L), in nats, averaged over samples.

    Papers report this entropy. It is at most log L, whatever the vocabulary.
    """
    _check(ids, 1)
    return sum(_entropy(sample) for sample in ids) / len(ids)


def ngram_entropy(ids: Tensor, n: int) -> float:
    """Compute the entropy of the n-grams of all samples (N, L) together, in nats.

    This is the plug-in estimate from the n-grams' shares. It is too low where there are few n-grams.
    """
    return _entropy(_ngrams(ids, n))


def distinct_n(ids: Tensor, n: int) -> float:
    """Compute the share of distinct n-grams among all n-grams of all samples (N, L) (Li et al. 2016)."""
    grams = _ngrams(ids, n)
    return grams.unique().numel() / grams.numel()


def repetition(ids: Tensor, n: int = 4) -> float:
    """Compute the share of a sample's n-grams that occur earlier in it, averaged over samples (N, L).

    This is seq-rep-n (Welleck et al. 2020).
    """
    repeated = _ngrams(ids, n).sort(1).values.diff(dim=1) == 0  # (N, L - n)
    return float(repeated.sum()) / (len(ids) * (ids.shape[1] - n + 1))


def _entropy(values: Tensor) -> float:
    counts = values.unique(return_counts=True)[1].double()
    return float(torch.special.entr(counts / counts.sum()).sum())


def _ngrams(ids: Tensor, n: int) -> Tensor:
    """Label the n-grams of ids (N, L) with integers (N, L - n + 1): equal n-grams have equal labels.

    The labels are renumbered after each token, so that no product of vocabulary sizes overflows.
    """
    _check(ids, n)
    count = ids.shape[1] - n + 1
    labels, size = ids[:, :count].long(), int(ids.max()) + 1
    for offset in range(1, n):
        labels = (labels * size + ids[:, offset : offset + count]).unique(return_inverse=True)[1]
    return labels


def _check(ids: Tensor, n: int) -> None:
    if n < 1:
        raise InputError(f"n-grams have one token at least, not {n}")
    if ids.ndim != 2 or not len(ids):
        raise InputError(f"samples must be token ids (N, L) with one sample at least, not of shape {tuple(ids.shape)}")
    if ids.shape[1] < n:
        raise InputError(f"samples must have {n} tokens at least to have a {n}-gram, not {ids.shape[1]}")


def mauve(samples: np.ndarray, real: np.ndarray, seed: int = 0) -> float:
    """Compute MAUVE (Pillutla et al. 2021) of a judge's features (N, F) and (M, F).

    1 means alike, 0 means nothing in common. The authors' package computes it with its defaults; seed: of its k-means.
    Raises InputError without the package, or where N or M is below MAUVE_LEAST.
    """
    if min(len(samples), len(real)) < MAUVE_LEAST:
        raise InputError(
            f"MAUVE needs {MAUVE_LEAST} samples and as many real texts, not {len(samples)} and {len(real)}"
        )
    _find_mauve()
    from mauve import compute_mauve

    with _quiet():  # faiss warns in C++ of fewer than 39 points a cell, and MAUVE always has fewer
        return float(compute_mauve(p_features=samples, q_features=real, verbose=False, seed=seed).mauve)


def _find_mauve() -> None:
    if importlib.util.find_spec("mauve") is None:
        raise InputError("MAUVE needs its package: pip install mauve-text faiss-cpu")


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard what the process writes to standard error. Exceptions are still raised."""
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """Compute sum(above) / sum(below) over N samples, (N,) each, and its standard error. One sample has the error NaN.

    The squared error is N / (N - 1) sum (above - ratio below)^2 / (sum below)^2, that of the ratio estimator (Cochran
    1977, 6.4). It is over samples, which are independent. The tokens of a sample are not.
    """
    value, count = above.sum() / below.sum(), len(above)
    if count < 2:
        return float(value), float("nan")
    spread = np.square(above - value * below).sum() * count / (count - 1)
    return float(value), float(np.sqrt(spread) / below.sum())


def check(ids: Tensor) -> None:
    """Raise InputError where `score` of samples shaped like ids (N, L) would, before a judge reads in vain."""
    _check(ids, 4)
    if len(ids) >= MAUVE_LEAST:
        _find_mauve()


def score(texts: list[str], ids: Tensor, judge: Judge, reference: np.ndarray | None = None) -> dict[str, float]:
    """Compute the row of measures of N samples, given as texts (N) and as ids (N, L). Real text is scored alike.

    judge_bpc: bits per character over all samples. judge_ppl: perplexity per token of the judge's tokenizer. The keys
    judge_bpc_se and judge_ppl_se are standard errors (see `ratio`), left out for one sample. judge_ppl_se is the
    perplexity times the standard error of its logarithm. entropy, distinct and repetition are measured on ids.
    reference: the judge's features (M, F) of real text, which must not be the text that is scored. "mauve" is left out
    without it, or where N or M is below MAUVE_LEAST. Raises InputError without samples, where texts and ids differ in
    number, and for samples of fewer than four tokens.
    """
    _check(ids, 4)
    if len(texts) != len(ids):
        raise InputError(f"texts and ids must be of the same samples, not {len(texts)} and {len(ids)}")
    reading = judge.read(texts)
    row = _likelihood(reading) | {"entropy": unigram_entropy(ids)}
    row |= {f"entropy_{n}": ngram_entropy(ids, n) for n in (2, 3)}
    row |= {f"distinct_{n}": distinct_n(ids, n) for n in (1, 2, 3)}
    row["repetition"] = repetition(ids)
    if reference is not None and min(len(texts), len(reference)) >= MAUVE_LEAST:
        row["mauve"] = mauve(reading.features, reference)
    return row


def _likelihood(reading: Reading) -> dict[str, float]:
    bits, bits_se = ratio(reading.nats / np.log(2), reading.characters)
    nats, nats_se = ratio(reading.nats, reading.tokens)
    perplexity = float(np.exp(nats))
    row = {"judge_bpc": bits, "judge_ppl": perplexity}
    if len(reading.nats) > 1:
        row |= {"judge_bpc_se": bits_se, "judge_ppl_se": perplexity * nats_se}
    return row
