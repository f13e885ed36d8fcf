"""The reverse chain: from masks and noise to tokens, with any denoiser.

Each step asks the denoiser for p(x_0 | x_t, z_t), flips every masked position with probability rho_flip, draws a token
where it flipped, and elsewhere moves the latent towards an estimate z0_hat by Proposition 2. Flip first, then draw:
one (V + 1)-way draw with the mask as an outcome loses the tail in float32 as the steps grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from cadd_min import ops, philox
from cadd_min.errors import InputError, choose
from cadd_min.loss import Denoiser
from cadd_min.reverse import ZHATS, estimate_z_0, token_probs
from cadd_min.schedule import NoiseSchedule

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
    belief: Callable[[], Tensor]  # -> (B, L) tokens, where masked at t those that z0_hat looks like, computed on demand


def cosine_temperature(start: float = 2.5, end: float = 1.0) -> Callable[[float], float]:
    """A temperature that falls from `start` at t = 1 to `end` at t = 0 along a half cosine (the paper's for images)."""
    return lambda t: end + (start - end) * (1 - math.cos(math.pi * t)) / 2


def logits_at(denoiser: Denoiser, x_t: Tensor, z_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    """(N, V) logits at the flat positions `rows` (N,), which are the masked ones.

    A denoiser with a method logits_at(x_t, z_t, t, rows) is spared its head at the others; any other callable is not.
    """
    if hasattr(denoiser, "logits_at"):
        return denoiser.logits_at(x_t, z_t, t, rows)
    return denoiser(x_t, z_t, t).flatten(0, 1)[rows]


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
    _check(shape, table, mask_id, steps, zhat, num_latents, top_p, strength, time_grid, prompt)
    device, (batch, length) = table.device, shape
    seed = ops.draw_seed(generator, device)
    x, z = _start(shape, table, mask_id, num_latents, prompt, seed)
    first = batch * length * torch.arange(num_latents, device=device)[:, None]  # position of each latent's sequences

    times = TIME_GRIDS[time_grid](torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device))
    for index, (t, s) in enumerate(zip(times[:-1], times[1:])):
        masked = x == mask_id
        rows = masked.flatten().nonzero()[:, 0]
        if len(rows) == 0:
            break
        seen = (x.repeat(num_latents, 1), strength * z.flatten(0, 1), t.to(table.dtype).expand(num_latents * batch))
        each = rows + first  # (K, N)
        seed[1] = index + 1
        tau = _temperature(temperature, float(t))
        logits = logits_at(denoiser, *seen, each.flatten()).unflatten(0, each.shape)
        try:
            x_s, z_s = ops.reverse_step(
                logits,
                rows,
                z.flatten(1, 2),
                table,
                s,
                t,
                schedule,
                mask_id,
                seed,
                zhat=zhat,
                temperature=tau,
                top_p=top_p,
            )
        except ValueError as error:  # a kernel's: its first line says what is wrong
            raise InputError(f"step {index + 1}: {str(error).splitlines()[0]}") from None
        x.view(-1)[rows], z.flatten(1, 2)[:, rows] = x_s, z_s
        if callback is not None:
            u = philox.hat_choice(seed, each)
            now = x.clone()
            belief = partial(_belief, now, rows, logits, table, zhat, mask_id, tau, top_p, u)
            callback(Step(index, float(t), float(s), now, z.clone(), masked & (x != mask_id), belief))
    return x


def _start(
    shape: tuple[int, int], table: Tensor, mask_id: int, num_latents: int, prompt: Tensor | None, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """x_1 (B, L), masked but where the prompt is given, and z_1 (K, B, L, D) ~ N(0, I), there the given tokens'."""
    device, dim = table.device, table.shape[1]
    x = torch.full(shape, mask_id, device=device) if prompt is None else prompt.to(device, torch.int64, copy=True)
    z = philox.normals(seed, torch.arange(num_latents * x.numel(), device=device), dim).to(table.dtype)
    z, given = z.view(num_latents, *shape, dim), x != mask_id
    z[:, given] = table[x[given]]
    return x, z


def _belief(
    x: Tensor, rows: Tensor, logits: Tensor, table: Tensor, zhat: str, mask_id: int, tau: float, top_p: float, u: Tensor
) -> Tensor:
    """x (B, L) with the token at `rows` whose latent is nearest to z0_hat; without latents the most probable one."""
    p = token_probs(logits, mask_id, tau, top_p)
    tokens = p.argmax(-1)
    if table.shape[1]:
        z_hat = estimate_z_0(p.to(table.dtype), table, zhat, u)[0]
        tokens = torch.cdist(z_hat, table[: p.shape[-1]]).argmin(-1)
    return x.flatten().index_copy(0, rows, tokens).view_as(x)


def _temperature(temperature: Temperature, t: float) -> float:
    """Its value at time t."""
    tau = temperature(t) if callable(temperature) else temperature
    if not 0 <= tau < math.inf:
        raise InputError(f"temperature must be 0 or more, not {tau}")
    return tau


def _check(
    shape: tuple[int, int],
    table: Tensor,
    mask_id: int,
    steps: int,
    zhat: str,
    num_latents: int,
    top_p: float,
    strength: float,
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
    if not math.isfinite(strength):
        raise InputError(f"strength must be a number, not {strength}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], not {top_p}")
    if prompt is not None and tuple(prompt.shape) != tuple(shape):
        raise InputError(f"prompt must have the shape {tuple(shape)} of the samples, not {tuple(prompt.shape)}")
    if prompt is not None and not ((0 <= prompt) & (prompt < max(mask_id + 1, len(table)))).all():
        raise InputError(f"prompt must hold token ids, or {mask_id} where free")
