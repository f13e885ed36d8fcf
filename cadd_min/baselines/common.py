"""What the baselines share: where a chain starts, how its tokens are drawn, what a watcher sees."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cadd_min.errors import InputError
from cadd_min.loss import LOGITS
from cadd_min.model import Denoiser
from cadd_min.reverse import draw, token_probs
from cadd_min.sampler import Step

Temperature = float | Callable[[float], float]


def features(model: Denoiser, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
    """(B, L, F) of a model without a latent: x_t (B, L), t (B,), label (B,) or None."""
    return model.features(x_t, torch.zeros(*x_t.shape, 0, device=x_t.device), t.float(), label)


def logits_of(rows: Tensor, head: Tensor) -> Tensor:
    """(N, F), (V, F) -> (N, V), float32 at least."""
    return (rows @ head.to(rows.dtype).T).to(torch.promote_types(rows.dtype, torch.float32))


def chunk_rows(head: Tensor) -> int:
    """How many rows of V logits to hold at once."""
    return max(512, LOGITS // len(head))


def check_steps(steps: int | None) -> None:
    """A number of steps, or None for continuous time."""
    if steps is not None and steps < 1:
        raise InputError(f"steps must be a positive number or None (continuous time), not {steps}")


def start(shape: tuple[int, int], mask_id: int, prompt: Tensor | None, top_p: float, device: torch.device) -> Tensor:
    """(B, L) of mask_id, but where the prompt gives a token.

    Raises: InputError for a prompt of another shape or with numbers that are no tokens, and for top_p out of range.
    """
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], not {top_p}")
    if prompt is None:
        return torch.full(shape, mask_id, device=device)
    if tuple(prompt.shape) != tuple(shape):
        raise InputError(f"prompt must have the shape {tuple(shape)} of the samples, not {tuple(prompt.shape)}")
    if not ((0 <= prompt) & (prompt <= mask_id)).all():
        raise InputError(f"prompt must hold token ids, or {mask_id} where free")
    return prompt.to(device, torch.int64, copy=True)


def time_grid(steps: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(t, s) of each of `steps` equal steps from 1 to 0, float64 scalars."""
    check_steps(steps)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device)
    return list(zip(times[:-1], times[1:]))


def heat(temperature: Temperature, t: float) -> float:
    """The temperature at time t."""
    tau = temperature(t) if callable(temperature) else temperature
    if not 0 <= tau < math.inf:
        raise InputError(f"temperature must be 0 or more, not {tau}")
    return tau


def draw_tokens(logits: Tensor, mask_id: int, tau: float, top_p: float, u: Tensor) -> Tensor:
    """One token a row from softmax(logits / tau) within top_p: logits (N, V), uniforms u (N,) -> (N,)."""
    return draw(token_probs(logits[None], mask_id, tau, top_p), u)


def seen(number: int, t: float, s: float, x: Tensor, fresh: Tensor, belief: Tensor) -> Step:
    """The `Step` of a model without latents; belief (B, L) the tokens that it finds most probable."""
    return Step(number, t, s, x.clone(), torch.zeros(1, *x.shape, 0, device=x.device), fresh, lambda: belief)
