"""What the field measures of samples of text: how likely a judge finds them, how varied they are, how like real text.

No one figure tells good text: repeating itself pleases a judge and lowers the entropy, noise does the reverse. So all
go into one row, and the same code makes the row of real text that the others are to be read beside. Samples are ids
(N, L); what counts distinct n-grams depends on N and L, and compares only rows that have the same.
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

# MAUVE compares histograms of a tenth as many cells as there are samples: from 50 on there are five, and with fewer too
# few to see that a kind of text is missing. Its authors use 5,000 samples; two sets of 50 of one law get 0.97 +- 0.03.
MAUVE_LEAST = 50


class Judge(Protocol):
    """What `score` asks of a judge; `text_judge.LanguageJudge` is one."""

    def read(self, texts: list[str]) -> Reading: ...


def unigram_entropy(ids: Tensor) -> float:
    """Nats: the entropy of each sample's own tokens (N, L), averaged over samples, as papers report it.

    It is at most log L, whatever the vocabulary.
    """
    _check(ids, 1)
    return sum(_entropy(sample) for sample in ids) / len(ids)


def ngram_entropy(ids: Tensor, n: int) -> float:
    """Nats: the entropy of the n-grams of all samples (N, L) together, by their shares; too low where they are few."""
    return _entropy(_ngrams(ids, n))


def distinct_n(ids: Tensor, n: int) -> float:
    """Distinct n-grams of all samples (N, L) over the number of n-grams (Li et al. 2016)."""
    grams = _ngrams(ids, n)
    return grams.unique().numel() / grams.numel()


def repetition(ids: Tensor, n: int = 4) -> float:
    """Share of a sample's n-grams that it has had before, averaged over samples (seq-rep-n, Welleck et al. 2020)."""
    again = _ngrams(ids, n).sort(1).values.diff(dim=1) == 0
    return float(again.sum()) / (len(ids) * (ids.shape[1] - n + 1))


def _entropy(values: Tensor) -> float:
    counts = values.unique(return_counts=True)[1].double()
    return float(torch.special.entr(counts / counts.sum()).sum())


def _ngrams(ids: Tensor, n: int) -> Tensor:
    """(N, L - n + 1) labels, equal where the n-grams are: one token at a time, so that no product overflows."""
    _check(ids, n)
    count = ids.shape[1] - n + 1
    labels, size = ids[:, :count].long(), int(ids.max()) + 1
    for place in range(1, n):
        labels = (labels * size + ids[:, place : place + count]).unique(return_inverse=True)[1]
    return labels


def _check(ids: Tensor, n: int) -> None:
    if n < 1:
        raise InputError(f"n-grams have one token at least, not {n}")
    if ids.ndim != 2 or not len(ids):
        raise InputError(f"samples must be token ids (N, L) with one sample at least, not of shape {tuple(ids.shape)}")
    if ids.shape[1] < n:
        raise InputError(f"samples must have {n} tokens at least to have a {n}-gram, not {ids.shape[1]}")


def mauve(samples: np.ndarray, real: np.ndarray, seed: int = 0) -> float:
    """MAUVE (Pillutla et al. 2021) of a judge's features (N, F) and (M, F): 1 is alike, 0 has nothing in common.

    By the authors' package with its defaults; seed starts its k-means. Raises InputError without the package, or with
    fewer than MAUVE_LEAST of either.
    """
    if min(len(samples), len(real)) < MAUVE_LEAST:
        raise InputError(
            f"MAUVE needs {MAUVE_LEAST} samples and as many real texts, not {len(samples)} and {len(real)}"
        )
    _find_mauve()
    from mauve import compute_mauve

    with _quiet():  # faiss, in C++, warns of every k-means with fewer than 39 points a cell, which MAUVE's always is
        return float(compute_mauve(p_features=samples, q_features=real, verbose=False, seed=seed).mauve)


def _find_mauve() -> None:
    if importlib.util.find_spec("mauve") is None:
        raise InputError("MAUVE needs its package: pip install mauve-text faiss-cpu")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the process' standard error; Python's exceptions still come through."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """sum(above) / sum(below) over samples, (N,) each, and its standard error; NaN of one sample.

    The error is the ratio estimator's (Cochran 1977, 6.4): N / (N - 1) sum (above - ratio below)^2 / (sum below)^2, the
    root of it. Samples are independent, their tokens are not, so nothing is said of tokens.
    """
    value, count = above.sum() / below.sum(), len(above)
    if count < 2:
        return float(value), float("nan")
    spread = np.square(above - value * below).sum() * count / (count - 1)
    return float(value), float(np.sqrt(spread) / below.sum())


def check(ids: Tensor) -> None:
    """Raise InputError where `score` of ids (N, L) as many would, so that no judge reads for nothing."""
    _check(ids, 4)
    if len(ids) >= MAUVE_LEAST:
        _find_mauve()


def score(texts: list[str], ids: Tensor, judge: Judge, reference: np.ndarray | None = None) -> dict[str, float]:
    """One row: of samples as texts (N) and the same as ids (N, L), or of real text, which is the row to compare with.

    judge_bpc is bits a character, judge_ppl perplexity a token of the judge's, all samples' together, _se their
    standard errors (`ratio`; the perplexity's is that of its logarithm times itself), left out of one sample.
    reference: the judge's features (M, F) of real text, other than that being scored; "mauve" is left out without it,
    or with fewer than MAUVE_LEAST of either. Raises InputError with no samples, or fewer than four tokens a sample.
    """
    _check(ids, 4)
    if len(texts) != len(ids):
        raise InputError(f"texts and ids must be of the same samples, not {len(texts)} and {len(ids)}")
    found = judge.read(texts)
    row = _judged(found) | {"entropy": unigram_entropy(ids)}
    row |= {f"entropy_{n}": ngram_entropy(ids, n) for n in (2, 3)}
    row |= {f"distinct_{n}": distinct_n(ids, n) for n in (1, 2, 3)}
    row["repetition"] = repetition(ids)
    if reference is not None and min(len(texts), len(reference)) >= MAUVE_LEAST:
        row["mauve"] = mauve(found.features, reference)
    return row


def _judged(found: Reading) -> dict[str, float]:
    bits, bits_se = ratio(found.nats / np.log(2), found.characters)
    nats, nats_se = ratio(found.nats, found.tokens)
    perplexity = float(np.exp(nats))
    row = {"judge_bpc": bits, "judge_ppl": perplexity}
    if len(found.nats) > 1:
        row |= {"judge_bpc_se": bits_se, "judge_ppl_se": perplexity * nats_se}
    return row
