"""Which masked positions are unmasked next, and when: the exact chain, and the field's other samplers.

A plan gives the times of the steps, and the four coefficients of each step. In the exact chain (Prop. 2) all masked
positions share them, and each position flips by itself with probability rho_flip. Remasking and first hitting keep
the marginals q(x_s | x_0) as well. Unmasking in an order trades variety for precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cadd_min.kernels import philox
from cadd_min.reverse import ZHATS, Decoding, step_coefficients, token_probs
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.cli import option
from cadd_min.utils.errors import InputError, choose

TIME_GRIDS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "cosine": lambda u: torch.sin(math.pi / 2 * u),  # few tokens first, many at the end (MaskGIT, Chang et al. 2022)
}
HITTING = "first-hitting"
# (N, V) probabilities of the masked positions -> (N,) how sure the network is of each.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "confidence": lambda p: p.amax(-1),  # MaskGIT, Chang et al. 2022, without its noise
    "entropy": lambda p: torch.special.entr(p).sum(-1).neg(),  # Dream and DiffuCoder, 2025; the paper on code
    "margin": lambda p: p.topk(2, -1).values.diff(dim=-1)[:, 0].neg(),  # gap between the two largest, Kim et al. 2025
}
ORDERS = ("random", *SCORES)
Temperature = float | Callable[[float], float]


@dataclass(frozen=True)
class Sampling:
    """How to sample: everything but the model, the prompt and the noise."""

    steps: int = option(128, "T, steps from noise to sample")
    zhat: str = option("hard", f"estimate of z_0 at each step: {', '.join(ZHATS)}")
    num_latents: int = option(1, "K, latents whose predictions are averaged, folded into the batch")
    temperature: Temperature = option(1.0, "of the draws; 0 takes the most probable")  # noqa: RUF009
    top_p: float = option(1.0, "draw from the smallest set with this probability")
    strength: float = option(1.0, "of the latent that the network sees; 0 ignores it")
    time_grid: str = option("uniform", f"{', '.join(TIME_GRIDS)}, or {HITTING}: a step for each token, --steps ignored")
    order: str = option("random", f"which tokens are unmasked first: {', '.join(ORDERS)}; random is the exact chain")
    block: int = option(0, "unmask blocks of this many tokens from left to right; 0: the whole sequence at once")
    remask: float = option(0.0, "chance that a token is masked again in a step, ReMDM's cap")

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("zhat", self.zhat, ZHATS),
            ("time grid", self.time_grid, (*TIME_GRIDS, HITTING)),
            ("order", self.order, ORDERS),
        ):
            choose(name, value, allowed)
        for name in ("steps", "num_latents"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not math.isfinite(self.strength):
            raise InputError(f"strength must be a number, not {self.strength}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0 <= self.remask <= 1:
            raise InputError(f"remask must be in [0, 1], not {self.remask}")
        if self.block < 0:
            raise InputError(f"block must be 0 or more, not {self.block}")
        if self.time_grid == HITTING and (self.in_order or self.remask):
            raise InputError(f"the time grid {HITTING} leaves no choice: order must be random, block and remask 0")

    @property
    def in_order(self) -> bool:
        """Whether a plan chooses which positions flip. In the exact chain each position flips by itself."""
        return self.order != "random" or self.block > 0

    def temperature_at(self, t: float) -> float:
        """Return the temperature at time t. Raises InputError where it is negative or infinite."""
        tau = self.temperature(t) if callable(self.temperature) else self.temperature
        if not 0 <= tau < math.inf:
            raise InputError(f"temperature must be 0 or more, not {tau}")
        return tau

    def decoding_at(self, t: float) -> Decoding:
        """Return how tokens and z0_hat are taken from the logits at time t."""
        return Decoding(self.zhat, self.temperature_at(t), self.top_p)


def cosine_temperature(start: float = 2.5, end: float = 1.0) -> Callable[[float], float]:
    """Make a temperature that falls from `start` at t = 1 to `end` at t = 0 along a half cosine: the paper's."""
    return lambda t: end + (start - end) * (1 - math.cos(math.pi * t)) / 2


def time_grid(settings: Sampling, device: torch.device) -> Tensor:
    """Return the times of the steps from 1 to 0, (T + 1,) float64."""
    grid = torch.linspace(1, 0, settings.steps + 1, dtype=torch.float64, device=device)
    return TIME_GRIDS[settings.time_grid](grid)


# ------------------------------------------------------------------------------------------------ the plans


class ExactChain:
    """Flip each masked position by itself with probability rho_flip.    (Prop. 2)

    times (T + 1, B) float64 are the times of each sequence. free (B, L) bool are the positions to draw. remasks says
    whether unmasked tokens may be masked again.
    """

    remasks = False

    def __init__(self, settings: Sampling, schedule: NoiseSchedule, free: Tensor):
        self.settings, self.schedule, self.free = settings, schedule, free
        self.times = self._times()

    def _times(self) -> Tensor:
        return time_grid(self.settings, self.free.device)[:, None].expand(-1, len(self.free))

    def remasked(self, masked: Tensor, s: Tensor, t: Tensor, seed: Tensor) -> Tensor:
        """Choose the unmasked tokens that are masked again after this step, (B, L) bool. The prompt's never are."""
        return torch.zeros_like(masked)

    def coefficients(
        self, logits: Tensor, rows: Tensor, masked: Tensor, remasked: Tensor, s: Tensor, t: Tensor, seed: Tensor
    ) -> Tensor:
        """Compute the coefficients of a step from t to s, (4,), or (4, N) for each of the N masked positions.

        Args: logits (K, N, V); rows (N,), the flat places of the masked positions; masked, remasked (B, L) bool; s, t
        (B,); seed (2,) of this step.
        """
        return step_coefficients(s[0], t[0], self.schedule)


class Remasking(ExactChain):
    """Mask tokens again with probability sigma_t, so that a mistake may be taken back (ReMDM, Wang et al. 2025)."""

    remasks = True

    def _sigma(self, s: Tensor, t: Tensor) -> Tensor:
        return remask_rate(self.settings.remask, s[0], t[0], self.schedule)

    def remasked(self, masked: Tensor, s: Tensor, t: Tensor, seed: Tensor) -> Tensor:
        if not self.remasks:
            return super().remasked(masked, s, t, seed)
        u = philox.choices(seed, torch.arange(masked.numel(), device=masked.device))[0].view(masked.shape)
        return self.free & ~masked & (u < self._sigma(s, t))

    def coefficients(
        self, logits: Tensor, rows: Tensor, masked: Tensor, remasked: Tensor, s: Tensor, t: Tensor, seed: Tensor
    ) -> Tensor:
        rho = remask_flip(self._sigma(s, t), s[0], t[0], self.schedule)
        return step_coefficients(s[0], t[0], self.schedule, rho)


class InOrder(Remasking):
    """Flip masked positions until a share 1 - alpha_s of the free positions is masked: by blocks, the surest first.

    With remask > 0 tokens are also masked again, and as many more positions flip.
    """

    def __init__(self, settings: Sampling, schedule: NoiseSchedule, free: Tensor, mask_id: int):
        super().__init__(settings, schedule, free)
        self.mask_id, self.remasks = mask_id, settings.remask > 0

    def coefficients(
        self, logits: Tensor, rows: Tensor, masked: Tensor, remasked: Tensor, s: Tensor, t: Tensor, seed: Tensor
    ) -> Tensor:
        left = (self.free.sum(1) * (1 - self.schedule.alpha(s[0]))).round().long()  # (B,) masked after this step
        length, block = masked.shape[1], self.settings.block or masked.shape[1]
        score = scores(self.settings.order, logits, self.mask_id, philox.choices(seed, rows)[0])
        count = masked.sum(1) + remasked.sum(1) - left
        flip = first_in_order(score, rows // length, rows % length // block, count)
        return step_coefficients(s[0], t[0], self.schedule, flip.double())  # rho_flip is 1 or 0


class FirstHitting(ExactChain):
    """Unmask one token a step, at the times at which the exact chain would (Zheng et al. 2024).

    The chain makes no error of discretisation in x. It takes as many steps as there are free tokens.
    """

    def __init__(self, settings: Sampling, schedule: NoiseSchedule, free: Tensor, seed: Tensor):
        check_hitting(settings, schedule)
        position = torch.arange(free.numel(), device=free.device)
        u = philox.choices(seed, position)[0].view(free.shape)
        self.hit = hitting_times(u, schedule).masked_fill(~free, 0)  # (B, L)
        super().__init__(settings, schedule, free)

    def _times(self) -> Tensor:
        last = torch.where(self.free, self.hit, torch.inf).amin(1).clamp(max=1)  # a prompt leaves fewer steps
        falling = torch.maximum(self.hit, last[:, None]).sort(1, descending=True).values.T
        return torch.cat([torch.ones_like(falling[:1]), falling])

    def coefficients(
        self, logits: Tensor, rows: Tensor, masked: Tensor, remasked: Tensor, s: Tensor, t: Tensor, seed: Tensor
    ) -> Tensor:
        sequence = rows // masked.shape[1]
        s, t = s[sequence], t[sequence]  # (N,) each
        flips = (self.hit.flatten()[rows] >= s).double()
        return step_coefficients(s, t, self.schedule, flips)


def check_hitting(settings: Sampling, schedule: NoiseSchedule) -> None:
    """Raise InputError for a step per token under a schedule that unmasks all tokens at once."""
    if settings.time_grid == HITTING and schedule.discrete == "all-at-once":
        raise InputError(f"the time grid {HITTING} is not for cdm, whose tokens are unmasked all at once")


def make_plan(settings: Sampling, schedule: NoiseSchedule, free: Tensor, mask_id: int, seed: Tensor) -> ExactChain:
    """Make the plan that the settings ask for.

    Args: free (B, L) bool, the positions to draw; seed (2,): the chain's, at offset 0.
    """
    if settings.time_grid == HITTING:
        return FirstHitting(settings, schedule, free, seed)
    if settings.in_order:
        return InOrder(settings, schedule, free, mask_id)
    return (Remasking if settings.remask else ExactChain)(settings, schedule, free)


# ------------------------------------------------------------------------------------------------ what they go by


def scores(order: str, logits: Tensor, mask_id: int, u: Tensor) -> Tensor:
    """Score how sure the network is of each masked position, (N,), from logits (K, N, V). "random" takes u (N,).

    The temperature and top-p of the draws have no part in it: at temperature 0 all positions would be equally sure, and
    the order would be from left to right.
    """
    return u if order == "random" else SCORES[order](token_probs(logits, mask_id))


def first_in_order(score: Tensor, sequence: Tensor, block: Tensor, count: Tensor) -> Tensor:
    """Choose in each sequence the `count` (B,) positions of largest score, earlier blocks first. Returns (N,) bool.

    Blocks from left to right make a diffusion model semi-autoregressive (Arriola et al. 2025; LLaDA, Nie et al. 2025).
    Args: score, sequence, block (N,): a position's score, its sequence, and its block in the sequence.
    """
    order = score.argsort(descending=True, stable=True)
    for key in (block, sequence):  # the least important key first, each sort stable
        order = order[key[order].argsort(stable=True)]
    held = torch.bincount(sequence, minlength=len(count))
    begins = held.cumsum(0) - held
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - begins[sequence[order]]
    return rank < count[sequence]


def remask_rate(most: float, s: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Compute sigma_t = min(most, (1 - alpha_s) / alpha_t), the chance that an unmasked token is masked again.

    ReMDM's capped schedule: with `remask_flip` in the place of rho_flip the marginals q(x_s | x_0) stay what they are.
    sigma is zero at s = 0.
    """
    alpha_s, alpha_t = schedule.alpha(s), schedule.alpha(t)
    return torch.where(alpha_t > 0, (1 - alpha_s) / alpha_t.clamp(min=1e-9), 0).clamp(max=most)


def remask_flip(sigma: Tensor, s: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Compute P(x_s = x_0 | x_t = m) = (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t). sigma = 0 gives rho_flip."""
    alpha_t = schedule.alpha(t)
    return schedule.rho_flip(s, t) + sigma * alpha_t / (1 - alpha_t)


def hitting_times(u: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Solve 1 - alpha_t = u for t: the time at which a token is unmasked, for uniforms u of any shape.

    By bisection, to 1e-12.
    """
    low, high = torch.zeros_like(u), torch.ones_like(u)
    for _ in range(40):
        middle = (low + high) / 2
        below = 1 - schedule.alpha(middle) < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high
