"""Uniform-state diffusion: noise is a random token, not a mask, and every token may change until the end.

UDLM (Schiff et al. 2024), Duo (Sahoo et al. 2025), SEDD-uniform (Lou et al. 2024). With V tokens and no mask

    q(x_t | x_0)      = alpha_t x_0 + (1 - alpha_t) / V
    q(x_s | x_t, x_0) = [a x_t + (1 - a) / V] [alpha_s x_0 + (1 - alpha_s) / V] / <x_t, q(x_t | x_0)>

with a = alpha_t / alpha_s. Tokens are one-hot rows, and products are elementwise. The model puts x_theta in the place
of x_0. This is exact if x_theta is the law of x_0^i given the other positions of x_t: the formula itself adds what
x_t^i tells.

All costs are written with

    c = V alpha / (1 - alpha),   so that   V alpha x + 1 - alpha = (1 - alpha) (1 + c x)

As alpha goes to 0 the costs are proportional to c, and log(1 + c x) by log1p keeps its digits.

Shapes: tokens (B, L), times (B,), x_theta (.., V); costs are computed at N = B L flat positions, (N,) each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from cadd_min.baselines.common import features, logits_of, step_without_latents
from cadd_min.kernels import philox
from cadd_min.loss import T_MIN, Bound, check_steps, chunk_rows, step_times, stratified_times
from cadd_min.model import Model
from cadd_min.objective import Batch, Loss, Objective
from cadd_min.orders import Sampling, time_grid
from cadd_min.reverse import draw, token_probs
from cadd_min.sampler import Step
from cadd_min.schedule import NoiseSchedule, per_token, ratio


class Law(NamedTuple):
    """Statistics of x_theta at N positions, (N,) each: two log probabilities, and a sum over all tokens."""

    own: Tensor  # log x_theta[x_t]
    true: Tensor  # log x_theta[x_0]
    spread: Tensor  # sum over v of log(1 + c x_theta[v])


def q_sample(
    x_0: Tensor, t: Tensor, schedule: NoiseSchedule, vocab_size: int, generator: Generator | None = None
) -> Tensor:
    """Draw x_t (B, L) at times t (B,): x_0 (B, L) with probability alpha_t, else one of V tokens, equally likely."""
    u = torch.rand(x_0.shape, generator=generator, device=x_0.device)
    noise = torch.randint(vocab_size, x_0.shape, generator=generator, device=x_0.device)
    return torch.where(u < per_token(schedule.alpha(t), u), x_0, noise)


def survival(s: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Compute a = alpha_t / alpha_s, the probability of no noise between s and t; 1 for s = t = 1."""
    return ratio(schedule.alpha(t), schedule.alpha(s))


def posterior(x_t: Tensor, probs: Tensor, s: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Compute q(x_s | x_t, x_0) (.., V) with probs (.., V) in the place of x_0. Args: x_t (..); s < t: scalars or (B,).

    Dividing by at_t, the probability of x_t, normalises the product.
    """
    vocab_size, own = probs.shape[-1], x_t[..., None]  # own (.., 1)
    a, alpha_s, alpha_t = survival(s, t, schedule), schedule.alpha(s), schedule.alpha(t)
    at_s = per_token(alpha_s, probs) * probs + per_token((1 - alpha_s) / vocab_size, probs)
    at_t = per_token(alpha_t, probs) * probs.gather(-1, own) + per_token((1 - alpha_t) / vocab_size, probs)
    joint = per_token((1 - a) / vocab_size, probs) * at_s
    return joint.scatter_add(-1, own, per_token(a, probs) * at_s.gather(-1, own)) / at_t


def odds(t: Tensor, schedule: NoiseSchedule, vocab_size: int) -> Tensor:
    """Compute c = V alpha_t / (1 - alpha_t), float64: 0 at t = 1. At t = 0 it is V 1e20, and not used."""
    alpha = schedule.alpha(t.double())
    return vocab_size * alpha / (1 - alpha).clamp(min=1e-20)


def gain(law: Law, same: Tensor, c: Tensor) -> Tensor:
    """Compute log(<x_t, q_t(. | x_theta)> / <x_t, q_t(. | x_0)>), (N,) nats: what x_theta adds to log p(x_t).

    Args: same (N,) bool: x_t = x_0; c (N,): at the time t of q_t.
    """
    return torch.log1p(c * law.own.double().exp()) - same * torch.log1p(c)


def kl_rate(law: Law, same: Tensor, t: Tensor, schedule: NoiseSchedule, vocab_size: int) -> Tensor:
    """Compute the KL rate between two reverse jump processes, given x_0 and by x_theta, in nats per unit of time.

    Let i = x_t. The process given x_0 jumps from i to j at the rate lambda_j, and the process by x_theta at mu_j:

        lambda_j = r/V x_j / x_i,   x = V alpha x_0 + 1 - alpha,   r = -alpha' / alpha
        mu_j     = r/V y_j / y_i,   y = V alpha x_theta + 1 - alpha

    The vectors x and y sum to V each. The KL rate is therefore

        sum over j of lambda_j log(lambda_j / mu_j) - lambda_j + mu_j
        = r/V (sum_j x_j / x_i log(x_j y_i / (x_i y_j)) - V / x_i + V / y_i)

    With d = log(y_i / x_i) and e = 1 + c [x_t = x_0], the parenthesis is

        (log(1 + c) + c log((1 + c) / (1 + c x_theta[x_0])) - spread + (V + c) (d - 1 + exp(-d))) / e

    It is of order c^2, and r/V = -alpha' / (1 - alpha) / c. So at t = 1, where c = 0, the rate is 0.
    Args: law: its spread is at the c of t; same (N,) bool: x_t = x_0; t (N,). Returns: (N,) float64.
    """
    c = odds(t, schedule, vocab_size)
    d, log1p_c = gain(law, same, c), torch.log1p(c)
    log_ratios = log1p_c - law.spread.double() + c * (log1p_c - torch.log1p(c * law.true.double().exp()))
    total = (log_ratios + (vocab_size + c) * (d + torch.expm1(-d))) / (1 + c * same)
    return torch.where(c > 0, schedule.flip_rate(t.double()) * total / torch.where(c > 0, c, 1), 0.0)


def kl_step(law: Law, same: Tensor, s: Tensor, t: Tensor, schedule: NoiseSchedule, vocab_size: int) -> Tensor:
    """Compute KL(q(x_s | x_t, x_0) || q(x_s | x_t, x_theta)), (N,) float64 nats, for s < t (N,).

    Let c_s and c_t be the c of both times, and x_0 a one-hot row. For s > 0,

        KL        = scale ((1 - a) / V sum_v k_v + a k_(x_t)) + gain at t
        scale     = (1 - alpha_s) / (1 - alpha_t) / (1 + c_t [x_t = x_0])
        k_v       = (1 + c_s x_0[v]) log((1 + c_s x_0[v]) / (1 + c_s x_theta[v]))
        sum_v k_v = log(1 + c_s) + c_s log((1 + c_s) / (1 + c_s x_theta[x_0])) - spread
        k_(x_t)   = -(1 + c_s [x_t = x_0]) gain at s

    For s = 0 it is -log p(x_0 | x_t) = -log x_theta[x_0] + gain at t, which includes what x_t itself tells.
    Args: law: its spread is at c_s; same (N,) bool: x_t = x_0.
    """
    s, t = s.double(), t.double()
    c_s, c_t = odds(s, schedule, vocab_size), odds(t, schedule, vocab_size)
    log1p_c, log1p_true = torch.log1p(c_s), torch.log1p(c_s * law.true.double().exp())
    k_sum = log1p_c - law.spread.double() + c_s * (log1p_c - log1p_true)
    k_x_t = -(1 + c_s * same) * gain(law, same, c_s)
    a = survival(s, t, schedule)
    scale = (1 - schedule.alpha(s)) / (1 - schedule.alpha(t)) / (1 + c_t * same)
    before_gain = torch.where(s > 0, scale * ((1 - a) / vocab_size * k_sum + a * k_x_t), -law.true.double())
    return before_gain + gain(law, same, c_t)


def laws(rows: Tensor, head: Tensor, x_t: Tensor, x_0: Tensor, c: Tensor) -> Law:
    """Compute the `Law` at N positions. Their (N, V) logits are never held at once.

    Args: rows (N, F): features; head (V, F); x_t, x_0 (N,); c (N,): of the time at which the spread is wanted.
    """

    def chunk_law(h: Tensor, x_t: Tensor, x_0: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the law's three columns for some of the positions."""
        log_p = logits_of(h, head).log_softmax(-1)  # (chunk, V)
        spread = torch.log1p(c[:, None].to(log_p) * log_p.exp()).sum(-1)
        return log_p.gather(-1, x_t[:, None])[:, 0], log_p.gather(-1, x_0[:, None])[:, 0], spread

    size = chunk_rows(head)
    chunks = [
        checkpoint(chunk_law, *chunk, use_reentrant=False)
        for chunk in zip(rows.split(size), x_t.split(size), x_0.split(size), c.split(size))
    ]
    return Law(*(torch.cat(column) for column in zip(*chunks)))


def costs(
    model: Model,
    x_0: Tensor,
    s: Tensor,
    t: Tensor,
    cost: Callable[[Law, Tensor, Tensor, Tensor], Tensor],
    generator: Generator | None,
) -> tuple[Tensor, Tensor]:
    """Compute cost(law, x_t = x_0, s, t) at one x_t ~ q(x_t | x_0), and -log x_theta[x_0], (B, L) each.

    Args: x_0 (B, L); s, t (B,). The law's spread is at the c of s: pass s = t for a rate.
    """
    vocab_size = model.mask_id  # tokens are 0 to V - 1, and the mask, which is not used, is V
    x_t = q_sample(x_0, t, model.schedule, vocab_size, generator)
    h = features(model, x_t, t).flatten(0, 1)  # (B L, F)
    s, t = (time[:, None].expand_as(x_0).flatten() for time in (s, t))  # (B L,)
    law = laws(h, model.head_matrix(), x_t.flatten(), x_0.flatten(), odds(s, model.schedule, vocab_size))
    return cost(law, (x_t == x_0).flatten(), s, t).view_as(x_0), -law.true.view_as(x_0)


def training_loss(model: Model, batch: Batch, u: Tensor, objective: Objective, generator: Generator) -> Loss:
    """Estimate the bound on [T_MIN, 1] in nats per token: the integral of the KL rate, at one time a sequence.

    `objective` is ignored: the KL rate has weights of its own. The CE among the loss's parts is that of x_theta. All
    positions count as masked, and the squared error is zero. Args: u (B,): times on (0, 1].
    """
    x_0 = batch.x_0
    t = T_MIN + (1 - T_MIN) * u
    schedule, vocab_size = model.schedule, model.mask_id

    def rate(law: Law, same: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return kl_rate(law, same, t, schedule, vocab_size)

    rates, ce = costs(model, x_0, t, t, rate, generator)  # (B, L) each
    loss = (1 - T_MIN) * rates.mean().to(ce)
    count = torch.tensor(x_0.numel(), device=x_0.device)
    return Loss(loss, ce.detach().sum(), count, torch.zeros_like(loss.detach()))


@torch.no_grad()
def nelbo_parts(model: Model, x_0: Tensor, *, steps: int | None = None, generator: Generator | None = None) -> Bound:
    """Estimate the bound on -log p(x_0), (B,) nats, at one time for each sequence, stratified over the batch.

    The prior costs nothing, as alpha_1 = 0.
    Args: x_0 (B, L). steps: None for continuous time, which integrates the KL rate over [T_MIN, 1] and takes [0, T_MIN]
    as one last step; or the number T of equal steps of `sample`. Raises InputError for steps below 1.
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
        s, t = step_times(u, steps)
        total = steps * costs(model, x_0, s, t, step, generator)[0]
    discrete = total.sum(-1)  # (B,)
    return Bound(discrete, torch.zeros_like(discrete))


@torch.no_grad()
def sample(
    model: Model, x: Tensor, settings: Sampling, seed: Tensor, callback: Callable[[Step], None] | None = None
) -> Tensor:
    """Draw x_0 (B, L) int64 by the chain of `posterior` from t = 1, where every token is noise, to 0.

    Temperature and top_p apply to x_theta. Every position that is not given is drawn again in every step, so the head
    runs at all of them.
    Args: x (B, L): the given tokens, which never change, and mask_id where a token is to be drawn. settings: steps are
    equal under the uniform time grid. seed (2,): at offset 0. callback: gets a `Step` after each step, `fresh` where a
    token changed.
    """
    head, mask_id = model.head_matrix(), model.mask_id
    x = x.clone()
    rows = (x == mask_id).flatten().nonzero()[:, 0]  # (N,)
    x.view(-1)[rows] = (mask_id * philox.choices(seed, rows)[1]).long()  # u < 1 in float64, so never the mask
    times = time_grid(settings, head.device)  # (T + 1,)
    seeds = philox.step_seeds(seed, len(times))
    for index, (t, s) in enumerate(zip(times[:-1], times[1:])):
        seed = seeds[index + 1]
        x_t, best = x.clone(), x.flatten().clone()
        h, tau = features(model, x_t, t.expand(len(x))).flatten(0, 1), settings.temperature_at(float(t))  # h (B L, F)
        for chunk in rows.split(chunk_rows(head)):
            p = token_probs(logits_of(h[chunk], head)[None], mask_id, tau, settings.top_p)  # (chunk, V)
            best[chunk] = p.argmax(-1)
            p_s, (_, u) = posterior(x.view(-1)[chunk], p, s, t, model.schedule), philox.choices(seed, chunk)
            x.view(-1)[chunk] = draw(p_s, u, min(256, mask_id))  # a block wider than the V tokens would be padding
        if callback is not None:
            callback(step_without_latents(index, float(t), float(s), x, x != x_t, best.view_as(x)))
    return x
