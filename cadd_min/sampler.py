"""The reverse chain: from masks and noise to tokens, with any denoiser.

Each step predicts p(x_0 | x_t, z_t) and flips every masked position with probability rho_flip. Where a position flips,
the step draws its token. Elsewhere it moves the latent towards an estimate z0_hat by Proposition 2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from cadd_min import ops
from cadd_min.kernels import philox
from cadd_min.loss import DenoiserFn
from cadd_min.orders import Sampling, Temperature, make_plan
from cadd_min.reverse import Decoding, estimate_z_0, in_all_latents, token_probs
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.errors import InputError, first_line


class Step(NamedTuple):
    """What a callback sees after each step, from time t to s."""

    number: int  # from 0
    t: float  # under first hitting the mean over the sequences, and so is s
    s: float
    x: Tensor  # (B, L) tokens, mask_id where still masked
    z: Tensor  # (K, B, L, D) latents
    fresh: Tensor  # (B, L) bool: unmasked in this step
    belief: Callable[[], Tensor]  # () -> (B, L): x, with the token nearest to z0_hat wherever x_t was masked


def sample(
    denoiser: DenoiserFn,
    shape: tuple[int, int],
    table: Tensor,
    schedule: NoiseSchedule,
    mask_id: int,
    *,
    steps: int,
    zhat: str = "hard",
    num_latents: int = 1,
    temperature: Temperature = 1.0,
    prompt: Tensor | None = None,
    generator: Generator | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Tensor:
    """Draw x_0 (B, L) int64 in `steps` equal steps. Positions flip independently. `reverse_chain` takes all settings.

    Args: denoiser(x_t (B, L), z_t (B, L, D), t (B,)) -> logits (B, L, V), any callable; shape (B, L); table (V, D);
    zhat: see `reverse.estimate_z_0`; num_latents: K; temperature: a number, or a function of t; prompt (B, L), mask_id
    where free: positions that are given never change; callback: is called with a `Step` after each step.
    Raises: InputError for an argument out of range.
    """
    settings = Sampling(steps, zhat, num_latents, temperature)
    return reverse_chain(
        denoiser, shape, table, schedule, mask_id, settings, prompt=prompt, generator=generator, callback=callback
    )


@torch.no_grad()
def reverse_chain(
    denoiser: DenoiserFn,
    shape: tuple[int, int],
    table: Tensor,
    schedule: NoiseSchedule,
    mask_id: int,
    settings: Sampling,
    *,
    prompt: Tensor | None = None,
    generator: Generator | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Tensor:
    """Draw x_0 (B, L) int64 from t = 1 to t = 0. Arguments as of `sample`; D = 0 is a masked model without latents."""
    first_seed = ops.draw_seed(generator, table.device)
    x = first_tokens(shape, mask_id, prompt, table)  # (B, L)
    z = first_latents(x, table, mask_id, settings.num_latents, first_seed)  # (K, B L, D)
    plan = make_plan(settings, schedule, x == mask_id, mask_id, first_seed)
    seeds, mean_times = philox.step_seeds(first_seed, len(plan.times)), plan.times.mean(1).tolist()

    for n, (t, s) in enumerate(zip(plan.times[:-1], plan.times[1:])):  # s < t, (B,) each
        masked = x == mask_id
        rows = masked.flatten().nonzero()[:, 0]  # (N,)
        if len(rows) == 0 and not plan.remasks:
            break
        decoding, seed = settings.decoding_at(mean_times[n]), seeds[n + 1]
        logits = predict(denoiser, x, settings.strength * z, t, rows)  # (K, N, V): p(x_0 | x_t, z_t)
        remasked = plan.remasked(masked, s, t, seed)  # (B, L): chosen first, since an order flips as many more
        with naming_step(n + 1):
            # flip with rho_flip, draw from p, else move z by Prop. 2: reverse.reverse_rows
            coefficients = plan.coefficients(logits, rows, masked, remasked, s, t, seed)
            x_s, z_s = ops.reverse_step(logits, rows, z, table, coefficients, mask_id, seed, decoding)
            x.view(-1)[rows], z[:, rows] = x_s, z_s
        if plan.remasks:
            mask_again(x, z, remasked.flatten().nonzero()[:, 0], table, schedule, s[0], mask_id, seed)
        if callback is not None:
            now, hat = x.clone(), philox.hat_choice(seed, in_all_latents(rows, *z.shape[:2]))
            belief = partial(believed, now, rows, logits, table, mask_id, decoding, hat)
            latents = z.clone().unflatten(1, x.shape)
            callback(Step(n, mean_times[n], mean_times[n + 1], now, latents, masked & (x != mask_id), belief))
    return x


def predict(denoiser: DenoiserFn, x: Tensor, z: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    """Compute logits (K, N, V) at the masked positions `rows` (N,), the K latents z (K, B L, D) folded into the batch.

    A denoiser with a method logits_at(x_t, z_t, t, rows) spares its head the other positions.
    """
    count, (batch, length) = len(z), x.shape
    x_t, z_t = x.repeat(count, 1), z.reshape(count * batch, length, -1)
    everywhere, t = in_all_latents(rows, *z.shape[:2]), t.to(z.dtype).repeat(count)
    if hasattr(denoiser, "logits_at"):
        logits = denoiser.logits_at(x_t, z_t, t, everywhere.flatten())
    else:
        logits = denoiser(x_t, z_t, t).flatten(0, 1)[everywhere.flatten()]
    return logits.unflatten(0, everywhere.shape)


def first_tokens(shape: tuple[int, int], mask_id: int, prompt: Tensor | None, table: Tensor) -> Tensor:
    """Return x_1 (B, L) int64: mask_id everywhere, but where the prompt (B, L) gives a token.

    Raises: InputError for a prompt of another shape, numbers that are no tokens, and a table that is not (V, D).
    """
    if table.dim() != 2:
        raise InputError(f"table must be (V, D), not {tuple(table.shape)}")
    if prompt is None:
        return torch.full(shape, mask_id, device=table.device)
    if tuple(prompt.shape) != tuple(shape):
        raise InputError(f"prompt must have the shape {tuple(shape)} of the samples, not {tuple(prompt.shape)}")
    if not ((0 <= prompt) & (prompt < max(mask_id + 1, len(table)))).all():
        raise InputError(f"prompt must hold token ids, or {mask_id} where free")
    return prompt.to(table.device, torch.int64, copy=True)


def first_latents(x: Tensor, table: Tensor, mask_id: int, count: int, seed: Tensor) -> Tensor:
    """Draw z_1 (K, B L, D) ~ N(0, I). Given tokens have their own latent w[x]."""
    z = philox.normals(seed, torch.arange(count * x.numel(), device=x.device), table.shape[1]).to(table.dtype)
    z, given = z.view(count, x.numel(), table.shape[1]), (x != mask_id).flatten()
    z[:, given] = table[x.flatten()[given]]
    return z


def mask_again(
    x: Tensor, z: Tensor, rows: Tensor, table: Tensor, schedule: NoiseSchedule, s: Tensor, mask_id: int, seed: Tensor
) -> None:
    """Mask the flat positions `rows` again, in place, with latents drawn from q(z_s | x_s = m, x_0 = x).  (Prop. 1)"""
    eps = philox.normals(seed, in_all_latents(rows, *z.shape[:2]), z.shape[-1]).to(z)  # (K, N, D)
    z[:, rows] = schedule.signal(s).to(z) * table[x.view(-1)[rows]] + schedule.noise(s).to(z) * eps
    x.view(-1)[rows] = mask_id


def believed(
    x: Tensor, rows: Tensor, logits: Tensor, table: Tensor, mask_id: int, decoding: Decoding, u: Tensor
) -> Tensor:
    """Return x (B, L) with the tokens at `rows` whose latents are nearest to z0_hat.

    Without latents these are the most probable tokens.
    """
    p = token_probs(logits, mask_id, decoding.temperature, decoding.top_p)
    tokens = p.argmax(-1)
    if table.shape[1]:
        table = table.to(torch.promote_types(table.dtype, torch.float32))  # torch has no cdist in half precision
        z_hat = estimate_z_0(p.to(table.dtype), table, decoding.zhat, u)[0]
        tokens = torch.cdist(z_hat, table[: p.shape[-1]]).argmin(-1)
    return x.flatten().index_copy(0, rows, tokens).view_as(x)


@contextlib.contextmanager
def naming_step(number: int) -> Iterator[None]:
    """Name the step in which the denoiser's logits are refused."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"step {number}: {first_line(error)}") from None
