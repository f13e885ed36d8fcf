"""The two clocks of the forward process: alpha_t for the tokens, gamma_bar_t for their latents.

Time t is in [0, 1], s < t, 0 is clean and 1 is noise. alpha_t is the probability that a token is still unmasked.
A masked token's latent is z_t = signal_t z_0 + noise_t eps, and gamma_bar_t measures how much of z_0 is left:

    Gaussian latent ("linear", "cosine", "capped")   signal_t = sqrt(gamma_bar_t), noise_t = sqrt(1 - gamma_bar_t)
    flow-matching latent ("flow")                    signal_t = 1 - t,   noise_t = t   (paper, App. B.1)

Both latents have SNR(t) = signal_t^2 / noise_t^2 = gamma_bar_t / (1 - gamma_bar_t). At t = 0 and t = 1, alpha_t and
gamma_bar_t are exactly 0 or 1 in floating point. Under "capped" signal_t <= noise_t at every t > 0. The latent then
stays a hint until its token is unmasked, and the network keeps learning from the other tokens at small t. The paper's
linear schedule gives the answer away there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cadd_min.utils.errors import choose

Curve = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # a function of time, and its derivative


def _all_at_once(t: Tensor) -> Tensor:
    """Step from 1 to 0 right after t = 0."""
    return (t <= 0).to(t.dtype)


def _power(p: int) -> Curve:
    """Make alpha_t = (1 - t)^p: in the reverse chain, most tokens are revealed within about 1 / p of the end."""
    return lambda t: (1 - t) ** p, lambda t: -p * (1 - t) ** (p - 1)


# alpha_t. "all-at-once" masks all tokens at once, which leaves a purely continuous diffusion (CDM). The powers lie
# between "linear" and "all-at-once": the larger p, the more the latents agree before their tokens are revealed.
DISCRETE: dict[str, Curve] = {
    "linear": _power(1),
    "power2": _power(2),
    "power4": _power(4),
    "power8": _power(8),
    "cosine": (
        lambda t: 1 - torch.sin(math.pi / 2 * t),
        lambda t: -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t)),
    ),
    "all-at-once": (_all_at_once, torch.zeros_like),
}


def _flow(t: Tensor) -> Tensor:
    return (1 - t) ** 2 / ((1 - t) ** 2 + t**2)


# gamma_bar_t. Cosines are written as sines, which are exactly 0 and 1 at the ends.
CONTINUOUS: dict[str, Curve] = {
    "linear": (lambda t: 1 - t, lambda t: -torch.ones_like(t)),
    "cosine": (
        lambda t: torch.sin(math.pi / 2 * (1 - t)) ** 2,
        lambda t: -math.pi / 2 * torch.sin(math.pi * (1 - t)),
    ),
    "capped": (lambda t: torch.where(t > 0, (1 - t**2) / 2, 1), lambda t: -t),
    "flow": (_flow, lambda t: -2 * t * (1 - t) / ((1 - t) ** 2 + t**2) ** 2),
}


class NoiseSchedule:
    """alpha_t, gamma_bar_t, and what follows from them. All methods are elementwise on tensors of any shape.

    discrete: "linear", "power2", "power4", "power8", "cosine" or "all-at-once".
    continuous: "linear", "cosine", "capped" or "flow".
    """

    def __init__(self, discrete: str = "linear", continuous: str = "linear"):
        self.discrete = choose("discrete schedule", discrete, DISCRETE)
        self.continuous = choose("continuous schedule", continuous, CONTINUOUS)
        self._alpha, self._alpha_prime = DISCRETE[discrete]
        self._gamma_bar, self._gamma_bar_prime = CONTINUOUS[continuous]

    def __repr__(self) -> str:
        return f"NoiseSchedule(discrete={self.discrete!r}, continuous={self.continuous!r})"

    def alpha(self, t: Tensor) -> Tensor:
        """Return alpha_t = P(x_t = x_0): 1 at t = 0, 0 at t = 1."""
        return self._alpha(t)

    def gamma_bar(self, t: Tensor) -> Tensor:
        """Return gamma_bar_t = signal_t^2 / (signal_t^2 + noise_t^2): 1 at t = 0, 0 at t = 1."""
        return self._gamma_bar(t)

    def rho_flip(self, s: Tensor, t: Tensor) -> Tensor:
        """Return P(x_s = x_0 | x_t = m) = (alpha_s - alpha_t) / (1 - alpha_t); 1 for s = 0, 0 for s = t.  (Prop. 2)"""
        alpha_s, alpha_t = self.alpha(s), self.alpha(t)
        masked = 1 - alpha_t
        rho = (alpha_s - alpha_t) / torch.where(masked > 0, masked, 1)  # at t = 0 nothing is masked: rho = 0
        return torch.where((s <= 0) & (t > 0), torch.ones_like(rho), rho)

    def rho_keep(self, s: Tensor, t: Tensor) -> Tensor:
        """Return P(x_s = m | x_t = m) = 1 - rho_flip.    (Prop. 2)"""
        return 1 - self.rho_flip(s, t)

    def signal(self, t: Tensor) -> Tensor:
        """Return the factor of z_0 in z_t."""
        return 1 - t if self.continuous == "flow" else self.gamma_bar(t).sqrt()

    def noise(self, t: Tensor) -> Tensor:
        """Return the factor of eps in z_t: the standard deviation of the noise."""
        return t if self.continuous == "flow" else (1 - self.gamma_bar(t)).sqrt()

    def snr(self, t: Tensor) -> Tensor:
        """Return SNR(t) = gamma_bar_t / (1 - gamma_bar_t): infinite at t = 0, 0 at t = 1."""
        gamma_bar = self.gamma_bar(t)
        return gamma_bar / (1 - gamma_bar)

    def snr_prime(self, t: Tensor) -> Tensor:
        """Return d SNR / dt = gamma_bar'_t / (1 - gamma_bar_t)^2 <= 0, per unit of time."""
        return self._gamma_bar_prime(t) / (1 - self.gamma_bar(t)) ** 2

    def flip_rate(self, t: Tensor) -> Tensor:
        """Return -alpha'_t / (1 - alpha_t) = lim rho_flip(s, t) / (t - s): the weight of the CE in the ELBO."""
        return -self._alpha_prime(t) / (1 - self.alpha(t))


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Divide a curve's values at two times, 0 <= part <= whole, elementwise. 0 / 0 is 1: the curve has not moved."""
    return torch.where(whole > 0, part, 1) / torch.where(whole > 0, whole, 1)


def per_token(value: Tensor, like: Tensor) -> Tensor:
    """Add trailing dimensions to a value per sequence (B,), so that it broadcasts against `like` (B, L, ...)."""
    return value.to(like.dtype).reshape(value.shape + (1,) * (like.dim() - value.dim()))
