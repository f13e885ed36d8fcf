"""Which masked positions are unmasked next, and when: the field's samplers beside the exact chain.

The exact chain (Prop. 2) flips each masked position by itself with probability rho_flip: order "random". The others
take as many positions a step, so that the masked share follows 1 - alpha_t, but the surest first. They no longer sample
the model's law: they trade variety for precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cadd_min.reverse import token_probs
from cadd_min.schedule import NoiseSchedule

# (N, V) probabilities of the masked positions -> (N,) how much each wants to be unmasked.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "confidence": lambda p: p.amax(-1),  # MaskGIT, Chang et al. 2022, without its noise
    "entropy": lambda p: torch.special.entr(p).sum(-1).neg(),  # Dream and DiffuCoder, 2025; the paper's code runs
    "margin": lambda p: p.topk(2, -1).values.diff(dim=-1)[:, 0].neg(),  # the two best apart, Kim et al. 2025
}
ORDERS = ("random", *SCORES)


def scores(order: str, logits: Tensor, mask_id: int, u: Tensor) -> Tensor:
    """(N,) preference of each masked position, from its logits (K, N, V); "random" takes the uniforms u (N,).

    How sure the network is, whatever the temperature and top-p that tokens are drawn with: at temperature 0 all
    positions would be equally sure, and the order would be from left to right.
    """
    return u if order == "random" else SCORES[order](token_probs(logits, mask_id))


def foremost(score: Tensor, sequence: Tensor, block: Tensor, count: Tensor) -> Tensor:
    """(N,) bool: of each sequence the `count` (B,) positions of largest score, those of an earlier block first.

    Blocks from left to right make a diffusion model semi-autoregressive (Arriola et al. 2025; LLaDA, Nie et al. 2025).
    Args: score, sequence, block (N,): a position's score, the sequence it is of, and its block there.
    """
    order = score.argsort(descending=True, stable=True)
    for key in (block, sequence):  # least important key first, each sort stable
        order = order[key[order].argsort(stable=True)]
    held = torch.bincount(sequence, minlength=len(count))
    begins = held.cumsum(0) - held
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - begins[sequence[order]]
    return rank < count[sequence]


def remask_rate(most: float, s: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """sigma_t = min(most, (1 - alpha_s) / alpha_t): the chance that an unmasked token is masked again, from t to s.

    ReMDM's capped schedule (Wang et al. 2025): a mistake may be taken back, and with `remask_flip` in the place of
    rho_flip the marginals q(x_s | x_0) stay what they are. Zero at s = 0.
    """
    alpha_s, alpha_t = schedule.alpha(s), schedule.alpha(t)
    return torch.where(alpha_t > 0, (1 - alpha_s) / alpha_t.clamp(min=1e-9), 0).clamp(max=most)


def remask_flip(sigma: Tensor, s: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """P(x_s = x_0 | x_t = m) = (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t); rho_flip for sigma = 0."""
    alpha_t = schedule.alpha(t)
    return schedule.rho_flip(s, t) + sigma * alpha_t / (1 - alpha_t)


def hitting_times(u: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The time at which a token is unmasked on the way down, 1 - alpha = u, for uniforms u of any shape.

    Drawn beforehand, the chain needs as many steps as tokens and makes no error of discretisation in x (first-hitting
    sampler, Zheng et al. 2024). By bisection, to 1e-12.
    """
    low, high = torch.zeros_like(u), torch.ones_like(u)
    for _ in range(40):
        middle = (low + high) / 2
        below = 1 - schedule.alpha(middle) < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high
