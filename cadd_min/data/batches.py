"""Micro-batches of text, lines, pairs and images: batches(index) is a pure function of (seed, index).

All four take their items in an order that is shuffled anew in each epoch, without replacement.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from cadd_min.data.pixels import Pixels
from cadd_min.data.token_folder import TokenView
from cadd_min.objective import Batch
from cadd_min.utils.errors import InputError


class EpochShuffle:
    """The order of `count` items, shuffled in each epoch by (seed, epoch). It takes 4 bytes an item.

    slack: each epoch also draws a shift from 0 to slack, by which a stream of tokens is cut at another place.
    """

    def __init__(self, count: int, seed: int, slack: int = 0):
        self.count, self.seed, self.slack = count, seed, slack
        self._last_epoch = functools.lru_cache(maxsize=1)(self.epoch)

    def __call__(self, n: int) -> tuple[int, int]:
        """Return the n-th item of the run, and its epoch's shift."""
        epoch, place = divmod(n, self.count)
        order, shift = self._last_epoch(epoch)
        return int(order[place]), shift

    def epoch(self, epoch: int) -> tuple[np.ndarray, int]:
        """Draw the order of an epoch, (count,) uint32, and its shift."""
        rng = np.random.default_rng((self.seed, epoch))
        shift, order = int(rng.integers(self.slack + 1)), np.arange(self.count, dtype=np.uint32)
        rng.shuffle(order)
        return order, shift


class TextBatches:
    """Sequences of `length` tokens (B, L) from a stream, which each epoch cuts at another place.

    Raises InputError where the stream is shorter than one sequence.
    """

    note = ""  # all tokens are taken

    def __init__(
        self, tokens: np.ndarray | TokenView, length: int, batch_size: int, seed: int = 0, name: str = "the corpus"
    ):
        if len(tokens) < length:
            raise InputError(f"{name} has {len(tokens)} tokens: fewer than one sequence of --length {length}")
        self.tokens, self.length, self.batch_size = tokens, length, batch_size
        self.per_epoch = max(1, len(tokens) // length - 1)
        self._shuffle = EpochShuffle(self.per_epoch, seed, len(tokens) - self.per_epoch * length)

    def __call__(self, index: int) -> Batch:
        x_0 = torch.empty(self.batch_size, self.length, dtype=torch.int64)  # first: too large a batch must fail at once
        for row in range(self.batch_size):
            place, shift = self._shuffle(index * self.batch_size + row)
            start = shift + place * self.length
            x_0.numpy()[row] = self.tokens[start : start + self.length]
        return Batch(x_0)


class RowBatches:
    """Lines of a stream as sequences (B, L): each ends with EOT, and is padded with EOT to `length` tokens.

    A line of more than length - 1 tokens is left out, which `note` says. Tokens behind the last EOT are of no line.
    Raises InputError where no line is left.
    """

    def __init__(
        self,
        tokens: np.ndarray | TokenView,
        length: int,
        batch_size: int,
        eot_id: int,
        seed: int = 0,
        name: str = "the corpus",
    ):
        ends = _places(tokens, eot_id) + 1  # (lines,)
        starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]  # (lines,)
        fits = ends - starts <= length
        self.starts, self.ends = starts[fits], ends[fits]  # (rows,)
        self.tokens, self.length, self.batch_size, self.eot_id = tokens, length, batch_size, eot_id
        self.per_epoch, longer = len(self.starts), len(ends) - len(self.starts)
        left_out = f"{name}: {longer:,} of {len(ends):,} lines longer than {length - 1} tokens are left out"
        self.note = left_out if longer else ""
        if not self.per_epoch:
            raise InputError(
                f"{name}: none of its {len(ends):,} lines fits --length {length} with the token of its end"
            )
        self._shuffle = EpochShuffle(self.per_epoch, seed)

    def __call__(self, index: int) -> Batch:
        x_0 = torch.full((self.batch_size, self.length), self.eot_id)  # first: too large a batch must fail at once
        for place in range(self.batch_size):
            row, _ = self._shuffle(index * self.batch_size + place)
            line = self.tokens[self.starts[row] : self.ends[row]]
            x_0.numpy()[place, : len(line)] = line
        return Batch(x_0)


def _places(tokens: np.ndarray | TokenView, token: int, block: int = 1 << 20) -> np.ndarray:
    """Return where a token stands in a stream, (N,) int64."""
    starts = range(0, len(tokens), block)
    found = [start + np.flatnonzero(tokens[start : start + block] == token) for start in starts]
    return np.concatenate([np.zeros(0, np.int64), *found])


def text_batches(
    tokens: np.ndarray | TokenView,
    length: int,
    batch_size: int,
    seed: int = 0,
    name: str = "the corpus",
    eot_id: int | None = None,
) -> TextBatches | RowBatches:
    """Make batches of a stream's lines, which end with `eot_id`, or without it of the stream itself."""
    if eot_id is None:
        return TextBatches(tokens, length, batch_size, seed, name)
    return RowBatches(tokens, length, batch_size, eot_id, seed, name)


class PairBatches:
    """Prompts with responses: x_0 (B, L), and free (B, L), which is False for the prompt's tokens.

    ids (N, L) int64 and starts (N,), where the responses begin: see `pairs.encode`.
    """

    def __init__(self, ids: np.ndarray, starts: np.ndarray, batch_size: int, seed: int = 0):
        self.ids, self.starts, self.batch_size = ids, starts, batch_size
        self._shuffle = EpochShuffle(len(ids), seed)

    def __call__(self, index: int) -> Batch:
        rows = [self._shuffle(n)[0] for n in range(index * self.batch_size, (index + 1) * self.batch_size)]
        start = torch.from_numpy(self.starts[rows])
        return Batch(torch.from_numpy(self.ids[rows]), free=torch.arange(self.ids.shape[1]) >= start[:, None])


class ImageBatches:
    """Images as tokens (B, L), with their labels (B,) where there are any. flip: mirror half of the images."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None,
        pixels: Pixels,
        batch_size: int,
        seed: int = 0,
        flip: bool = False,
    ):
        self.images, self.labels, self.pixels = images, labels, pixels
        self.batch_size, self.seed, self.flip = batch_size, seed, flip
        self._shuffle = EpochShuffle(len(images), seed)

    def __call__(self, index: int) -> Batch:
        rows = np.empty(self.batch_size, np.int64)  # first: too large a batch must fail at once
        for place in range(self.batch_size):
            rows[place] = self._shuffle(index * self.batch_size + place)[0]
        images = self.images[rows]
        if self.flip:
            mirrored = np.random.default_rng((self.seed, index, 1)).random(len(rows)) < 0.5
            images[mirrored] = images[mirrored, :, ::-1]
        label = None if self.labels is None else torch.from_numpy(self.labels[rows].astype(np.int64))
        return Batch(self.pixels.encode(images), label)
