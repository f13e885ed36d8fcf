"""Classifier-free guidance: a denoiser that knows what it is to draw (Ho & Salimans 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from cadd_min.model import Denoiser
from cadd_min.utils.errors import InputError

LARGEST = torch.finfo(torch.float32).max


class Guided:
    """The denoiser for labels (B,): logits = any + guidance (given - any), of "any class" and of the class given.

    0 is the unconditional model, 1 the conditional one, more exaggerates what sets the class apart.
    """

    def __init__(self, model: Denoiser, label: Tensor, guidance: float = 1.0):
        if not 0 <= guidance <= LARGEST:
            raise InputError(f"--guidance must be 0 or more, and not beyond float32, not {guidance}")
        self.model, self.label, self.guidance = model, label, guidance

    def logits_at(self, x_t: Tensor, z_t: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        """(N, V) logits at the flat positions `rows` (N,), or (B, L, V) at all. Of K latents, B is K times as large."""
        label = self.label.repeat(len(x_t) // len(self.label))

        def logits(label: Tensor | None) -> Tensor:
            if rows is None:
                return self.model(x_t, z_t, t, label)
            return self.model.logits_at(x_t, z_t, t, rows, label)

        if self.guidance == 0:
            return logits(None)
        given = logits(label)
        return given if self.guidance == 1 else logits(None).lerp(given, self.guidance)

    def __call__(self, x_t: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        return self.logits_at(x_t, z_t, t)
