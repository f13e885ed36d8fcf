"""What the baselines share: features, logits, draws of tokens, and the step that a callback gets."""

from __future__ import annotations

import torch
from torch import Tensor

from cadd_min.model import Model
from cadd_min.reverse import draw, token_probs
from cadd_min.sampler import Step


def features(model: Model, x_t: Tensor, t: Tensor) -> Tensor:
    """Compute the features (B, L, F) of a model without a latent. Args: x_t (B, L); t (B,)."""
    return model.features(x_t, torch.zeros(*x_t.shape, 0, device=x_t.device), t.float())


def logits_of(rows: Tensor, head: Tensor) -> Tensor:
    """Compute logits (N, V), float32 at least, from features `rows` (N, F) and head (V, F)."""
    return (rows @ head.to(rows.dtype).T).to(torch.promote_types(rows.dtype, torch.float32))


def draw_tokens(logits: Tensor, mask_id: int, tau: float, top_p: float, u: Tensor) -> Tensor:
    """Draw a token for each row from softmax(logits / tau) within top_p: logits (N, V), uniforms u (N,) -> (N,)."""
    return draw(token_probs(logits[None], mask_id, tau, top_p), u)


def step_without_latents(number: int, t: float, s: float, x: Tensor, fresh: Tensor, belief: Tensor) -> Step:
    """Make the `Step` that a callback gets from a model without latents.

    belief (B, L): the tokens that the model finds most probable.
    """
    return Step(number, t, s, x.clone(), torch.zeros(1, *x.shape, 0, device=x.device), fresh, lambda: belief)
