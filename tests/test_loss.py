"""Lemma 1: the KL splits, and the bound is a bound."""

import math

import pytest
import torch
from scipy import integrate

from cadd_min.errors import InputError
from cadd_min.forward import q_step
from cadd_min.loss import kl_continuous, kl_prior, nelbo, nelbo_parts, stratified_times, time_weights, token_losses
from cadd_min.posterior import q_posterior_z
from cadd_min.schedule import NoiseSchedule
from tests.conftest import rng

LAW = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
ENTROPY = float(-(LAW * LAW.log()).sum())
MASK = 3


def oracle(table: torch.Tensor, schedule: NoiseSchedule, law: torch.Tensor = LAW):
    """The exact p(x_0 | x_t = m, z_t) of independent tokens with this law, by Bayes' rule; the mask's logit is huge."""

    def denoise(x_t, z_t, t):
        signal, variance = schedule.signal(t.double())[:, None, None], schedule.noise(t.double())[:, None, None] ** 2
        z, w = z_t.double(), table[: len(law)].double()
        log_likelihood = -((z[..., None, :] - signal[..., None] * w) ** 2).sum(-1) / (2 * variance)
        return torch.cat([law.log() + log_likelihood, torch.full((*x_t.shape, 1), 1e4)], -1).to(table.dtype)

    return denoise


def toy(norm: float = 1.5, dim: int = 4) -> torch.Tensor:
    rows = torch.randn(4, dim, generator=rng(0), dtype=torch.float64)
    return norm * rows / rows.norm(dim=-1, keepdim=True) if dim else rows


@pytest.mark.parametrize("continuous", ["linear", "cosine", "capped"])
def test_kl_continuous_is_the_kl_of_the_posteriors(continuous):
    """Against the KL of the two Gaussians that Prop. 2 gives, by numerical integration."""
    schedule, s, t = NoiseSchedule("linear", continuous), *torch.tensor([[0.4], [0.7]], dtype=torch.float64)
    z_0, z_hat, z_t = torch.tensor([0.8, -0.5, 0.3], dtype=torch.float64).view(3, 1, 1, 1)
    (mean, variance), (mean_hat, _) = (q_posterior_z(z_t, z, s, t, schedule) for z in (z_0, z_hat))
    p = torch.distributions.Normal(mean.item(), variance.sqrt().item())
    q = torch.distributions.Normal(mean_hat.item(), variance.sqrt().item())

    def integrand(z: float) -> float:
        z = torch.tensor(z)
        return float(p.log_prob(z).exp() * (p.log_prob(z) - q.log_prob(z)))

    numerical = integrate.quad(integrand, -8, 8, epsabs=1e-8)[0]
    assert kl_continuous(z_0, z_hat, s, t, schedule).item() == pytest.approx(numerical, rel=1e-5)


@pytest.mark.parametrize("discrete", ["linear", "cosine"])
def test_lemma_1_against_the_chain_itself(discrete):
    """KL(q(x_s, z_s | x_t, z_t, x_0) || p) by simulation: 200,000 tokens go through the forward chain to s and on to t.

    Those masked at t were unmasked at s or not: the mean of log q / p over them, the branches' densities included, is
    rho_flip CE + rho_keep KL_cont to five standard errors. Power: with rho_flip wrong by a tenth it is not.
    """
    schedule, count, p = NoiseSchedule(discrete), 200_000, 0.37
    s, t = (torch.full((count,), v, dtype=torch.float64) for v in (0.25, 0.5))
    x_0, z_0 = torch.zeros(count, 1, dtype=torch.int64), torch.full((count, 1, 1), 0.8, dtype=torch.float64)
    x_s, z_s = q_step(x_0, z_0, torch.zeros_like(s), s, schedule, MASK, generator=rng(0))
    x_t, z_t = q_step(x_s, z_s, s, t, schedule, MASK, generator=rng(1))
    masked, z_hat = x_t[:, 0] == MASK, torch.full_like(z_0, -0.5)
    true, model = (
        torch.distributions.Normal(m, v.sqrt()).log_prob(z_s)[..., 0]
        for m, v in (q_posterior_z(z_t, z, s, t, schedule) for z in (z_0, z_hat))
    )
    log_ratio = torch.where(x_s == MASK, true - model, -math.log(p))[masked]  # rho cancels between q and p
    mean, error = float(log_ratio.mean()), float(log_ratio.std() / len(log_ratio) ** 0.5)
    one, zero = s[:1], z_0[:1]
    kl = float(kl_continuous(zero, z_hat[:1], one, t[:1], schedule))
    flip, keep = float(schedule.rho_flip(one, t[:1])), float(schedule.rho_keep(one, t[:1]))
    assert abs(mean - (flip * -math.log(p) + keep * kl)) < 5 * error
    assert abs(mean - (0.9 * flip * -math.log(p) + (1 - 0.9 * flip) * kl)) > 5 * error


def test_elbo_weights_are_lemma_1_in_small_steps():
    """The weights of CE and squared error against rho_flip / h and (SNR(t - h) - SNR(t)) / 2h, h = 1e-6."""
    t, h = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-6
    for schedule in (NoiseSchedule(d, c) for d in ("linear", "cosine") for c in ("linear", "cosine", "flow")):
        ce, mse = time_weights(t, schedule, "elbo")
        torch.testing.assert_close(ce, schedule.rho_flip(t - h, t) / h, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mse, (schedule.snr(t - h) - schedule.snr(t)) / (2 * h), rtol=1e-4, atol=1e-4)
        assert all((w == 1).all() for w in time_weights(t, schedule, "uniform"))


def test_kl_is_infinite_at_zero_unless_the_estimate_is_right():
    zero, t, z = torch.zeros(1), torch.ones(1) / 2, torch.ones(1, 1, 2)
    assert kl_continuous(z, z + 1, zero, t, NoiseSchedule()).item() == math.inf
    assert kl_continuous(z, z, zero, t, NoiseSchedule()).item() == 0


@pytest.mark.parametrize("continuous", ["linear", "cosine", "capped", "flow"])
def test_prior_kl_is_zero(continuous):
    assert (kl_prior(torch.randn(2, 3, 4, generator=rng(0)), NoiseSchedule("linear", continuous)) == 0).all()


def bound(table: torch.Tensor, schedule: NoiseSchedule, steps: int | None, law=LAW, count=100_000, seed=0):
    """Mean bound in nats per token under the true law LAW of a denoiser that believes `law`, and its standard error."""
    x_0 = torch.multinomial(LAW, count * 2, replacement=True, generator=rng(seed)).view(count, 2)
    nats = nelbo(oracle(table, schedule, law), x_0, table, schedule, MASK, steps=steps, generator=rng(seed + 1)) / 2
    return float(nats.mean()), float(nats.std() / count**0.5)


@pytest.mark.parametrize("discrete", ["linear", "cosine", "gone"])
@pytest.mark.parametrize("continuous", ["linear", "cosine", "capped", "flow"])
def test_exact_denoiser_meets_the_entropy_in_continuous_time(discrete, continuous):
    """With the exact denoiser and infinitely many steps the bound is tight: tokens and latents together cost H(x_0).

    "gone" is the continuous diffusion model; a seed's error is beyond five standard errors with probability
    6e-7.
    """
    mean, error = bound(toy(), NoiseSchedule(discrete, continuous), None)
    assert abs(mean - ENTROPY) < 5 * error + 2e-4  # the last step [0, 1e-4] is not infinitesimal


def test_masked_model_meets_the_entropy_at_every_t():
    for steps in (1, 3, None):
        mean, error = bound(toy(dim=0), NoiseSchedule(), steps, count=50_000)
        assert abs(mean - ENTROPY) < 5 * error + 1e-6


def test_discrete_bound_falls_to_the_continuous_one():
    schedule, table = NoiseSchedule(), toy()
    means, errors = zip(*(bound(table, schedule, steps) for steps in (1, 4, 16, 64, 256)))
    limit, error = bound(table, schedule, None)
    slack = 5 * max(*errors, error)
    assert all(mean > ENTROPY - slack for mean in means)  # bound >= true NLL
    assert means[1] > limit + slack and abs(means[-1] - limit) < slack
    assert abs(means[-1] - limit) < abs(means[2] - limit) + slack < abs(means[1] - limit) + 2 * slack


def test_a_wrong_denoiser_pays_its_kl():
    """Believing another law costs KL(LAW || law) = cross-entropy - H, tokens and latents together, and no more."""
    law = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    mean, error = bound(toy(), NoiseSchedule(), None, law)
    assert abs(mean - ENTROPY - float((LAW * (LAW / law).log()).sum())) < 5 * error + 2e-4


def test_parts_add_up_and_steps_are_checked():
    table, x_0 = toy(), torch.zeros(8, 2, dtype=torch.int64)
    denoiser = oracle(table, NoiseSchedule())
    parts = nelbo_parts(denoiser, x_0, table, NoiseSchedule(), MASK, steps=8, generator=rng(0))
    torch.testing.assert_close(
        sum(parts), nelbo(denoiser, x_0, table, NoiseSchedule(), MASK, steps=8, generator=rng(0))
    )
    with pytest.raises(InputError, match="steps"):
        nelbo(denoiser, x_0, table, NoiseSchedule(), MASK, steps=0)


def test_stratified_times_cover_the_unit_interval():
    t = stratified_times(64, rng(0))
    assert ((t * 64).ceil().unique().numel()) == 64 and t.min() > 0 and t.max() <= 1


@pytest.mark.parametrize("count", [1, 2, 3, 8, 30, 128, 512])
def test_stratified_times_have_one_in_each_part_and_any_few_in_a_row_are_spread(count):
    shift = torch.rand((), generator=rng(count), dtype=torch.float64)
    t = stratified_times(count, rng(count))
    assert torch.equal(((t - 1 + shift) * count).round().long().remainder(count).sort()[0], torch.arange(count))
    for start in range(count - 7):
        assert 0.3 < t[start : start + 8].mean() < 0.7


def test_token_losses_equal_the_plain_ones():
    """Chunked CE and squared error, values and gradients, against the textbook."""
    features = torch.randn(70, 8, generator=rng(0), dtype=torch.float64, requires_grad=True)
    head = torch.randn(13, 8, generator=rng(1), dtype=torch.float64, requires_grad=True)
    targets, weight = torch.randint(13, (70,), generator=rng(2)), torch.rand(70, generator=rng(3))
    table = torch.randn(14, 5, generator=rng(4), dtype=torch.float64)

    def plain(with_table: bool):
        logits = features @ head.T
        ce = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return ce, (table[targets] - logits.softmax(-1) @ table[:13]).square().sum(-1) * with_table

    for with_table in (False, True):
        results = []
        for ce, mse in (
            token_losses(features, head, targets, table=table if with_table else None, chunk=32),
            plain(with_table),
        ):
            total = (weight * (ce + mse)).sum()
            results.append((total, *torch.autograd.grad(total, (features, head))))
        for found, expected in zip(*results):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
