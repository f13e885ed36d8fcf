"""Uniform-state diffusion: noise is a random token, not a mask, and every token may change until the end.

UDLM (Schiff et al. 2024), Duo (Sahoo et al. 2025), SEDD-uniform (Lou et al. 2024). With V tokens and no mask

    q(x_t | x_0)      = alpha_t x_0 + (1 - alpha_t) / V
    q(x_s | x_t, x_0) = [a x_t + (1 - a) / V] [alpha_s x_0 + (1 - alpha_s) / V] / <x_t, q(x_t | x_0)>

with a = alpha_t / alpha_s (tokens as one-hot rows, products elementwise). The model puts x_theta in the place of x_0,
which is exact where x_theta is the law of x_0^i given x_t without its position i: what x_t^i itself tells, the formula
adds. All costs below are written with c = V alpha / (1 - alpha), so that V alpha x + 1 - alpha = (1 - alpha) (1 + c x):
log(1 + c x) by log1p keeps its digits as alpha goes to 0, where costs go like c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from cadd_min.baselines.common import features, logits_of, seen
from cadd_min.kernels import philox
from cadd_min.loss import T_MIN, Bound, check_steps, chunk_rows, stratified_times
from cadd_min.model import Model
from cadd_min.objective import Batch, Loss, Objective
from cadd_min.orders import Sampling, time_grid
from cadd_min.reverse import draw, token_probs
from cadd_min.sampler import Step
from cadd_min.schedule import NoiseSchedule, per_token


class Law(NamedTuple):
    """What a cost needs of x_theta at N positions, (N,) each: two log probabilities, and a sum over all tokens."""

    own: Tensor  # log x_theta[x_t]
    true: Tensor  # log x_theta[x_0]
    spread: Tensor  # sum over v of log(1 + c x_theta[v])


def q_sample(
    x_0: Tensor, t: Tensor, schedule: NoiseSchedule, vocab_size: int, generator: Generator | None = None
) -> Tensor:
    """Draw x_t (B, L) at times t (B,): x_0 (B, L) with probability alpha_t, else any of the V tokens, each alike."""
    u = torch.rand(x_0.shape, generator=generator, device=x_0.device)
    noise = torch.randint(vocab_size, x_0.shape, generator=generator, device=x_0.device)
    return torch.where(u < per_token(schedule.alpha(t), u), x_0, noise)


def survival(s: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """a = alpha_t / alpha_s, the probability that no noise came from s to t; 1 for s = t = 1."""
    alpha_s = schedule.alpha(s)
    return torch.where(alpha_s > 0, schedule.alpha(t) / torch.where(alpha_s > 0, alpha_s, 1), 1)


def posterior(x_t: Tensor, probs: Tensor, s: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """q(x_s | x_t, x_0) with probs (.., V) in the place of x_0, (.., V); x_t (..), s < t scalars or (B,)."""
    vocab_size, own = probs.shape[-1], x_t[..., None]
    a, alpha_s, alpha_t = survival(s, t, schedule), schedule.alpha(s), schedule.alpha(t)
    at_s = per_token(alpha_s, probs) * probs + per_token((1 - alpha_s) / vocab_size, probs)
    at_t = per_token(alpha_t, probs) * probs.gather(-1, own) + per_token((1 - alpha_t) / vocab_size, probs)
    joint = per_token((1 - a) / vocab_size, probs) * at_s
    return joint.scatter_add(-1, own, per_token(a, probs) * at_s.gather(-1, own)) / at_t


def odds(t: Tensor, schedule: NoiseSchedule, vocab_size: int) -> Tensor:
    """c = V alpha_t / (1 - alpha_t), float64; 0 at t = 1, and at t = 0, where it would be infinite and is not used."""
    alpha = schedule.alpha(t.double())
    return torch.where(alpha < 1, vocab_size * alpha / torch.where(alpha < 1, 1 - alpha, 1), 0)


def gain(law: Law, same: Tensor, c: Tensor) -> Tensor:
    """log <x_t, q_t(. | x_theta)> / <x_t, q_t(. | x_0)> (N,): by how much x_theta expects x_t more than x_0 does."""
    return torch.log1p(c * law.own.double().exp()) - same * torch.log1p(c)


def kl_rate(law: Law, same: Tensor, t: Tensor, schedule: NoiseSchedule, vocab_size: int) -> Tensor:
    """KL of the two reverse jump processes, that given x_0 and that by x_theta, nats per unit of time at t (N,).

    With r = -alpha' / alpha, x = V alpha x_0 + 1 - alpha, y = V alpha x_theta + 1 - alpha and i = x_t, the first jumps
    to j at the rate r/V x_j / x_i, the second at r/V y_j / y_i, and sum over j of lambda log(lambda / mu) - lambda + mu
    is r/V (sum_j x_j / x_i log(x_j y_i / (x_i y_j)) - V / x_i + V / y_i): every x and y sums to V. In c, with
    d = log(y_i / x_i) and e = 1 + c [x_t = x_0], the parenthesis is

        (log(1 + c) + c log((1 + c) / (1 + c x_theta[x_0])) - spread + (V + c) (d - 1 + exp(-d))) / e

    of order c^2, and r/V = -alpha' / (1 - alpha) / c: at t = 1, c = 0, the rate is 0.
    Args: law with the spread at c of t; same (N,) bool, x_t = x_0. Returns: (N,) float64.
    """
    c = odds(t, schedule, vocab_size)
    d, full = gain(law, same, c), torch.log1p(c)
    apart = full - law.spread.double() + c * (full - torch.log1p(c * law.true.double().exp()))
    total = (apart + (vocab_size + c) * (d + torch.expm1(-d))) / (1 + c * same)
    return torch.where(c > 0, schedule.flip_rate(t.double()) * total / torch.where(c > 0, c, 1), 0.0)


def kl_step(law: Law, same: Tensor, s: Tensor, t: Tensor, schedule: NoiseSchedule, vocab_size: int) -> Tensor:
    """KL(q(x_s | x_t, x_0) || q(x_s | x_t, x_theta)) in nats, (N,) float64; s < t (N,).

    For s = 0 it is -log p(x_0 | x_t), x_t's own evidence included.
    Args: law with the spread at c of s; same (N,) bool, x_t = x_0.
    """
    s, t = s.double(), t.double()
    c, later = odds(s, schedule, vocab_size), odds(t, schedule, vocab_size)
    evidence = gain(law, same, later)
    full, true = torch.log1p(c), torch.log1p(c * law.true.double().exp())
    everywhere = (
        full - law.spread.double() + c * (full - true)
    )  # sum over v of (1 + c x_0) log((1 + c x_0) / (1 + c x_theta))
    here = -(1 + c * same) * gain(law, same, c)  # its term v = x_t
    a = survival(s, t, schedule)
    shrink = (1 - schedule.alpha(s)) / (1 - schedule.alpha(t)) / (1 + later * same)
    moved = shrink * ((1 - a) / vocab_size * everywhere + a * here)
    return torch.where(s > 0, moved, -law.true.double()) + evidence


def laws(rows: Tensor, head: Tensor, x_t: Tensor, x_0: Tensor, c: Tensor) -> Law:
    """The `Law` at N positions, never holding their (N, V) logits at once.

    Args: rows (N, F) features; head (V, F); x_t, x_0 (N,); c (N,) of the time at which the spread is wanted.
    """

    def piece(some: Tensor, own: Tensor, true: Tensor, odd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = logits_of(some, head).log_softmax(-1)
        spread = torch.log1p(odd[:, None].to(log_p) * log_p.exp()).sum(-1)
        return log_p.gather(-1, own[:, None])[:, 0], log_p.gather(-1, true[:, None])[:, 0], spread

    chunk = chunk_rows(head)
    pieces = [
        checkpoint(piece, *some, use_reentrant=False)
        for some in zip(*(each.split(chunk) for each in (rows, x_t, x_0, c)))
    ]
    return Law(*(torch.cat(column) for column in zip(*pieces)))


def costs(
    model: Model,
    x_0: Tensor,
    s: Tensor,
    t: Tensor,
    cost: Callable[[Law, Tensor, Tensor, Tensor], Tensor],
    generator: Generator | None,
    label: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """cost(law, x_t = x_0, s, t) at one x_t ~ q(x_t | x_0), and -log x_theta[x_0], (B, L) each; s, t (B,).

    The law's spread is that of s: give s = t for a rate.
    """
    x_t = q_sample(x_0, t, model.schedule, model.mask_id, generator)
    each_s, each_t = (time[:, None].expand_as(x_0).flatten() for time in (s, t))
    rows, c = features(model, x_t, t, label).flatten(0, 1), odds(each_s, model.schedule, model.mask_id)
    law = laws(rows, model.head_matrix(), x_t.flatten(), x_0.flatten(), c)
    return cost(law, (x_t == x_0).flatten(), each_s, each_t).view_as(x_0), -law.true.view_as(x_0)


def training_loss(model: Model, batch: Batch, u: Tensor, objective: Objective, generator: Generator) -> Loss:
    """Compute the KL rate integrated over [T_MIN, 1], at one time a sequence, in nats per token.

    It is the bound without [0, T_MIN]. `objective` is ignored: the rate has weights of its own. The CE among the parts
    is that of x_theta, all positions count as masked, and the squared error is zero. Args: u (B,) times on (0, 1].
    """
    x_0, label, _ = batch
    t = T_MIN + (1 - T_MIN) * u
    schedule, vocab_size = model.schedule, model.mask_id
    rate, ce = costs(
        model, x_0, t, t, lambda law, same, s, t: kl_rate(law, same, t, schedule, vocab_size), generator, label
    )
    loss = (1 - T_MIN) * rate.mean().to(ce)
    count = torch.tensor(x_0.numel(), device=x_0.device)
    return Loss(loss, ce.detach().sum(), count, torch.zeros_like(loss.detach()))


@torch.no_grad()
def nelbo_parts(model: Model, x_0: Tensor, *, steps: int | None = None, generator: Generator | None = None) -> Bound:
    """The bound on -log p(x_0) in (B,) nats, one time drawn for each sequence, stratified over the batch.

    Args: x_0 (B, L); steps: None for continuous time, the integral of the KL rate over [T_MIN, 1] and [0, T_MIN] as one
    last step; or the number T of equal steps of `sample`. alpha_1 = 0, so the prior costs nothing.
    """
    check_steps(steps)
    schedule, vocab_size = model.schedule, model.mask_id

    def step(law: Law, same: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return kl_step(law, same, s, t, schedule, vocab_size)

    def rate(law: Law, same: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return kl_rate(law, same, t, schedule, vocab_size)

    u = stratified_times(len(x_0), generator, x_0.device)
    zero = torch.zeros_like(u)
    if steps is None:
        t = T_MIN + (1 - T_MIN) * u
        total = (1 - T_MIN) * costs(model, x_0, t, t, rate, generator)[0]
        total = total + costs(model, x_0, zero, torch.full_like(u, T_MIN), step, generator)[0]
    else:
        t = (u * steps).ceil() / steps
        s = torch.where(t < 1.5 / steps, zero, t - 1 / steps)  # the last step ends at 0 exactly
        total = steps * costs(model, x_0, s, t, step, generator)[0]
    discrete = total.sum(-1)
    return Bound(discrete, torch.zeros_like(discrete))


@torch.no_grad()
def sample(
    model: Model, x: Tensor, how: Sampling, seed: Tensor, callback: Callable[[Step], None] | None = None
) -> Tensor:
    """Draw x_0 (B, L) int64 by the chain of `posterior` in `steps` equal steps from t = 1, where all is noise, to 0.

    Temperature and top_p apply to x_theta. Every free position is drawn in every step, so the head runs at all of them.
    Args: x (B, L), mask_id where free: what is given never changes; seed (2,), at offset 0; callback
    sees a `Step` after each step,
    `fresh` where a token changed.
    """
    head, mask_id = model.head_matrix(), model.mask_id
    x = x.clone()
    rows = (x == mask_id).flatten().nonzero()[:, 0]
    x.view(-1)[rows] = (mask_id * philox.choices(seed, rows)[1]).long()  # u < 1 in float64, so never the mask
    times = time_grid(how, head.device)
    for index, (t, s) in enumerate(zip(times[:-1], times[1:])):
        seed[1] = index + 1
        before, best = x.clone(), x.flatten().clone()
        h, tau = features(model, before, t.expand(len(x))).flatten(0, 1), how.temperature_at(float(t))
        for some in rows.split(chunk_rows(head)):
            p = token_probs(logits_of(h[some], head)[None], mask_id, tau, how.top_p)
            best[some] = p.argmax(-1)
            p_s, (_, u) = posterior(x.view(-1)[some], p, s, t, model.schedule), philox.choices(seed, some)
            x.view(-1)[some] = draw(p_s, u, min(256, mask_id))  # a block wider than the V tokens would be padding
        if callback is not None:
            callback(seen(index, float(t), float(s), x, x != before, best.view_as(x)))
    return x
