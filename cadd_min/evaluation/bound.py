"""The likelihood bound of held-out data, with its standard error: of text and of images, of every model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cadd_min.baselines.dispatch import bound
from cadd_min.model import Model
from cadd_min.objective import Batch
from cadd_min.utils.device import autocast, seeded


def held_out_bound(
    model: Model, batches: Iterable[Batch], *, steps: int | None, repeat: int, seed: int, dtype: str
) -> Tensor:
    """(N, 2) float64 nats of each held-out sequence, its discrete and continuous part, averaged over `repeat` draws.

    A sequence's draws are averaged first: they are not independent of each other, sequences are. steps: of the discrete
    chain, or None for continuous time.
    """
    nats = []
    for index, batch in enumerate(tqdm(list(batches), desc="bound", unit="batch", leave=False)):
        draws = []
        for n in range(repeat):
            generator = seeded(seed, index * repeat + n, model.device)
            with autocast(model.device, dtype):
                parts = bound(model, batch.to(model.device), steps=steps, generator=generator)
            draws.append(torch.stack([*parts], -1).double())  # (B, 2)
        nats.append(torch.stack(draws).mean(0))
    return torch.cat(nats)


def summary(nats: Tensor, per: float) -> dict[str, float]:
    """Mean bound, its standard error over sequences and its two parts, of (N, 2) nats, each divided by `per`."""
    whole = nats.sum(-1) / per
    error = float(whole.std() / math.sqrt(len(whole))) if len(whole) > 1 else math.nan
    discrete, continuous = (nats.mean(0) / per).tolist()
    return {
        "bound": float(whole.mean()),
        "standard error": error,
        "of it tokens": discrete,
        "of it latents": continuous,
    }


def report(rows: dict[str, Any], how: str) -> str:
    """A measure a line, and last of what and how."""
    width = max(map(len, rows)) + 2
    shown = (f"{value:.4f}" if isinstance(value, float) else str(value) for value in rows.values())
    return "\n".join([*(f"{name:{width}}{value}" for name, value in zip(rows, shown)), how])
