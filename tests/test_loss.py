"""Lemma 1: the KL splits, and the bound is a bound."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from cadd_min.forward import q_step
from cadd_min.loss import kl_continuous, kl_prior, nelbo, nelbo_parts, stratified_times, time_weights, token_losses
from cadd_min.posterior import q_posterior_z
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.errors import InputError
from tests.toys import JOINT, LAW, MASK, oracle, pairs, rng, told_by_latent, toy

ENTROPY = float(-(LAW * LAW.log()).sum())


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


# ------------------------------------------------------------------------------------------------ dependent tokens

CORE = {  # latent's dimension, schedule, and numbers of steps among which the bound falls
    "mdlm": (0, NoiseSchedule("cosine"), (1, 2, 4)),
    "cadd": (1, NoiseSchedule("linear", "capped"), (1, 2, 4)),
    "cdm": (1, NoiseSchedule("gone", "linear"), (16, 64)),
}
WORDS = torch.tensor([[-0.8], [0.2], [1.0], [0.0]], dtype=torch.float64)  # the last is the mask's and never used
APART = float((JOINT * (JOINT / (JOINT.sum(1)[:, None] * JOINT.sum(0))).log()).sum())  # what a token tells of the other


def pair_oracle(table: torch.Tensor, schedule: NoiseSchedule):
    """The exact p(x_0^i | x_t, z_t) of two tokens with the law JOINT, by Bayes' rule over all nine pairs."""

    def denoise(x_t, z_t, t):
        known = torch.nn.functional.one_hot(x_t, 4)[..., :3].double().log()
        told = torch.where((x_t == MASK)[..., None], told_by_latent(z_t, t, table[:3], schedule), known)
        joint = JOINT.log() + told[:, 0, :, None] + told[:, 1, None]
        return torch.stack([joint.logsumexp(2), joint.logsumexp(1)], 1)

    return denoise


def enumerated(name: str, steps: int, nodes: int = 16) -> torch.Tensor:
    """The mean bound's two parts (2,), tokens less H(JOINT), in nats a pair: all steps, pairs and masks by weight.

    Nothing is drawn: latents lie on Gauss-Hermite nodes. A kept one costs the KL of Prop. 2's Gaussians, by their
    means.
    """
    dim, schedule, _ = CORE[name]
    points, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(nodes if dim else 1))
    index = torch.cartesian_prod(*(torch.arange(n) for n in (3, 3, 2, 2, len(points), len(points))))
    x_0, masked, at = index[:, :2], index[:, 2:4] == 1, index[:, 4:]
    table, x_t, truth = WORDS[:, :dim], torch.where(masked, MASK, x_0), JOINT[x_0[:, 0], x_0[:, 1]]
    z_0, drawn = table[x_0], (weights[at] / weights.sum()).prod(-1)
    total = torch.stack([(JOINT * JOINT.log()).sum(), torch.zeros((), dtype=torch.float64)])
    for k in range(1, steps + 1):
        s, t = torch.tensor([[k - 1], [k]], dtype=torch.float64) / steps
        alpha_s, alpha_t = schedule.alpha(s), schedule.alpha(t)
        flip = (alpha_s - alpha_t) / (1 - alpha_t)
        z_t = schedule.signal(t) * z_0 + schedule.noise(t) * points[at][..., None]
        log_p = pair_oracle(table, schedule)(x_t, z_t, t).log_softmax(-1)
        tokens, latents = -log_p.gather(-1, x_0[..., None])[..., 0], torch.zeros(x_0.shape, dtype=torch.float64)
        if k > 1:  # in the last step none is kept
            z_hat = log_p.exp() @ table[:3]
            (mean, variance), (mean_hat, _) = (q_posterior_z(z_t, z, s, t, schedule) for z in (z_0, z_hat))
            latents = ((mean - mean_hat) ** 2 / (2 * variance)).sum(-1)
        weight = truth * drawn * torch.where(masked, 1 - alpha_t, alpha_t).prod(-1)
        nats = torch.stack([flip * tokens, (1 - flip) * latents], -1) * masked[..., None]
        total = total + (weight[:, None] * nats.sum(1)).sum(0)
    return total


def pair_parts(name: str, steps: int | None, count: int = 100_000) -> torch.Tensor:
    """(count, 2) draws of the bound's two parts for pairs of the law JOINT, the tokens' less -log p(x_0)."""
    (dim, schedule, _), x_0 = CORE[name], pairs(count)
    table = WORDS[:, :dim]
    parts = nelbo_parts(pair_oracle(table, schedule), x_0, table, schedule, MASK, steps=steps, generator=rng(1))
    return torch.stack([parts.discrete + JOINT[x_0[:, 0], x_0[:, 1]].log(), parts.continuous], -1)


def within(nats: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the means of draws (N, K) are the expected ones (K,) to five standard errors each."""
    return bool(((nats.mean(0) - expected).abs() <= 5 * nats.std(0) / len(nats) ** 0.5 + 1e-6).all())


@pytest.mark.parametrize("name", CORE)
def test_dependent_tokens_cost_the_enumerated_bound(name):
    """Both parts, to five standard errors: a seed is beyond any of these with probability 1e-5.

    One step costs what the tokens tell of each other; the masked model, at every T, that times the probability that
    both are unmasked in the same step. Power: one step more is another bound, and so is it with the latents' part
    counting one step too few.
    """
    (dim, schedule, _), found = CORE[name], {steps: pair_parts(name, steps) for steps in (1, 2, 3)}
    assert float(enumerated(name, 1).sum()) == pytest.approx(APART, rel=1e-9)
    for steps in (1, 2):
        expected = enumerated(name, steps)
        assert within(found[steps], expected) and not within(found[steps + 1], expected)
        if dim == 0:
            alpha = schedule.alpha(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
            assert expected.tolist() == pytest.approx([APART * float(alpha.diff().square().sum()), 0], rel=1e-9)
    assert dim == 0 or not within(found[2] * torch.tensor([1, 1 / 2]), enumerated(name, 2))


@pytest.mark.parametrize("name", CORE)
def test_bound_of_dependent_tokens_falls_to_the_likelihood(name):
    """bound >= true NLL at every T, less with more steps and tight in continuous time.

    To five standard errors, of which a seed is beyond any with probability 1e-5. cdm's bound is no less in 16 steps
    than in one: z0_hat is a mean, with which only small steps are exact. Power: without the latents' part the bound is
    below the NLL.
    """
    draws = [pair_parts(name, steps, count=200_000) for steps in (*CORE[name][2], None)]
    means = [float(nats.sum(-1).mean()) for nats in draws]
    errors = [float(nats.sum(-1).std() / len(nats) ** 0.5) for nats in draws]
    assert all(mean > -5 * error for mean, error in zip(means, errors))
    assert means == sorted(means, reverse=True)
    assert abs(means[-1]) < 5 * errors[-1] + 5e-4  # the last step [0, 1e-4] is not infinitesimal
    assert CORE[name][0] == 0 or float(draws[-1][:, 0].mean()) < -5 * errors[-1]
