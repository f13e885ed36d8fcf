"""The autoregressive model (as GPT, Radford et al. 2018): each token is predicted from the tokens before it.

    p(x_0) = product over i of p(x_0^i | x_0^1, ..., x_0^(i-1))

The network is causal, and its input is x_0 shifted by one position. The likelihood is exact, not a bound: the bounds
of the diffusion models are compared with it.

Shapes: tokens (B, L), features (B L, F), head (V, F).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from cadd_min.baselines.common import draw_tokens, features, logits_of, step_without_latents
from cadd_min.kernels import philox
from cadd_min.loss import Bound, token_losses
from cadd_min.model import Model
from cadd_min.objective import Batch, Loss, Objective
from cadd_min.orders import Sampling
from cadd_min.sampler import Step


def shifted(x_0: Tensor, mask_id: int) -> Tensor:
    """Shift tokens by one position: the mask for the beginning, then every token but the last. (B, L) -> (B, L)."""
    return torch.cat([torch.full_like(x_0[:, :1], mask_id), x_0[:, :-1]], 1)


def causal_features(model: Model, x_0: Tensor) -> Tensor:
    """Compute the features (B L, F) that predict each token from the tokens to its left. t is 0: nothing is noisy."""
    return features(model, shifted(x_0, model.mask_id), torch.zeros(len(x_0), device=x_0.device)).flatten(0, 1)


def training_loss(model: Model, batch: Batch, u: Tensor, objective: Objective, generator: Generator) -> Loss:
    """Compute -log p(x_0) per token, in nats. There is no noise: `u`, `objective` and `generator` are ignored.

    All positions count as masked, and the squared error is zero.
    """
    x_0 = batch.x_0
    ce, _ = token_losses(causal_features(model, x_0), model.head_matrix(), x_0.flatten())  # (B L,)
    count = torch.tensor(x_0.numel(), device=x_0.device)
    return Loss(ce.mean(), ce.detach().sum(), count, ce.new_zeros(()))


@torch.no_grad()
def nelbo_parts(model: Model, x_0: Tensor, *, steps: int | None = None, generator: Generator | None = None) -> Bound:
    """Compute -log p(x_0), (B,) nats. The likelihood is exact: `steps` and `generator` are ignored."""
    nats, _ = token_losses(causal_features(model, x_0), model.head_matrix(), x_0.flatten())
    discrete = nats.view_as(x_0).sum(-1)  # (B,)
    return Bound(discrete, torch.zeros_like(discrete))


@torch.no_grad()
def sample(
    model: Model, x: Tensor, settings: Sampling, seed: Tensor, callback: Callable[[Step], None] | None = None
) -> Tensor:
    """Draw x_0 (B, L) int64 from left to right, one forward pass for each position. The number of steps is ignored.

    Each pass runs over all tokens so far. Keys and values are not cached, so a sample costs as much as L / 2 steps of a
    diffusion model.
    Args: x (B, L): the given tokens, and mask_id where a token is to be drawn. Given tokens never change, and condition
    only the positions to their right. seed (2,): at offset 0. callback: gets a `Step` after each drawn position i of L,
    from t = 1 - i / L.
    """
    head, (batch, length) = model.head_matrix(), x.shape
    x = x.clone()
    time = torch.zeros(batch, device=head.device)
    starts = length * torch.arange(batch, device=head.device)  # the flat position of each sequence's first token
    for i in range(length):
        free = x[:, i] == model.mask_id  # (B,)
        if not free.any():
            continue
        logits = logits_of(features(model, shifted(x[:, : i + 1], model.mask_id), time)[:, -1], head)  # (B, V)
        t, s = 1 - i / length, 1 - (i + 1) / length
        _, u = philox.choices(seed, starts + i)
        x[free, i] = draw_tokens(logits[free], model.mask_id, settings.temperature_at(t), settings.top_p, u[free])
        if callback is not None:
            fresh = torch.zeros_like(x, dtype=torch.bool)
            fresh[:, i] = free
            callback(step_without_latents(i, t, s, x, fresh, x.clone()))
    return x
