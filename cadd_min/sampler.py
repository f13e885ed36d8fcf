"""The reverse chain: from masks and noise to tokens, with any denoiser.

Each step asks the denoiser for p(x_0 | x_t, z_t), flips every masked position with probability rho_flip, draws a token
where it flipped, and elsewhere moves the latent towards an estimate z0_hat by Proposition 2. Flip first, then draw:
one (V + 1)-way draw with the mask as an outcome loses the tail in float32 as the steps grow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from cadd_min import ops
from cadd_min.kernels import philox
from cadd_min.loss import DenoiserFn
from cadd_min.plan import Plan, Sampling, given
from cadd_min.reverse import estimate_z_0, token_probs
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.errors import InputError


class Step(NamedTuple):
    """What the callback sees after each step, from time t to s."""

    number: int  # from 0
    t: float  # under first-hitting the mean over the sequences, as s is
    s: float
    x: Tensor  # (B, L) tokens, mask_id where still masked
    z: Tensor  # (K, B, L, D) latents
    fresh: Tensor  # (B, L) bool: unmasked in this step
    belief: Callable[[], Tensor]  # -> (B, L) tokens, where masked at t those that z0_hat looks like, computed on demand


def logits_at(denoiser: DenoiserFn, x_t: Tensor, z_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    """(N, V) logits at the flat positions `rows` (N,), which are the masked ones.

    A denoiser with a method logits_at(x_t, z_t, t, rows) is spared its head at the others; any other callable is not.
    """
    if hasattr(denoiser, "logits_at"):
        return denoiser.logits_at(x_t, z_t, t, rows)
    return denoiser(x_t, z_t, t).flatten(0, 1)[rows]


@torch.no_grad()
def sample(
    denoiser: DenoiserFn,
    shape: tuple[int, int],
    table: Tensor,
    schedule: NoiseSchedule,
    mask_id: int,
    *,
    prompt: Tensor | None = None,
    generator: Generator | None = None,
    callback: Callable[[Step], None] | None = None,
    **how: Any,
) -> Tensor:
    """Draw x_0 (B, L) int64 by running the chain from t = 1 to t = 0.

    Args: denoiser(x_t (B, L), z_t (B, L, D), t (B,)) -> logits (B, L, V), any callable; shape (B, L); table (V, D) of
    latents (D = 0: a masked model); prompt (B, L), mask_id where free: the positions given never change; callback sees
    a `Step` after each step; how: the fields of `Sampling`, as steps=64, zhat="soft".
    Raises: InputError for an argument out of range.
    """
    options = Sampling(**how)
    if table.dim() != 2:
        raise InputError(f"table must be (V, D), not {tuple(table.shape)}")
    device, (batch, length), count = table.device, shape, options.num_latents
    seed = ops.draw_seed(generator, device)
    x = given(shape, mask_id, prompt, device, len(table))
    z = _noise(x, table, mask_id, count, seed)
    first = batch * length * torch.arange(count, device=device)[:, None]  # position of each latent's sequences
    plan = Plan(options, schedule, x == mask_id, seed)

    for index, (t, s) in enumerate(zip(plan.times[:-1], plan.times[1:])):
        masked = x == mask_id
        rows = masked.flatten().nonzero()[:, 0]
        if len(rows) == 0 and not options.remask:
            break
        seed[1] = index + 1
        tau = options.heat(float(t.mean()))
        seen = (x.repeat(count, 1), options.strength * z.flatten(0, 1), t.to(table.dtype).repeat(count))
        each = rows + first  # (K, N)
        logits = logits_at(denoiser, *seen, each.flatten()).unflatten(0, each.shape)
        again = plan.again(x, mask_id, s, t)
        at = plan.clock(s, t, rows)
        try:
            x_s, z_s = ops.reverse_step(
                logits,
                rows,
                z.flatten(1, 2),
                table,
                *at,
                schedule,
                mask_id,
                seed,
                zhat=options.zhat,
                temperature=tau,
                top_p=options.top_p,
                rho_flip=plan.flips(logits, rows, masked, again, *at, tau, mask_id),
            )
        except ValueError as error:  # a kernel's: its first line says what is wrong
            raise InputError(f"step {index + 1}: {str(error).splitlines()[0]}") from None
        x.view(-1)[rows], z.flatten(1, 2)[:, rows] = x_s, z_s
        if options.remask:
            _mask(x, z, again.flatten().nonzero()[:, 0], table, schedule, s[0], mask_id, seed)
        if callback is not None:
            u = philox.hat_choice(seed, each)
            now = x.clone()
            belief = partial(_belief, now, rows, logits, table, options.zhat, mask_id, tau, options.top_p, u)
            callback(Step(index, float(t.mean()), float(s.mean()), now, z.clone(), masked & (x != mask_id), belief))
    return x


def _mask(
    x: Tensor, z: Tensor, rows: Tensor, table: Tensor, schedule: NoiseSchedule, s: Tensor, mask_id: int, seed: Tensor
) -> None:
    """Mask the flat positions `rows` again, in place, with latents drawn from q(z_s | x_s = m, x_0 = x).  (Prop. 1)"""
    count, dim, positions = len(z), z.shape[-1], x.numel()
    each = rows + positions * torch.arange(count, device=rows.device)[:, None]
    eps = philox.normals(seed, each, dim).to(z)
    z.flatten(1, 2)[:, rows] = schedule.signal(s).to(z) * table[x.view(-1)[rows]] + schedule.noise(s).to(z) * eps
    x.view(-1)[rows] = mask_id


def _noise(x: Tensor, table: Tensor, mask_id: int, count: int, seed: Tensor) -> Tensor:
    """z_1 (K, B, L, D) ~ N(0, I), at the tokens that are given theirs."""
    z = philox.normals(seed, torch.arange(count * x.numel(), device=x.device), table.shape[1]).to(table.dtype)
    z, known = z.view(count, *x.shape, table.shape[1]), x != mask_id
    z[:, known] = table[x[known]]
    return z


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
