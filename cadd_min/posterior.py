"""Proposition 2: the posterior q(x_s, z_s | x_t, z_t, x_0), one reverse step where the answer x_0 is known.

reverse.py makes the same step without the answer: it puts the network's estimate z0_hat in the place of z_0.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from cadd_min.schedule import NoiseSchedule, per_token, ratio


def q_posterior_z(z_t: Tensor, z_0: Tensor, s: Tensor, t: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of z_s at a position that stays masked.    (Prop. 2)

    With g = gamma_bar_t / gamma_bar_s, the Gaussian latent has

        mu   = sqrt(gamma_bar_s) (1 - g) / (1 - gamma_bar_t) z_0 + sqrt(g) (1 - gamma_bar_s) / (1 - gamma_bar_t) z_t
        beta = (1 - gamma_bar_s) (1 - g) / (1 - gamma_bar_t)

    The flow-matching latent moves along its line: mu = (1 - s/t) z_0 + (s/t) z_t, beta = 0.
    For s = t the mean is z_t, for s = 0 it is z_0, and the variance is 0.
    Args: z_t, z_0 (..., D); s, t (B,). Returns: mean (..., D); variance (B, 1, ..), which broadcasts against it.
    """
    pull, keep, variance = posterior_coefficients(s, t, schedule)
    return per_token(pull, z_t) * z_0 + per_token(keep, z_t) * z_t, per_token(variance, z_t)


def posterior_coefficients(s: Tensor, t: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Tensor]:
    """Return (pull, keep, variance) of the mean pull z_0 + keep z_t, each of the shape of s and t."""
    if schedule.continuous == "flow":
        keep = ratio(s, t)
        pull, variance = 1 - keep, torch.zeros_like(keep)
    else:
        bar_s, bar_t = schedule.gamma_bar(s), schedule.gamma_bar(t)
        g, noise = ratio(bar_t, bar_s), ratio(1 - bar_s, 1 - bar_t)
        keep, variance = g.sqrt() * noise, (1 - g) * noise
        pull = bar_s.sqrt() * (1 - g) / torch.where(bar_t < 1, 1 - bar_t, 1)  # at s = t = 0 the latent is z_0 itself
    return pull, keep, variance


def q_posterior_sample(
    x_t: Tensor,
    z_t: Tensor,
    x_0: Tensor,
    z_0: Tensor,
    s: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    mask_id: int,
    *,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw (x_s, z_s) ~ q(x_s, z_s | x_t, z_t, x_0).    (Prop. 2)

    A masked position flips to its token with probability rho_flip, and z_s = z_0 there. Otherwise the position stays
    masked, and z_s ~ N(mu, beta I). Unmasked positions carry over, x and z bitwise.
    Args: x_t, x_0 (B, L); z_t, z_0 (B, L, D); s <= t (B,). Returns: x_s (B, L), z_s (B, L, D).
    """
    masked = x_t == mask_id
    u = torch.rand(x_t.shape, generator=generator, device=x_t.device)
    flip = masked & (u < per_token(schedule.rho_flip(s, t), u))
    mean, variance = q_posterior_z(z_t, z_0, s, t, schedule)
    eps = torch.randn(z_t.shape, generator=generator, device=z_t.device, dtype=z_t.dtype)
    kept = mean + variance.sqrt() * eps
    z_s = torch.where(masked[..., None], torch.where(flip[..., None], z_0, kept), z_t)
    return torch.where(flip, x_0, x_t), z_s
