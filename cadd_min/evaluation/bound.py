"""The likelihood bound of held-out data with its standard error, for text and images and for every model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cadd_min.baselines.dispatch import bound
from cadd_min.model import Model
from cadd_min.objective import Batch
from cadd_min.utils.device import autocast, seeded

Models = dict[Path, tuple[Model, Any, dict[str, Any]]]  # by the checkpoint: model, codec, all else in the checkpoint


def held_out_bound(
    model: Model, batches: Iterable[Batch], *, steps: int | None, repeat: int, seed: int, dtype: str
) -> Tensor:
    """Measure the bound of each held-out sequence in nats: its discrete and continuous part, (N, 2) float64.

    Each row is the mean over `repeat` draws of times and noise. Draws of one sequence depend on each other, so a
    standard error is over sequences only. steps: the steps of the discrete chain, or None for continuous time.
    """
    nats = []
    for index, batch in enumerate(tqdm(list(batches), desc="bound", unit="batch", leave=False)):
        batch, draws = batch.to(model.device), []
        for n in range(repeat):
            generator = seeded(seed, index * repeat + n, model.device)
            with autocast(model.device, dtype):
                parts = bound(model, batch, steps=steps, generator=generator)
            draws.append(torch.stack([*parts], -1).double())  # (B, 2)
        nats.append(torch.stack(draws).mean(0))
    return torch.cat(nats)


def summary(nats: Tensor, per: float) -> dict[str, float]:
    """Average nats (N, 2), divided by `per`: the bound, its standard error over sequences, and its two parts."""
    bounds = nats.sum(-1) / per  # (N,)
    error = float(bounds.std() / math.sqrt(len(bounds))) if len(bounds) > 1 else math.nan
    discrete, continuous = (nats.mean(0) / per).tolist()
    return {
        "bound": float(bounds.mean()),
        "standard error": error,
        "of it tokens": discrete,
        "of it latents": continuous,
    }


def report(rows: dict[str, Any], caption: str) -> str:
    """Write one measure a line, and as the last line `caption`: what was measured, and with which settings."""
    width = max(map(len, rows)) + 2
    values = (f"{value:.4f}" if isinstance(value, float) else str(value) for value in rows.values())
    return "\n".join([*(f"{name:{width}}{value}" for name, value in zip(rows, values)), caption])
