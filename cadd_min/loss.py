"""Lemma 1: the KL splits. The training losses (CE, CE + MSE) and the likelihood bound follow from it.

    KL = rho_flip (-log p(x_0 | x_t, z_t)) + rho_keep KL_cont                        per masked position
    KL_cont = (SNR(s) - SNR(t)) / 2 ||z_0 - z0_hat||^2
    -log p(x_0) <= sum over steps and positions of KL + KL(q(z_1 | x_0) || N(0, I))  the bound

Training minimises the cross-entropy in the first term, `nelbo` sums all terms. The cross-entropy alone is not a
perplexity for CADD: its input z_t has seen x_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from cadd_min.forward import q_sample
from cadd_min.schedule import NoiseSchedule, per_token
from cadd_min.utils.errors import InputError, choose

DenoiserFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t (B, L), z_t (B, L, D), t (B,)) -> logits (B, L, V)
WEIGHTINGS = ("uniform", "elbo")
LOGITS = 2**22  # at once in the cross-entropy: 512 rows of 8,192 tokens, or 16,384 rows of 256 grey levels
T_MIN = 1e-4  # in continuous time the bound integrates over [T_MIN, 1] and takes [0, T_MIN] as a last step


def log_probs(logits: Tensor, mask_id: int) -> Tensor:
    """Compute log softmax over the tokens, (..., V) -> (..., V). The mask is not a token: its probability is zero."""
    if mask_id < logits.shape[-1]:
        logits = logits.clone()
        logits[..., mask_id] = -torch.inf
    return logits.log_softmax(-1)


def kl_continuous(z_0: Tensor, z_0_hat: Tensor, s: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Compute KL(q(z_s | z_t, z_0) || q(z_s | z_t, z_0_hat)) = (SNR(s) - SNR(t)) / 2 ||z_0 - z_0_hat||^2.   (Lemma 1)

    Args: z_0, z_0_hat (B, L, D); s < t (B,). Returns: (B, L) nats per position that stays masked. For s = 0 the KL is
    infinite unless the two latents agree. For the flow-matching latent this is the KL of the Markov chain with the
    same marginals.
    """
    error = (z_0 - z_0_hat).square().sum(-1)
    gain = per_token((schedule.snr(s) - schedule.snr(t)) / 2, error)
    return torch.where(error > 0, gain * error, torch.zeros_like(error))


def kl_prior(z_0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Compute KL(q(z_1 | x_0) || N(0, I)) in nats, (B, L, D) -> (B, L). It is zero where gamma_bar ends at 0."""
    one = torch.ones((), dtype=z_0.dtype, device=z_0.device)
    signal, variance = schedule.signal(one), schedule.noise(one) ** 2
    return ((signal * z_0) ** 2 + variance - 1 - variance.log()).sum(-1) / 2


def stratified_times(count: int, generator: Generator | None, device: torch.device | str = "cpu") -> Tensor:
    """Draw (count,) float64 times, uniform on (0, 1] and evenly spread: a regular grid with one uniform shift.

    Neighbours in the list lie about a golden section of [0, 1] apart. So a few times in a row are spread as well, and
    each micro-batch of a step meets early and late times.
    """
    stride = next(n for n in range(round(0.618 * count), 0, -1) if math.gcd(n, count) == 1) if count > 1 else 1
    grid = (torch.arange(count, device=device) * stride % count).double()
    shift = torch.rand((), generator=generator, device=device, dtype=torch.float64)
    return 1 - (grid / count + shift) % 1


def step_times(u: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Find the one of `steps` equal steps in which each u on (0, 1] lies. Returns its ends s < t, of u's shape."""
    number = (u * steps).ceil()  # from 1 to steps
    return (number - 1) / steps, number / steps


class Bound(NamedTuple):
    """The two parts of the bound, (B,) nats each: of the tokens, and of the latents."""

    discrete: Tensor
    continuous: Tensor


def check_steps(steps: int | None) -> None:
    """Raise InputError unless `steps` is a positive number, or None for continuous time."""
    if steps is not None and steps < 1:
        raise InputError(f"steps must be a positive number or None (continuous time), not {steps}")


@torch.no_grad()
def nelbo_parts(
    denoiser: DenoiserFn,
    x_0: Tensor,
    table: Tensor,
    schedule: NoiseSchedule,
    mask_id: int,
    *,
    steps: int | None = None,
    free: Tensor | None = None,
    generator: Generator | None = None,
) -> Bound:
    """Estimate the bound of `nelbo` in two parts, (B,) nats each.

    free (B, L): the bound is of these tokens given the others. None: of all tokens.
    """
    check_steps(steps)
    u = stratified_times(len(x_0), generator, x_0.device)  # (B,)
    z_0 = table[x_0]  # (B, L, D)
    process = (denoiser, x_0, z_0, table, schedule, mask_id, free, generator)
    if steps is None:  # integrals over [T_MIN, 1], and [0, T_MIN] as one last step, in which every token flips
        t = T_MIN + (1 - T_MIN) * u
        ce, z_hat, masked = errors_at(t, *process)
        gain = per_token(-schedule.snr_prime(t) / 2, ce) * (z_0 - z_hat).square().sum(-1)
        discrete = (1 - T_MIN) * (per_token(schedule.flip_rate(t), ce) * ce).sum(-1)
        continuous = (1 - T_MIN) * (gain * masked).sum(-1)
        ce, _, _ = errors_at(torch.full_like(t, T_MIN), *process)
        discrete = discrete + ce.sum(-1)
    else:  # one of the T steps
        s, t = step_times(u, steps)
        ce, z_hat, masked = errors_at(t, *process)
        keep = per_token(schedule.rho_keep(s, t), ce)
        kept = torch.where(keep > 0, keep * kl_continuous(z_0, z_hat, s, t, schedule), torch.zeros_like(ce))
        discrete = steps * (per_token(schedule.rho_flip(s, t), ce) * ce).sum(-1)
        continuous = steps * (kept * masked).sum(-1)
    prior = kl_prior(z_0, schedule)
    return Bound(discrete, continuous + (prior if free is None else prior * free).sum(-1))


def errors_at(
    t: Tensor,
    denoiser: DenoiserFn,
    x_0: Tensor,
    z_0: Tensor,
    table: Tensor,
    schedule: NoiseSchedule,
    mask_id: int,
    free: Tensor | None,
    generator: Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise x_0 (B, L) and z_0 (B, L, D) to times t (B,), and compare what the denoiser expects with what is true.

    Returns: the CE (B, L) in nats, zero where not masked; the soft estimate z0_hat (B, L, D); 1 where masked (B, L).
    """
    x_t, z_t = q_sample(x_0, z_0, t, schedule, mask_id, generator=generator)
    x_t = x_t if free is None else torch.where(free, x_t, x_0)
    masked = x_t == mask_id if free is None else (x_t == mask_id) & free
    log_p = log_probs(denoiser(x_t, z_t, t.to(table.dtype)).to(table.dtype), mask_id)  # (B, L, V)
    index = x_0.clamp(max=log_p.shape[-1] - 1)  # a given token may be the mask itself, of which there may be no logit
    ce = (-log_p.gather(-1, index[..., None])[..., 0]).where(masked, 0)
    return ce, log_p.exp() @ table[: log_p.shape[-1]], masked.to(table.dtype)


def nelbo(
    denoiser: DenoiserFn,
    x_0: Tensor,
    table: Tensor,
    schedule: NoiseSchedule,
    mask_id: int,
    *,
    steps: int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Estimate the bound -log p(x_0) <= sum over steps of Lemma 1's KLs + KL(q(z_1|x_0) || N(0, I)) by Monte Carlo.

    One time step is drawn for each sequence, stratified over the batch. The bound is that of the chain with
    z0_hat = E[w | x_t, z_t] ("soft"), which makes the KL smallest.
    Args: x_0 (B, L) tokens; table (V, D) latents; steps: a number T of equal steps, or None for continuous time, where
    rho_flip becomes -alpha'/(1 - alpha) dt and SNR(s) - SNR(t) becomes -SNR' dt.
    Returns: (B,) nats.
    """
    return sum(nelbo_parts(denoiser, x_0, table, schedule, mask_id, steps=steps, generator=generator))  # type: ignore


def chunk_rows(head: Tensor) -> int:
    """Return how many rows of V logits to hold at once, for a head (V, F)."""
    return max(512, LOGITS // len(head))


def token_losses(
    features: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    table: Tensor | None = None,
    mask_id: int | None = None,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute the CE and the squared error of z0_hat at N masked positions, without holding all (N, V) logits.

    Args: features (N, F); head (V, F), logits are features @ head.T; targets (N,); table (V, D) for the squared error;
    mask_id: has probability zero where V counts the mask; chunk: rows at once (0: by the size of V).
    Returns: ce (N,) nats; mse (N,) = ||w[x_0] - sum_v p_v w_v||^2, zero without a table.
    """
    precise = torch.promote_types(features.dtype, torch.float32)
    chunk = chunk or chunk_rows(head)

    def piece(rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Compute both for some of the positions."""
        logits = (rows @ head.T).to(precise)
        if mask_id is not None and mask_id < len(head):
            logits[:, mask_id] = -torch.inf
        ce = F.cross_entropy(logits, target, reduction="none")
        if table is None:
            return ce, torch.zeros_like(ce)
        return ce, (table[target] - logits.softmax(-1) @ table[: len(head)]).square().sum(-1)

    pieces = [
        checkpoint(piece, rows, target, use_reentrant=False)
        for rows, target in zip(features.split(chunk), targets.split(chunk))
    ]
    return torch.cat([ce for ce, _ in pieces]), torch.cat([mse for _, mse in pieces])


def time_weights(t: Tensor, schedule: NoiseSchedule, weighting: str) -> tuple[Tensor, Tensor]:
    """Return the weights (B,) of the CE and of the squared error at times t (B,).

    "uniform" is the paper's plain loss: 1 and 1. "elbo" is Lemma 1 in continuous time, -alpha'/(1 - alpha) and -SNR'/2.
    The weighted CE + MSE is then the integrand of the bound.
    """
    choose("weighting", weighting, WEIGHTINGS)
    if weighting == "uniform":
        return torch.ones_like(t), torch.ones_like(t)
    return schedule.flip_rate(t), -schedule.snr_prime(t) / 2
