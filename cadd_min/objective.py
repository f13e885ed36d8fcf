"""The training objective: the cross-entropy of masked tokens, and the squared error of z0_hat if `mse` is not 0.

    L = E_t E_q [ sum over masked i of a_t (-log p(x_0^i | x_t, z_t)) + mse b_t ||w[x_0^i] - z0_hat^i||^2 ] / length

a_t and b_t are 1 in the paper's loss, and Lemma 1's weights under "elbo".

Wrong hints are an addition to the paper. A network that trains only on true latents learns to trust the latent over the
other tokens. In sampling, the latent moves towards the network's own earlier estimates, which are often wrong. So in
training a share of the latents are those of random tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from cadd_min import ops
from cadd_min.loss import T_MIN, WEIGHTINGS, time_weights, token_losses
from cadd_min.model import Model
from cadd_min.utils.cli import option
from cadd_min.utils.errors import InputError, choose


class Batch(NamedTuple):
    """A micro-batch of data: the tokens, and what else is known of them."""

    x_0: Tensor  # (B, L) int64
    label: Tensor | None = None  # (B,) int64: the class of each sequence
    free: Tensor | None = None  # (B, L) bool: False for tokens that are given, never masked and never scored

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Copy the batch to memory from which a GPU can fetch it while the CPU goes on. On a GPU it stays as it is."""
        return self._each(lambda part: part if part.is_cuda else part.pin_memory())

    def scored(self) -> int:
        """Count the tokens that are scored."""
        return self.x_0.numel() if self.free is None else int(self.free.sum())

    def _each(self, f: Callable[[Tensor], Tensor]) -> Batch:
        x_0, label, free = self
        return Batch(f(x_0), None if label is None else f(label), None if free is None else f(free))


class Loss(NamedTuple):
    """The loss of a micro-batch, a scalar in nats per token, and its parts, detached sums."""

    total: Tensor
    ce: Tensor  # cross-entropy, summed over the masked positions
    masked: Tensor  # number of masked positions
    mse: Tensor  # squared error of z0_hat, summed over the masked positions


@dataclass(frozen=True)
class Objective:
    """What is minimised. The model's shape is in ModelConfig, the optimiser in TrainConfig."""

    weighting: str = option("uniform", "weights of the loss over t: uniform (the paper's) or elbo")
    mse: float = option(0.0, "weight of the squared error of z0_hat beside the CE (CE + MSE)")
    wrong_hints: float = option(0.1, "share of the latents that are a random token's: the network learns to doubt them")
    drop_latent: float = option(0.0, "share of the sequences that train without their latent")
    drop_label: float = option(0.1, "share of the sequences that train without their label (for guidance)")

    def __post_init__(self) -> None:
        choose("weighting", self.weighting, WEIGHTINGS)
        for name in ("wrong_hints", "drop_latent", "drop_label"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        if not 0 <= self.mse < float("inf"):
            raise InputError(f"mse must be 0 or more, not {self.mse}")


def with_wrong_hints(x_0: Tensor, share: float, vocab_size: int, generator: Generator) -> Tensor:
    """Replace a share of the tokens x_0 (B, L) by random tokens. The result chooses the rows of the table for z_0."""
    if share == 0:
        return x_0
    random = torch.randint(vocab_size, x_0.shape, generator=generator, device=x_0.device)
    wrong = torch.rand(x_0.shape, generator=generator, device=x_0.device) < share
    return torch.where(wrong, random, x_0)


def training_loss(model: Model, batch: Batch, u: Tensor, objective: Objective, generator: Generator) -> Loss:
    """Compute the loss L of the module's docstring, with one time per sequence.

    The sum is divided by B L, not by the number of masked positions, so that equal batches weigh the same.
    Args: u (B,) on (0, 1], the times; generator: of the masks, the noise and the wrong hints.
    """
    x_0, label, free = batch
    t = T_MIN + (1 - T_MIN) * u  # the elbo weights grow like 1/t, and faster, as t goes to 0
    schedule, table = model.schedule, model.table()
    hinted = with_wrong_hints(x_0, objective.wrong_hints, model.config.vocab_size, generator)
    x_t, z_t = ops.forward_noising(x_0, hinted, table, t, schedule, model.mask_id, ops.draw_seed(generator))
    x_t = x_t if free is None else torch.where(free, x_t, x_0)
    if objective.drop_latent > 0:
        z_t = z_t * _kept(len(x_0), objective.drop_latent, generator)[:, None, None]
    if label is not None and objective.drop_label > 0:  # one network learns p(x) beside p(x | label)
        label = torch.where(_kept(len(x_0), objective.drop_label, generator), label, model.config.classes)
    masked = x_t == model.mask_id if free is None else (x_t == model.mask_id) & free
    rows = masked.flatten().nonzero()[:, 0]  # (N,); the only look at a GPU's values in a step

    features = model.features(x_t, z_t, t.float(), label).flatten(0, 1)[rows]  # (N, F)
    w = table if objective.mse > 0 else None  # z0_hat is computed only for the MSE
    ce, mse = token_losses(features, model.head_matrix(), x_0.flatten()[rows], table=w, mask_id=model.mask_id)
    weights = time_weights(t, schedule, objective.weighting)  # (B,) each
    ce_weight, mse_weight = (weight[rows // x_0.shape[1]].float() for weight in weights)  # (N,) each
    total = (ce_weight * ce + objective.mse * mse_weight * mse).sum() / x_0.numel()
    return Loss(total, ce.detach().sum(), masked.sum(), mse.detach().sum())


def _kept(count: int, dropped: float, generator: Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device) >= dropped
