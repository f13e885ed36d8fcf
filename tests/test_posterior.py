"""Proposition 2: the posterior is Bayes' rule, for the tokens, for the latents, and for both at once.

Densities are compared in float64, on a grid or by formula. Only `q_posterior_sample` is checked by its draws.
"""

import pytest
import torch

from cadd_min.posterior import q_posterior_sample, q_posterior_z
from cadd_min.schedule import NoiseSchedule
from tests.toys import rng

MASK = 3


def normal(z: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Compute the density of N(mean, variance) at z."""
    return torch.exp(-((z - mean) ** 2) / (2 * variance)) / (2 * torch.pi * variance).sqrt()


@pytest.mark.parametrize("discrete", ["linear", "power4", "cosine"])
@pytest.mark.parametrize("continuous", ["linear", "cosine", "capped"])
@pytest.mark.parametrize("s, t", [(0.2, 0.5), (0.5, 0.51), (0.05, 0.95)])
def test_joint_posterior_is_bayes_rule(discrete, continuous, s, t):
    """Check q(x_s, z_s | x_0) q(x_t = m, z_t | x_s, z_s) = q(x_t = m, z_t | x_0) q(x_s, z_s | x_t = m, z_t, x_0).

    On a grid of z_s and z_t, for the latents of three tokens. Where x_s is masked, densities are compared. Where x_s is
    unmasked, z_s = z_0: both sides are point masses in z_s, and their masses are compared.
    """
    schedule, (s, t) = NoiseSchedule(discrete, continuous), torch.tensor([s, t], dtype=torch.float64)
    alpha_s, alpha_t = schedule.alpha(s), schedule.alpha(t)
    bar_s, bar_t = schedule.gamma_bar(s), schedule.gamma_bar(t)
    gamma = bar_t / bar_s  # of the step from s to t
    z_s, z_t = torch.meshgrid(*[torch.linspace(-4, 4, 41, dtype=torch.float64)] * 2, indexing="ij")
    for latent in (-1.3, 0.0, 2.1):
        z_0 = torch.full_like(z_s, latent)
        marginal = (1 - alpha_t) * normal(z_t, bar_t.sqrt() * z_0, 1 - bar_t)  # q(x_t = m, z_t | x_0)
        mean, variance = q_posterior_z(z_t[None], z_0[None], s[None], t[None], schedule)
        masked = (1 - alpha_s) * normal(z_s, bar_s.sqrt() * z_0, 1 - bar_s) * normal(z_t, gamma.sqrt() * z_s, 1 - gamma)
        by_posterior = marginal * schedule.rho_keep(s, t) * normal(z_s, mean[0], variance[0])
        torch.testing.assert_close(by_posterior, masked, rtol=1e-10, atol=1e-12)
        unmasked = alpha_s * (1 - alpha_t / alpha_s) * normal(z_t, bar_t.sqrt() * z_0, 1 - bar_t)
        torch.testing.assert_close(marginal * schedule.rho_flip(s, t), unmasked, rtol=1e-10, atol=0)


def test_mu_and_beta_by_conditioning_a_gaussian():
    """Compare mean and variance with those of the two-dimensional Gaussian (z_s, z_t) given z_0, conditioned on z_t."""
    schedule = NoiseSchedule("linear", "cosine")
    s, t, z_0, z_t = torch.tensor([0.3, 0.7, 1.4, -0.6], dtype=torch.float64)
    bar_s, bar_t = schedule.gamma_bar(s), schedule.gamma_bar(t)
    gamma = bar_t / bar_s
    covariance = gamma.sqrt() * (1 - bar_s)  # of z_s and z_t = sqrt(gamma) z_s + noise
    mu = bar_s.sqrt() * z_0 + covariance / (1 - bar_t) * (z_t - bar_t.sqrt() * z_0)
    beta = (1 - bar_s) - covariance**2 / (1 - bar_t)
    mean, variance = q_posterior_z(z_t.view(1, 1, 1), z_0.view(1, 1, 1), s[None], t[None], schedule)
    torch.testing.assert_close(mean.item(), mu.item(), rtol=1e-12, atol=0)
    torch.testing.assert_close(variance.item(), beta.item(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("continuous", ["linear", "cosine", "capped", "flow"])
def test_s_equal_t_is_the_identity_and_s_zero_is_z_0(continuous):
    """Check both limits, where formulas divide 0 by 0: z_t at s = t, z_0 at s = 0, and no variance in either."""
    schedule = NoiseSchedule("linear", continuous)
    z_t, z_0 = torch.randn(2, 3, 4, 5, generator=rng(0), dtype=torch.float64)
    for t in (0.0, 0.4, 1.0):
        time = torch.full((3,), t, dtype=torch.float64)
        mean, variance = q_posterior_z(z_t, z_0, time, time, schedule)
        torch.testing.assert_close(mean, z_t)
        assert (variance == 0).all()
        mean, variance = q_posterior_z(z_t, z_0, torch.zeros_like(time), time, schedule)
        torch.testing.assert_close(mean, z_t if t == 0 else z_0)
        torch.testing.assert_close(variance, torch.zeros_like(variance))


def test_flow_posterior_moves_on_the_line():
    """Check that the eps which made z_t makes z_s, too: the flow latent has no fresh noise."""
    schedule, eps, z_0 = NoiseSchedule(continuous="flow"), *torch.randn(2, 1, 1, 4, generator=rng(3)).double()
    s, t = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)
    mean, variance = q_posterior_z((1 - t) * z_0 + t * eps, z_0, s, t, schedule)
    torch.testing.assert_close(mean, (1 - s) * z_0 + s * eps)
    assert variance.item() == 0


def test_sample_carries_over_flips_and_keeps():
    """Check 50,000 draws: unmasked positions carry over bitwise, masked positions flip or keep a Gaussian latent.

    The flip rate, and the mean and variance of the kept latents, must lie within four standard errors of Prop. 2.
    """
    schedule, count = NoiseSchedule(), 50000
    x_t = torch.tensor([[0, MASK]]).repeat(count, 1)
    x_0 = torch.tensor([[0, 2]]).repeat(count, 1)
    z_t = torch.tensor([[[0.5], [0.2]]], dtype=torch.float64).repeat(count, 1, 1)
    z_0 = torch.tensor([[[0.5], [1.0]]], dtype=torch.float64).repeat(count, 1, 1)
    s, t = torch.full((count,), 0.3, dtype=torch.float64), torch.full((count,), 0.6, dtype=torch.float64)
    x_s, z_s = q_posterior_sample(x_t, z_t, x_0, z_0, s, t, schedule, MASK, generator=rng(0))
    assert torch.equal(x_s[:, 0], x_t[:, 0]) and torch.equal(z_s[:, 0], z_t[:, 0])
    flipped = x_s[:, 1] == 2
    assert (flipped | (x_s[:, 1] == MASK)).all() and (z_s[flipped, 1] == 1.0).all()
    assert abs(flipped.double().mean() - 0.5) < 4 * 0.5 / count**0.5  # rho_flip = (0.7 - 0.4) / 0.6
    kept, (mean, variance) = z_s[~flipped, 1, 0], q_posterior_z(z_t, z_0, s, t, schedule)
    assert abs(kept.mean() - mean[0, 1, 0]) < 4 * (variance[0].item() / len(kept)) ** 0.5
    assert abs(kept.var() / variance[0].item() - 1) < 4 * (2 / len(kept)) ** 0.5


def test_s_zero_reveals_everything():
    """Check that the step to s = 0 flips every position to x_0, and its latent to z_0."""
    x_t, x_0 = torch.full((4, 5), MASK), torch.randint(3, (4, 5), generator=rng(1))
    z_t, z_0 = torch.randn(2, 4, 5, 6, generator=rng(2))
    x_s, z_s = q_posterior_sample(x_t, z_t, x_0, z_0, torch.zeros(4), torch.full((4,), 0.4), NoiseSchedule(), MASK)
    assert torch.equal(x_s, x_0) and torch.equal(z_s, z_0)
