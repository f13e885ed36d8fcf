"""Score entropy discrete diffusion (SEDD, Lou et al., ICML 2024) with the absorbing state: the network learns ratios.

Take a masked position. The ratio to learn is p_t with the token v there, over p_t with the mask m there. The network's
score s_v of it is not normalised:

    p_t(.. v ..) / p_t(.. m ..) = alpha / (1 - alpha) p(x_0 = v | x_t)
                            s_v = alpha / (1 - alpha) e^(f_v)

With sigma = -log alpha the score entropy of Lou et al. is

    sigma' (sum_v s_v - ratio log s_(x_0) + ratio (log ratio - 1)),   ratio = alpha / (1 - alpha)
    = -alpha' / (1 - alpha) (sum_v e^(f_v) - 1 - f_(x_0))
    = -alpha' / (1 - alpha) (CE + Z - 1 - log Z),   Z = sum_v e^(f_v),   CE = log Z - f_(x_0)

CE is the cross-entropy of softmax(f). Its term is the masked model's bound. The rest is the cost of a Z that is not 1.
f is the head's output less log V, so an untrained score has Z = 1.

Shapes: tokens (B, L), times (B,); N masked positions have features (N, F), log Z (N,) and f_(x_0) (N,).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from cadd_min.baselines.common import draw_tokens, features, logits_of, step_without_latents
from cadd_min.kernels import philox
from cadd_min.loss import T_MIN, Bound, check_steps, chunk_rows, step_times, stratified_times
from cadd_min.model import Model
from cadd_min.objective import Batch, Loss, Objective
from cadd_min.orders import Sampling, time_grid
from cadd_min.sampler import Step
from cadd_min.schedule import NoiseSchedule, per_token


def masked_at(x_0: Tensor, t: Tensor, schedule: NoiseSchedule, generator: Generator | None) -> Tensor:
    """Draw which positions (B, L) of x_0 are masked at times t (B,): each with probability 1 - alpha_t."""
    u = torch.rand(x_0.shape, generator=generator, device=x_0.device)
    return u >= per_token(schedule.alpha(t), u)


def scores(rows: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (log Z, f_(x_0)) of N masked positions, (N,) each. Their (N, V) logits are never held at once.

    Args: rows (N, F): features; head (V, F); targets (N,): the tokens x_0.
    """

    def chunk_scores(h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Compute both columns for some of the positions."""
        f = logits_of(h, head) - math.log(len(head))  # (chunk, V)
        return f.logsumexp(-1), f.gather(-1, target[:, None])[:, 0]

    chunk = chunk_rows(head)
    chunks = [
        checkpoint(chunk_scores, h, target, use_reentrant=False)
        for h, target in zip(rows.split(chunk), targets.split(chunk))
    ]
    log_z, f = zip(*chunks)
    return torch.cat(log_z), torch.cat(f)


def score_entropy(log_z: Tensor, f: Tensor) -> Tensor:
    """Compute Z - 1 - f_(x_0), 0 or more: the cost of a masked position per unit of -alpha' / (1 - alpha)."""
    return torch.expm1(log_z) - f


def kl_step(log_z: Tensor, f: Tensor, rho: Tensor) -> Tensor:
    """Compute KL(q(x_s | m, x_0) || p(x_s | m)) of the sampler's kernel, (N,) float64 nats.

    q flips to x_0 with probability rho, p flips to v with probability rho e^(f_v). Otherwise both stay masked. If rho Z
    is 1 or more, p never stays masked, and the KL is infinite. At rho = 1 neither stays masked: p is softmax(f), and
    the KL is its CE.
    Args: log_z, f, rho (N,): log Z, f_(x_0) and rho_flip.
    """
    rho, log_z = rho.double(), log_z.double()
    log_ratio = torch.log1p(-rho) - torch.log1p(-(rho * log_z.exp()).clamp(max=1))  # log q(m | m) / p(m | m)
    stay = torch.where(rho < 1, (1 - rho) * log_ratio, 0.0)
    log_norm = torch.where(rho < 1, 0.0, log_z)  # only the last step is normalised
    return rho * (log_norm - f) + stay


def training_loss(model: Model, batch: Batch, u: Tensor, objective: Objective, generator: Generator) -> Loss:
    """Estimate the bound on [T_MIN, 1] in nats per token: the integral of the score entropy, at one time a sequence.

    `objective` is ignored: with other weights the score entropy is no bound. The CE among the loss's parts is that of
    softmax(f), and the squared error is zero. Args: u (B,): times on (0, 1].
    """
    x_0 = batch.x_0
    t = T_MIN + (1 - T_MIN) * u
    masked = masked_at(x_0, t, model.schedule, generator)
    rows = masked.flatten().nonzero()[:, 0]  # (N,)
    h = features(model, x_0.masked_fill(masked, model.mask_id), t).flatten(0, 1)  # (B L, F)
    log_z, f = scores(h[rows], model.head_matrix(), x_0.flatten()[rows])
    weight = model.schedule.flip_rate(t)[rows // x_0.shape[1]].to(f)  # (N,)
    loss = (1 - T_MIN) * (weight * score_entropy(log_z, f)).sum() / x_0.numel()
    return Loss(loss, (log_z - f).detach().sum(), masked.sum(), torch.zeros_like(loss.detach()))


@torch.no_grad()
def nelbo_parts(model: Model, x_0: Tensor, *, steps: int | None = None, generator: Generator | None = None) -> Bound:
    """Estimate the bound on -log p(x_0), (B,) nats, at one time for each sequence, stratified over the batch.

    Args: x_0 (B, L). steps: None for continuous time, which integrates the score entropy over [T_MIN, 1] and takes
    [0, T_MIN] as one last step; or the number T of equal steps of `sample`. The bound of T steps is infinite if
    rho_flip Z is 1 or more in a step before the last. Raises InputError for steps below 1.
    """
    check_steps(steps)
    schedule, head = model.schedule, model.head_matrix()

    def cost_at(s: Tensor, t: Tensor, cost: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Sum cost(log Z, f, s, t) over the positions masked at t: (B,) nats. Args: s, t (B,)."""
        masked = masked_at(x_0, t, schedule, generator)
        h = features(model, x_0.masked_fill(masked, model.mask_id), t)  # (B, L, F)
        total = torch.zeros(x_0.shape, dtype=torch.float64, device=x_0.device)
        if masked.any():
            s, t = (time[:, None].expand_as(x_0)[masked] for time in (s, t))  # (N,)
            total[masked] = cost(*scores(h[masked], head, x_0[masked]), s, t).double()
        return total.sum(-1)

    def step(log_z: Tensor, f: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return kl_step(log_z, f, schedule.rho_flip(s, t))

    def rate(log_z: Tensor, f: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return schedule.flip_rate(t) * score_entropy(log_z, f)

    u = stratified_times(len(x_0), generator, x_0.device)
    zero = torch.zeros_like(u)
    if steps is None:
        discrete = (1 - T_MIN) * cost_at(zero, T_MIN + (1 - T_MIN) * u, rate)
        discrete = discrete + cost_at(zero, torch.full_like(u, T_MIN), step)
    else:
        s, t = step_times(u, steps)
        discrete = steps * cost_at(s, t, step)
    return Bound(discrete, torch.zeros_like(discrete))


@torch.no_grad()
def sample(
    model: Model, x: Tensor, settings: Sampling, seed: Tensor, callback: Callable[[Step], None] | None = None
) -> Tensor:
    """Draw x_0 (B, L) int64 by the analytic (Tweedie) sampler of Lou et al., from t = 1 to 0.

    A masked position becomes v with probability rho_flip e^(f_v) and stays masked with the remaining probability.
    Where nothing remains (rho_flip Z > 1), and in the last step, the token is drawn from softmax(f). So a position
    flips with probability min(1, rho_flip Z). Its token is then drawn from softmax(f), to which temperature and top_p
    apply.
    Args: x (B, L): the given tokens, which never change, and mask_id where a token is to be drawn. settings: steps are
    equal under the uniform time grid. seed (2,): at offset 0. callback: gets a `Step` after each step.
    """
    head, mask_id = model.head_matrix(), model.mask_id
    x = x.clone()
    times = time_grid(settings, head.device)  # (T + 1,)
    seeds = philox.step_seeds(seed, len(times))
    for index, (t, s) in enumerate(zip(times[:-1], times[1:])):
        masked = x == mask_id  # (B, L)
        rows = masked.flatten().nonzero()[:, 0]  # (N,)
        if len(rows) == 0:
            break
        seed = seeds[index + 1]
        h, tau = features(model, x, t.expand(len(x))).flatten(0, 1), settings.temperature_at(float(t))  # h (B L, F)
        best = x.flatten().clone()
        for chunk in rows.split(chunk_rows(head)):
            logits, (u_flip, u_token) = logits_of(h[chunk], head), philox.choices(seed, chunk)
            log_z = logits.double().logsumexp(-1) - math.log(len(head))
            flip = (u_flip < model.schedule.rho_flip(s, t) * log_z.exp()) | (s <= 0)
            x.view(-1)[chunk[flip]] = draw_tokens(logits[flip], mask_id, tau, settings.top_p, u_token[flip])
            if callback is not None:
                best[chunk] = logits.argmax(-1)
        if callback is not None:
            callback(step_without_latents(index, float(t), float(s), x, masked & (x != mask_id), best.view_as(x)))
    return x
