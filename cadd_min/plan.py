"""How to sample: the options, and the plan that follows from them, which says when each position flips."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cadd_min.kernels import philox
from cadd_min.orders import ORDERS, foremost, hitting_times, remask_flip, remask_rate, scores
from cadd_min.reverse import ZHATS
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.cli import option
from cadd_min.utils.errors import InputError, choose

TIME_GRIDS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "cosine": lambda u: torch.sin(math.pi / 2 * u),  # few tokens first, many at the end (MaskGIT, Chang et al. 2022)
}
HITTING = "first-hitting"
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
        """Whether it is chosen which positions flip; else each flips by itself, the exact chain."""
        return self.order != "random" or self.block > 0

    def heat(self, t: float) -> float:
        """The temperature at time t."""
        tau = self.temperature(t) if callable(self.temperature) else self.temperature
        if not 0 <= tau < math.inf:
            raise InputError(f"temperature must be 0 or more, not {tau}")
        return tau


def cosine_temperature(start: float = 2.5, end: float = 1.0) -> Callable[[float], float]:
    """A temperature that falls from `start` at t = 1 to `end` at t = 0 along a half cosine (the paper's for images)."""
    return lambda t: end + (start - end) * (1 - math.cos(math.pi * t)) / 2


def time_grid(options: Sampling, device: torch.device) -> Tensor:
    """(T + 1,) float64 times of the steps, from 1 to 0."""
    grid = torch.linspace(1, 0, options.steps + 1, dtype=torch.float64, device=device)
    return TIME_GRIDS[options.time_grid](grid)


def given(shape: tuple[int, int], mask_id: int, prompt: Tensor | None, device: torch.device, tokens: int = 0) -> Tensor:
    """x_1 (B, L) int64 where every chain starts: mask_id, but where the prompt (B, L) gives a token.

    Raises: InputError for a prompt of another shape, or with numbers beyond mask_id and the number of tokens.
    """
    if prompt is None:
        return torch.full(shape, mask_id, device=device)
    if tuple(prompt.shape) != tuple(shape):
        raise InputError(f"prompt must have the shape {tuple(shape)} of the samples, not {tuple(prompt.shape)}")
    if not ((0 <= prompt) & (prompt < max(mask_id + 1, tokens))).all():
        raise InputError(f"prompt must hold token ids, or {mask_id} where free")
    return prompt.to(device, torch.int64, copy=True)


def check_hitting(options: Sampling, schedule: NoiseSchedule) -> None:
    """Raise InputError for a step for each token where the schedule unmasks all at once."""
    if options.time_grid == HITTING and schedule.discrete == "gone":
        raise InputError(f"the time grid {HITTING} is not for cdm, whose tokens are unmasked all at once")


class Plan:
    """When each position flips: the times of the steps (T + 1, B), and at each what flips and what is masked again.

    free (B, L) are the positions to draw; seed (2,) is the chain's, at offset 0.
    """

    def __init__(self, options: Sampling, schedule: NoiseSchedule, free: Tensor, seed: Tensor):
        self.options, self.schedule, self.free, self.seed = options, schedule, free, seed
        self.hit: Tensor | None = None
        check_hitting(options, schedule)
        if options.time_grid == HITTING:
            position = torch.arange(free.numel(), device=free.device)
            u = philox.choices(seed, position)[0].view(free.shape)
            self.hit = hitting_times(u, schedule).masked_fill(~free, 0)
            last = torch.where(free, self.hit, torch.inf).amin(1).clamp(max=1)  # a prompt leaves fewer steps
            falling = torch.maximum(self.hit, last[:, None]).sort(1, descending=True).values.T
            self.times = torch.cat([torch.ones_like(falling[:1]), falling])
        else:
            self.times = time_grid(options, free.device)[:, None].expand(-1, len(free))

    def clock(self, s: Tensor, t: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """s and t (B,) as the step wants them: scalars, or (N,) where each sequence has its own."""
        return (s[0], t[0]) if self.hit is None else (s[self._sequence(rows)], t[self._sequence(rows)])

    def again(self, x: Tensor, mask_id: int, s: Tensor, t: Tensor) -> Tensor:
        """(B, L) bool: unmasked tokens, none of the prompt's, that are masked again in this step."""
        if not self.options.remask:
            return torch.zeros_like(self.free)
        u = philox.choices(self.seed, torch.arange(x.numel(), device=x.device))[0].view(x.shape)
        return self.free & (x != mask_id) & (u < remask_rate(self.options.remask, s[0], t[0], self.schedule))

    def flips(
        self,
        logits: Tensor,
        rows: Tensor,
        masked: Tensor,
        again: Tensor,
        s: Tensor,
        t: Tensor,
        tau: float,
        mask_id: int,
    ) -> Tensor | None:
        """rho_flip of the masked positions: None (the schedule's), a scalar, or (N,), which flip."""
        options = self.options
        if self.hit is not None:
            return (self.hit.flatten()[rows] >= s).double()
        if not options.in_order:
            sigma = remask_rate(options.remask, s, t, self.schedule)
            return remask_flip(sigma, s, t, self.schedule) if options.remask else None
        left = (self.free.sum(1) * (1 - self.schedule.alpha(s))).round().long()  # masked after this step
        place = rows % masked.shape[1]
        return foremost(
            scores(options.order, logits, mask_id, philox.choices(self.seed, rows)[0]),
            self._sequence(rows),
            place // options.block if options.block else torch.zeros_like(place),
            masked.sum(1) + again.sum(1) - left,
        )

    def _sequence(self, rows: Tensor) -> Tensor:
        return rows // self.free.shape[1]
