"""Proposition 2: the posterior is Bayes' rule, for the tokens, for the latents, and for both at once."""

import pytest
import torch

from cadd_min.posterior import q_posterior_sample, q_posterior_z
from cadd_min.schedule import NoiseSchedule
from tests.toys import rng

MASK = 3


def normal(z: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    return torch.exp(-((z - mean) ** 2) / (2 * variance)) / (2 * torch.pi * variance).sqrt()


@pytest.mark.parametrize("discrete", ["linear", "cosine"])
@pytest.mark.parametrize("continuous", ["linear", "cosine", "capped"])
@pytest.mark.parametrize("s, t", [(0.2, 0.5), (0.5, 0.51), (0.05, 0.95)])
def test_joint_posterior_is_bayes_rule(discrete, continuous, s, t):
    """q(x_s, z_s | x_0) q(x_t = m, z_t | x_s, z_s) = q(x_t = m, z_t | x_0) q(x_s, z_s | x_t = m, z_t, x_0), in fp64.

    On a grid of three tokens and of latents. Where x_s is unmasked z_s = z_0, and the densities of z_s there are point
    masses on both sides: they are compared as masses.
    """
    schedule, (s, t) = NoiseSchedule(discrete, continuous), torch.tensor([s, t], dtype=torch.float64)
    a_s, a_t, b_s, b_t = schedule.alpha(s), schedule.alpha(t), schedule.gamma_bar(s), schedule.gamma_bar(t)
    g = b_t / b_s
    z_s, z_t = torch.meshgrid(*[torch.linspace(-4, 4, 41, dtype=torch.float64)] * 2, indexing="ij")
    for z_0 in (-1.3, 0.0, 2.1):  # the latents of three tokens
        z_0 = torch.full_like(z_s, z_0)
        evidence = (1 - a_t) * normal(z_t, b_t.sqrt() * z_0, 1 - b_t)
        mean, variance = q_posterior_z(z_t[None], z_0[None], s[None], t[None], schedule)
        stays = (1 - a_s) * normal(z_s, b_s.sqrt() * z_0, 1 - b_s) * normal(z_t, g.sqrt() * z_s, 1 - g)
        found = evidence * schedule.rho_keep(s, t) * normal(z_s, mean[0], variance[0])
        torch.testing.assert_close(found, stays, rtol=1e-10, atol=1e-12)
        flips = a_s * (1 - a_t / a_s) * normal(z_t, b_t.sqrt() * z_0, 1 - b_t)  # z_s = z_0 there
        torch.testing.assert_close(evidence * schedule.rho_flip(s, t), flips, rtol=1e-10, atol=0)


def test_mu_and_beta_by_conditioning_a_gaussian():
    """(z_s, z_t) given z_0 is a two-dimensional Gaussian; condition it on z_t."""
    schedule = NoiseSchedule("linear", "cosine")
    s, t, z_0, z_t = torch.tensor([0.3, 0.7, 1.4, -0.6], dtype=torch.float64)
    b_s, b_t = schedule.gamma_bar(s), schedule.gamma_bar(t)
    g = b_t / b_s
    covariance = g.sqrt() * (1 - b_s)  # of (z_s, z_t): z_t = sqrt(g) z_s + noise
    mu = b_s.sqrt() * z_0 + covariance / (1 - b_t) * (z_t - b_t.sqrt() * z_0)
    beta = (1 - b_s) - covariance**2 / (1 - b_t)
    mean, variance = q_posterior_z(z_t.view(1, 1, 1), z_0.view(1, 1, 1), s[None], t[None], schedule)
    torch.testing.assert_close(mean.item(), mu.item(), rtol=1e-12, atol=0)
    torch.testing.assert_close(variance.item(), beta.item(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("continuous", ["linear", "cosine", "capped", "flow"])
def test_s_equal_t_is_the_identity_and_s_zero_is_z_0(continuous):
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
    """The same eps that made z_t makes z_s."""
    schedule, eps, z_0 = NoiseSchedule(continuous="flow"), *torch.randn(2, 1, 1, 4, generator=rng(3)).double()
    s, t = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)
    mean, variance = q_posterior_z((1 - t) * z_0 + t * eps, z_0, s, t, schedule)
    torch.testing.assert_close(mean, (1 - s) * z_0 + s * eps)
    assert variance.item() == 0


def test_sample_carries_over_flips_and_keeps():
    schedule, count = NoiseSchedule(), 50000
    x_t = torch.tensor([[0, MASK]]).repeat(count, 1)
    x_0 = torch.tensor([[0, 2]]).repeat(count, 1)
    z_t = torch.tensor([[[0.5], [0.2]]], dtype=torch.float64).repeat(count, 1, 1)
    z_0 = torch.tensor([[[0.5], [1.0]]], dtype=torch.float64).repeat(count, 1, 1)
    s, t = torch.full((count,), 0.3, dtype=torch.float64), torch.full((count,), 0.6, dtype=torch.float64)
    x_s, z_s = q_posterior_sample(x_t, z_t, x_0, z_0, s, t, schedule, MASK, generator=rng(0))
    assert torch.equal(x_s[:, 0], x_t[:, 0]) and torch.equal(z_s[:, 0], z_t[:, 0])  # unmasked: bitwise
    flipped = x_s[:, 1] == 2
    assert (flipped | (x_s[:, 1] == MASK)).all() and (z_s[flipped, 1] == 1.0).all()
    assert abs(flipped.double().mean() - 0.5) < 4 * 0.5 / count**0.5  # rho_flip = (0.7 - 0.4) / 0.6
    kept, (mean, variance) = z_s[~flipped, 1, 0], q_posterior_z(z_t, z_0, s, t, schedule)
    assert abs(kept.mean() - mean[0, 1, 0]) < 4 * (variance[0].item() / len(kept)) ** 0.5
    assert abs(kept.var() / variance[0].item() - 1) < 4 * (2 / len(kept)) ** 0.5


def test_s_zero_reveals_everything():
    x_t, x_0 = torch.full((4, 5), MASK), torch.randint(3, (4, 5), generator=rng(1))
    z_t, z_0 = torch.randn(2, 4, 5, 6, generator=rng(2))
    x_s, z_s = q_posterior_sample(x_t, z_t, x_0, z_0, torch.zeros(4), torch.full((4,), 0.4), NoiseSchedule(), MASK)
    assert torch.equal(x_s, x_0) and torch.equal(z_s, z_0)
