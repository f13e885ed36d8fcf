"""The reverse chain: from masks and noise to tokens, with any denoiser.

Each step asks the denoiser for p(x_0 | x_t, z_t), flips every masked position with probability rho_flip, draws a token
where it flipped, and elsewhere moves the latent towards an estimate z0_hat by Proposition 2. Flip first, then draw:
one (V + 1)-way draw with the mask as an outcome loses the tail in float32 as the steps grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cadd_min.errors import InputError, choose
from cadd_min.loss import Denoiser
from cadd_min.posterior import q_posterior_z
from cadd_min.schedule import NoiseSchedule

ZHATS = ("hard", "soft", "sample")
TIME_GRIDS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "cosine": lambda u: torch.sin(math.pi / 2 * u),  # few tokens first, many at the end (MaskGIT, Chang et al. 2022)
}
Temperature = float | Callable[[float], float]


class Step(NamedTuple):
    """What the callback sees after each step, from time t to s."""

    number: int  # from 0
    t: float
    s: float
    x: Tensor  # (B, L) tokens, mask_id where still masked
    z: Tensor  # (K, B, L, D) latents
    fresh: Tensor  # (B, L) bool: unmasked in this step


def cosine_temperature(start: float = 2.5, end: float = 1.0) -> Callable[[float], float]:
    """A temperature that falls from `start` at t = 1 to `end` at t = 0 along a half cosine (the paper's for images)."""
    return lambda t: end + (start - end) * (1 - math.cos(math.pi * t)) / 2


def token_probs(logits: Tensor, mask_id: int, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Mean over the K latents of softmax(logits / temperature), (K, N, V) -> (N, V), float32 at least.

    Probabilities are averaged, not logits: p(x_0 | x_t) is the expectation of p(x_0 | x_t, z_t) over z_t. The mask has
    probability zero, whatever its logit; temperature 0 is the limit, all mass on the largest logit. top_p < 1 keeps
    the smallest set of tokens whose probabilities reach it (Holtzman et al. 2020).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask_id < logits.shape[-1]:
        logits = logits.index_fill(-1, torch.tensor([mask_id], device=logits.device), -torch.inf)
    if temperature > 0:
        p = (logits / temperature).softmax(-1).mean(0)
    else:
        p = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype).mean(0)
    if not torch.isfinite(p.sum()):
        raise InputError("the denoiser returned logits that are NaN or all minus infinity")
    if top_p < 1:
        sorted_p, order = p.sort(-1, descending=True)
        outside = sorted_p.cumsum(-1) - sorted_p >= top_p
        p = p.scatter(-1, order, sorted_p.masked_fill(outside, 0))
        p = p / p.sum(-1, keepdim=True)
    return p


def draw(p: Tensor, u: Tensor, block: int = 256) -> Tensor:
    """One token a row by inverse CDF over block sums, from one uniform a row: (N, V), (N,) in [0, 1) -> (N,) int64.

    Sums are float64, so a token of probability 1e-7 is drawn at its rate; one of probability zero never is. Rows need
    not be normalised.
    """
    blocks = F.pad(p, (0, -p.shape[-1] % block)).unflatten(-1, (-1, block))
    cdf = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = u.double() * cdf[:, -1]
    chosen = (cdf <= target[:, None]).sum(-1, keepdim=True).clamp(max=cdf.shape[1] - 1)
    before = F.pad(cdf, (1, 0)).gather(1, chosen)[:, 0]
    inner = blocks.gather(1, chosen[..., None].expand(-1, 1, block))[:, 0].double().cumsum(-1)
    inside = (inner <= (target - before)[:, None]).sum(-1)
    last = inner.argmax(-1)  # the last token of the block with any mass: where rounding would step beyond it
    return chosen[:, 0] * block + torch.minimum(inside, last)


def estimate_z_0(p: Tensor, table: Tensor, zhat: str, num_latents: int, generator: Generator | None) -> Tensor:
    """z0_hat from p (N, V) and the latent table (V, D), (K or 1, N, D).

    "hard": w[argmax p], mode seeking. "soft": sum_v p_v w_v, mode covering. "sample": w[v], v ~ p, one v for each of
    the K latents: the exact reverse kernel.
    """
    table = table[: p.shape[-1]]
    if zhat == "hard":
        return table[p.argmax(-1)][None]
    if zhat == "soft":
        return (p.to(table.dtype) @ table)[None]
    u = torch.rand(num_latents, len(p), generator=generator, device=p.device, dtype=torch.float64)
    return torch.stack([table[draw(p, u_k)] for u_k in u])


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    shape: tuple[int, int],
    table: Tensor,
    schedule: NoiseSchedule,
    mask_id: int,
    *,
    steps: int,
    zhat: str = "hard",
    num_latents: int = 1,
    temperature: Temperature = 1.0,
    top_p: float = 1.0,
    strength: float = 1.0,
    time_grid: str = "uniform",
    prompt: Tensor | None = None,
    generator: Generator | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Tensor:
    """Draw x_0 (B, L) int64 by running the chain from t = 1 to t = 0 in `steps` steps.

    Args: denoiser(x_t (B, L), z_t (B, L, D), t (B,)) -> logits (B, L, V), any callable; shape (B, L); table (V, D) of
    latents (D = 0: a masked model); zhat "hard", "soft" or "sample"; num_latents K, folded into the batch; temperature,
    a number or a function of t; strength scales the latent that the denoiser sees (0 ignores it); prompt (B, L),
    mask_id where free: the positions given never change; callback sees a `Step` after each step.
    Raises: InputError for an argument out of range.
    """
    _check(shape, table, steps, zhat, num_latents, temperature, top_p, time_grid, prompt)
    device, (batch, length), dim = table.device, shape, table.shape[1]
    x = torch.full(shape, mask_id, device=device) if prompt is None else prompt.to(device).clone()
    z = torch.randn(num_latents, batch, length, dim, generator=generator, device=device, dtype=table.dtype)
    given = x != mask_id
    z[:, given] = table[x[given]]

    times = TIME_GRIDS[time_grid](torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device))
    for index, (t, s) in enumerate(zip(times[:-1], times[1:])):
        masked = x == mask_id
        if not masked.any():
            break
        logits = denoiser(
            x.repeat(num_latents, 1), strength * z.flatten(0, 1), t.to(table.dtype).expand(num_latents * batch)
        ).unflatten(0, (num_latents, batch))
        flip = torch.rand(shape, generator=generator, device=device) < schedule.rho_flip(s, t)
        flip &= masked

        rows = masked if dim else flip  # without a latent only the rows that flip need their probabilities
        tau = temperature(float(t)) if callable(temperature) else temperature
        p = token_probs(logits[:, rows], mask_id, tau, top_p)
        flipped = flip[rows]
        u = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
        x[flip] = draw(p[flipped], u[flip])
        if dim:
            z_hat = estimate_z_0(p, table, zhat, num_latents, generator)
            mean, variance = q_posterior_z(z[:, rows], z_hat, s, t, schedule)
            eps = torch.randn(mean.shape, generator=generator, device=device, dtype=table.dtype)
            z[:, rows] = mean + variance.sqrt() * eps
            z[:, flip] = table[x[flip]]
        if callback is not None:
            callback(Step(index, float(t), float(s), x.clone(), z, flip))
    return x


def _check(
    shape: tuple[int, int],
    table: Tensor,
    steps: int,
    zhat: str,
    num_latents: int,
    temperature: Temperature,
    top_p: float,
    time_grid: str,
    prompt: Tensor | None,
) -> None:
    choose("zhat", zhat, ZHATS)
    choose("time grid", time_grid, TIME_GRIDS)
    if table.dim() != 2:
        raise InputError(f"table must be (V, D), not {tuple(table.shape)}")
    for name, value in (("steps", steps), ("num_latents", num_latents)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if not callable(temperature) and not 0 <= temperature < math.inf:
        raise InputError(f"temperature must be 0 or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], not {top_p}")
    if prompt is not None and tuple(prompt.shape) != tuple(shape):
        raise InputError(f"prompt must have the shape {tuple(shape)} of the samples, not {tuple(prompt.shape)}")
