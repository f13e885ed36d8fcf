"""Proposition 1: the forward process. Tokens are masked; a masked token keeps a noisy copy of its embedding.

`q_step` is one step of the chain, `q_sample` the closed form of all steps. The tests simulate the chain to check the
closed form.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from cadd_min.schedule import NoiseSchedule, per_token, ratio
from cadd_min.utils.errors import InputError


def q_sample(
    x_0: Tensor, z_0: Tensor, t: Tensor, schedule: NoiseSchedule, mask_id: int, *, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw (x_t, z_t) ~ q(x_t, z_t | x_0) = q(x_t | x_0) q(z_t | x_t, x_0).    (Prop. 1)

    Args: x_0 (B, L) int64 tokens; z_0 (B, L, D) their latents w[x_0]; t (B,) in [0, 1].
    Returns: x_t (B, L), z_t (B, L, D). A token is masked with probability 1 - alpha_t. A masked token's latent is
    N(signal_t z_0, noise_t^2 I), whenever the masking happened. An unmasked token's latent is exactly z_0.
    Raises: InputError for shapes that do not fit.
    """
    _check(x_0, z_0, t)
    u = torch.rand(x_0.shape, generator=generator, device=x_0.device)
    eps = torch.randn(z_0.shape, generator=generator, device=z_0.device, dtype=z_0.dtype)
    return noised(x_0, z_0, schedule.alpha(t), schedule.signal(t), schedule.noise(t), u, eps, mask_id)


def noised(
    x_0: Tensor, z_0: Tensor, alpha: Tensor, signal: Tensor, noise: Tensor, u: Tensor, eps: Tensor, mask_id: int
) -> tuple[Tensor, Tensor]:
    """Apply Prop. 1 to given randomness: u (B, L) uniform, eps (B, L, D) normal; alpha, signal and noise (B,)."""
    masked = u >= per_token(alpha, u)
    noisy = per_token(signal, z_0) * z_0 + per_token(noise, z_0) * eps
    return x_0.masked_fill(masked, mask_id), torch.where(masked[..., None], noisy, z_0)


def q_step(
    x_s: Tensor,
    z_s: Tensor,
    s: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    mask_id: int,
    *,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one step of the forward chain, from time s to t >= s. Shapes are those of `q_sample`.

    An unmasked token is masked with probability 1 - alpha_t / alpha_s. A masked token stays masked.
    The latent of a token that is
        still unmasked        is frozen;
        masked in this step   is N(signal_t z_s, noise_t^2 I), since z_s = z_0;
        masked before         is N(c z_s, (noise_t^2 - c^2 noise_s^2) I) with c = signal_t / signal_s.
    For the Gaussian latent c^2 = g = gamma_bar_t / gamma_bar_s, and the last variance is 1 - g.
    """
    _check(x_s, z_s, t)
    survive = ratio(schedule.alpha(t), schedule.alpha(s))
    u = torch.rand(x_s.shape, generator=generator, device=x_s.device)
    was_masked = x_s == mask_id
    masked = was_masked | (u >= per_token(survive, u))

    signal_s, signal_t, noise_t = schedule.signal(s), schedule.signal(t), schedule.noise(t)
    c = ratio(signal_t, signal_s)
    added = (noise_t**2 - c**2 * schedule.noise(s) ** 2).clamp(min=0).sqrt()  # rounding may leave -1e-17
    eps = torch.randn(z_s.shape, generator=generator, device=z_s.device, dtype=z_s.dtype)
    fresh = per_token(signal_t, z_s) * z_s + per_token(noise_t, z_s) * eps
    moved = per_token(c, z_s) * z_s + per_token(added, z_s) * eps
    z_t = torch.where(was_masked[..., None], moved, torch.where(masked[..., None], fresh, z_s))
    return x_s.masked_fill(masked, mask_id), z_t


def _check(x: Tensor, z: Tensor, t: Tensor) -> None:
    if z.dim() != 3 or z.shape[:2] != x.shape or t.shape != x.shape[:1]:
        raise InputError(
            f"x must be (B, L), z (B, L, D) and t (B,) with the same B and L, "
            f"not {tuple(x.shape)}, {tuple(z.shape)} and {tuple(t.shape)}"
        )
