"""Score entropy discrete diffusion with the absorbing state, SEDD (Lou et al., ICML 2024): it learns ratios, not a law.

At a masked position the ratio p_t(.. v ..) / p_t(.. m ..) is alpha / (1 - alpha) p(x_0 = v | x_t), and the network's
score is s_v = alpha / (1 - alpha) e^(f_v), not normalised. With sigma = -log alpha the score entropy of Lou et al. is

    sigma' (sum_v s_v - ratio log s_(x_0) + ratio (log ratio - 1)),   ratio = alpha / (1 - alpha)
    = -alpha' / (1 - alpha) (sum_v e^(f_v) - 1 - f_(x_0)) = -alpha' / (1 - alpha) (CE + Z - 1 - log Z)

with Z = sum_v e^(f_v) and CE that of softmax(f): the masked model's bound, and what it costs that Z is not 1. Here f is
the head's output less log V, so an untrained score has Z = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from cadd_min.baselines.common import draw_tokens, features, logits_of, seen
from cadd_min.kernels import philox
from cadd_min.loss import T_MIN, Bound, check_steps, chunk_rows, stratified_times
from cadd_min.model import Model
from cadd_min.objective import Batch, Loss, Objective
from cadd_min.orders import Sampling, time_grid
from cadd_min.sampler import Step
from cadd_min.schedule import NoiseSchedule, per_token


def masked_at(x_0: Tensor, t: Tensor, schedule: NoiseSchedule, generator: Generator | None) -> Tensor:
    """Which positions (B, L) are masked at times t (B,): each with probability 1 - alpha_t."""
    u = torch.rand(x_0.shape, generator=generator, device=x_0.device)
    return u >= per_token(schedule.alpha(t), u)


def scores(rows: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log Z, f_(x_0)) of N masked positions, never holding their (N, V) logits at once.

    Args: rows (N, F) features; head (V, F); targets (N,) the tokens x_0. Returns: (N,) each.
    """

    def piece(some: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        f = logits_of(some, head) - math.log(len(head))
        return f.logsumexp(-1), f.gather(-1, target[:, None])[:, 0]

    chunk = chunk_rows(head)
    pieces = [
        checkpoint(piece, some, target, use_reentrant=False)
        for some, target in zip(rows.split(chunk), targets.split(chunk))
    ]
    log_z, f = zip(*pieces)
    return torch.cat(log_z), torch.cat(f)


def score_entropy(log_z: Tensor, f: Tensor) -> Tensor:
    """Z - 1 - f_(x_0), 0 or more: what a masked position costs per unit of -alpha' / (1 - alpha)."""
    return torch.expm1(log_z) - f


def kl_step(log_z: Tensor, f: Tensor, rho: Tensor) -> Tensor:
    """KL(q(x_s | m, x_0) || p(x_s | m)) of the sampler's kernel, from rho_flip, log Z and f_(x_0), all (N,).

    q flips to x_0 with probability rho, p to v with rho e^(f_v). Where rho Z is 1 or more p never stays masked, and the
    KL is infinite; but for rho = 1, where q does not either and it is the CE of softmax(f).
    """
    rho, log_z = rho.double(), log_z.double()
    staying = torch.log1p(-rho) - torch.log1p(-(rho * log_z.exp()).clamp(max=1))
    stays = torch.where(rho < 1, (1 - rho) * staying, 0.0)
    over = torch.where(rho < 1, 0.0, log_z)  # the normalisation of the last step
    return rho * (over - f) + stays


def training_loss(model: Model, batch: Batch, u: Tensor, objective: Objective, generator: Generator) -> Loss:
    """Compute the score entropy integrated over [T_MIN, 1], at one time a sequence: the bound, in nats per token.

    `objective` is ignored: with other weights the score entropy is no bound. The CE among the parts is that of
    softmax(f), and the squared error is zero. Args: u (B,) times on (0, 1].
    """
    x_0, label, _ = batch
    t = T_MIN + (1 - T_MIN) * u
    masked = masked_at(x_0, t, model.schedule, generator)
    rows = masked.flatten().nonzero()[:, 0]
    h = features(model, x_0.masked_fill(masked, model.mask_id), t, label).flatten(0, 1)
    log_z, f = scores(h[rows], model.head_matrix(), x_0.flatten()[rows])
    weight = model.schedule.flip_rate(t)[rows // x_0.shape[1]].to(f)
    loss = (1 - T_MIN) * (weight * score_entropy(log_z, f)).sum() / x_0.numel()
    return Loss(loss, (log_z - f).detach().sum(), masked.sum(), torch.zeros_like(loss.detach()))


@torch.no_grad()
def nelbo_parts(model: Model, x_0: Tensor, *, steps: int | None = None, generator: Generator | None = None) -> Bound:
    """The bound on -log p(x_0) in (B,) nats, one time drawn for each sequence, stratified over the batch.

    Args: x_0 (B, L); steps: None for continuous time, the integral of the score entropy over [T_MIN, 1] and [0, T_MIN]
    as one last step; or the number T of equal steps of `sample`, whose bound is infinite if a step meets rho Z >= 1.
    """
    check_steps(steps)
    schedule, head = model.schedule, model.head_matrix()

    def at(s: Tensor, t: Tensor, cost: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """The sum over masked positions of cost(log Z, f, s, t), (B,)."""
        masked = masked_at(x_0, t, schedule, generator)
        h = features(model, x_0.masked_fill(masked, model.mask_id), t)
        total = torch.zeros(x_0.shape, dtype=torch.float64, device=x_0.device)
        if masked.any():
            each_s, each_t = (time[:, None].expand_as(x_0)[masked] for time in (s, t))
            total[masked] = cost(*scores(h[masked], head, x_0[masked]), each_s, each_t).double()
        return total.sum(-1)

    def step(log_z: Tensor, f: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return kl_step(log_z, f, schedule.rho_flip(s, t))

    u = stratified_times(len(x_0), generator, x_0.device)
    zero = torch.zeros_like(u)
    if steps is None:
        rate = at(zero, T_MIN + (1 - T_MIN) * u, lambda log_z, f, s, t: schedule.flip_rate(t) * score_entropy(log_z, f))
        discrete = (1 - T_MIN) * rate + at(zero, torch.full_like(u, T_MIN), step)
    else:
        t = (u * steps).ceil() / steps
        s = torch.where(t < 1.5 / steps, zero, t - 1 / steps)  # the last step ends at 0 exactly
        discrete = steps * at(s, t, step)
    return Bound(discrete, torch.zeros_like(discrete))


@torch.no_grad()
def sample(
    model: Model, x: Tensor, how: Sampling, seed: Tensor, callback: Callable[[Step], None] | None = None
) -> Tensor:
    """Draw x_0 (B, L) int64 by the analytic (Tweedie) sampler of Lou et al. in `steps` equal steps from t = 1 to 0.

    A masked position becomes v with probability rho_flip e^(f_v) and stays masked with what is left; where that leaves
    nothing, rho_flip Z > 1, and in the last step it draws from softmax(f). So it flips with probability
    min(1, rho_flip Z), and then draws from softmax(f), to which temperature and top_p apply.
    Args: x (B, L), mask_id where free: what is given never changes; seed (2,), at offset 0; callback
    sees a `Step` after each step.
    """
    head, mask_id = model.head_matrix(), model.mask_id
    x = x.clone()
    times = time_grid(how, head.device)
    for index, (t, s) in enumerate(zip(times[:-1], times[1:])):
        masked = x == mask_id
        rows = masked.flatten().nonzero()[:, 0]
        if len(rows) == 0:
            break
        seed[1] = index + 1
        h, tau = features(model, x, t.expand(len(x))).flatten(0, 1), how.temperature_at(float(t))
        best = x.flatten().clone()
        for some in rows.split(chunk_rows(head)):
            logits, (u_flip, u_token) = logits_of(h[some], head), philox.choices(seed, some)
            log_z = logits.double().logsumexp(-1) - math.log(len(head))
            flip = (u_flip < model.schedule.rho_flip(s, t) * log_z.exp()) | (s <= 0)
            x.view(-1)[some[flip]] = draw_tokens(logits[flip], mask_id, tau, how.top_p, u_token[flip])
            if callback is not None:
                best[some] = logits.argmax(-1)
        if callback is not None:
            callback(seen(index, float(t), float(s), x, masked & (x != mask_id), best.view_as(x)))
    return x
