"""One reverse step, given its randomness: from the logits of the masked positions to their x_s and z_s.

This is Proposition 2 with the network's estimate z0_hat in the place of z_0. The fused kernel is tested against this
file, and this file runs where there is no kernel. Flip first, then draw: one (V + 1)-way draw with the mask as an
outcome loses the tail in float32 as the steps grow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cadd_min.posterior import posterior_coefficients
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.errors import InputError

ZHATS = ("hard", "soft", "sample")
COLD = 1e-6  # at and below this temperature all mass is on the largest logit


class Decoding(NamedTuple):
    """How tokens and z0_hat are taken from the logits."""

    zhat: str = "hard"  # see `estimate_z_0`
    temperature: float = 1.0  # see `token_probs`
    top_p: float = 1.0


def in_all_latents(rows: Tensor, count: int, positions: int) -> Tensor:
    """Return the flat indices (K, N) of the positions `rows` (N,) in each of K = `count` latents of P positions."""
    return rows + positions * torch.arange(count, device=rows.device)[:, None]


def token_probs(logits: Tensor, mask_id: int, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Average softmax(logits / temperature) over the K latents: (K, N, V) -> (N, V), float32 at least.

    Probabilities are averaged, not logits: p(x_0 | x_t) is the expectation of p(x_0 | x_t, z_t) over z_t. The mask has
    probability zero, whatever its logit. At temperatures up to COLD each latent puts all its mass on its largest logit.
    top_p < 1 keeps the fewest, most probable tokens whose mass reaches top_p, with ties (Holtzman et al. 2020).
    Raises InputError for logits that are NaN or all minus infinity.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask_id < logits.shape[-1]:
        logits = logits.index_fill(-1, torch.tensor([mask_id], device=logits.device), -torch.inf)
    if temperature > COLD:
        p = (logits / temperature).softmax(-1).mean(0)
        finite = torch.isfinite(p.sum())
    else:
        p = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype).mean(0)
        finite = torch.isfinite(logits.amax(-1)).all()  # the one-hot rows are finite whatever the logits are
    if not finite:
        raise InputError("the denoiser returned logits that are NaN or all minus infinity")
    return nucleus(p, top_p) if top_p < 1 else p


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Keep the fewest tokens of p (N, V) that hold top_p of the mass, with ties, and normalise."""
    falling = p.sort(-1, descending=True).values
    before = falling.cumsum(-1, dtype=torch.float64) - falling
    last = (before < top_p).sum(-1, keepdim=True) - 1
    p = p.masked_fill(p < falling.gather(-1, last), 0)
    return p / p.sum(-1, keepdim=True)


def draw(p: Tensor, u: Tensor, block: int = 256) -> Tensor:
    """Draw one token a row by inverse CDF over block sums: p (N, V), uniforms u (N,) in [0, 1) -> (N,) int64.

    Sums are float64, so a token of probability 1e-7 is drawn at its rate. A token of probability zero is never drawn.
    Rows need not be normalised.
    """
    blocks = F.pad(p, (0, -p.shape[-1] % block)).unflatten(-1, (-1, block))  # (N, V / block, block)
    cdf = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # (N, V / block)
    target = u.double() * cdf[:, -1]
    chosen = (cdf <= target[:, None]).sum(-1, keepdim=True).clamp(max=cdf.shape[1] - 1)
    before = F.pad(cdf, (1, 0)).gather(1, chosen)[:, 0]
    inner = blocks.gather(1, chosen[..., None].expand(-1, 1, block))[:, 0].double().cumsum(-1)  # (N, block)
    inside = (inner <= (target - before)[:, None]).sum(-1)
    last = inner.argmax(-1)  # the block's last token with any mass: rounding must not step beyond it
    return chosen[:, 0] * block + torch.minimum(inside, last)


def estimate_z_0(p: Tensor, table: Tensor, zhat: str, u: Tensor) -> Tensor:
    """Estimate z0_hat from p (N, V) and the latent table (V, D). Returns (K or 1, N, D).

    "hard": w[argmax p], mode seeking. "soft": sum_v p_v w_v, mode covering. "sample": w[v] with v ~ p by the uniforms u
    (K, N), a token for each latent: the exact reverse kernel.
    """
    table = table[: p.shape[-1]]
    if zhat == "hard":
        return table[p.argmax(-1)][None]
    if zhat == "soft":
        return (p.to(table.dtype) @ table)[None]
    return torch.stack([table[draw(p, u_k)] for u_k in u])


def step_coefficients(s: Tensor, t: Tensor, schedule: NoiseSchedule, rho_flip: Tensor | None = None) -> Tensor:
    """Stack the four numbers of a reverse step from t to s: rho_flip, pull, keep, std.    (Prop. 2)

    s, t: scalars, or (N,) times per position. rho_flip: None for the schedule's probability, or another probability.
    Returns: (4,) or (4, N) float64.
    """
    pull, keep, variance = posterior_coefficients(s, t, schedule)
    flip = schedule.rho_flip(s, t) if rho_flip is None else rho_flip
    return torch.stack(torch.broadcast_tensors(flip, pull, keep, variance.sqrt())).double()


def reverse_rows(
    p: Tensor,
    z_t: Tensor,
    table: Tensor,
    coefficients: Tensor,
    mask_id: int,
    zhat: str,
    u: tuple[Tensor, Tensor, Tensor],
    eps: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw x_s (N,) and z_s (K, N, D) of N masked positions.    (Prop. 2)

    A position flips with probability rho_flip, takes its token from p and the token's latent with it. Otherwise it
    stays masked, and z_s = pull z0_hat + keep z_t + std eps.
    Args: p (N, V); z_t (K, N, D); table (V, D); coefficients (4,) or (4, N), see `step_coefficients`; u: the uniforms
    of the flip (N,), of the token (N,) and of z0_hat (K, N); eps (K, N, D).
    """
    rho_flip = coefficients[0]
    pull, keep, std = coefficients[1:, ..., None].to(z_t)
    u_flip, u_token, u_hat = u
    flip = u_flip < rho_flip
    x_s = torch.where(flip, draw(p, u_token), mask_id)
    if table.shape[1] == 0:
        return x_s, z_t
    z_hat = estimate_z_0(p, table, zhat, u_hat)
    kept = pull * z_hat + keep * z_t + std * eps
    return x_s, torch.where(flip[:, None], table[x_s.clamp(max=len(table) - 1)], kept)
