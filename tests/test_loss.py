"""Lemma 1: the KL of a reverse step splits into tokens and latents, and the bound is never below the true NLL.

Every law here is known. The bound is compared with entropies, numerical integrals and sums over all cases. Means of
draws must agree to five standard errors. Broken twins must not: a wrong rho_flip, a lost part, a wrong count of steps.
"""

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
    """Compare with the KL of the two Gaussians that Prop. 2 gives, integrated numerically."""
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


@pytest.mark.parametrize("discrete", ["linear", "power4", "cosine"])
def test_lemma_1_against_the_chain_itself(discrete):
    """Compare a simulated KL(q(x_s, z_s | x_t, z_t, x_0) || p) with rho_flip CE + rho_keep KL_cont.

    200,000 tokens go through the forward chain to s and on to t. The KL is the mean of log q / p over the tokens that
    are masked at t. Both branches count: a token unmasked at s by its probability, a masked one by the density of z_s.
    Power: with rho_flip wrong by a tenth the two differ by more than five standard errors.
    """
    schedule, count, p = NoiseSchedule(discrete), 200_000, 0.37
    s, t = (torch.full((count,), v, dtype=torch.float64) for v in (0.25, 0.5))
    x_0, z_0 = torch.zeros(count, 1, dtype=torch.int64), torch.full((count, 1, 1), 0.8, dtype=torch.float64)
    x_s, z_s = q_step(x_0, z_0, torch.zeros_like(s), s, schedule, MASK, generator=rng(0))
    x_t, z_t = q_step(x_s, z_s, s, t, schedule, MASK, generator=rng(1))
    masked, z_hat = x_t[:, 0] == MASK, torch.full_like(z_0, -0.5)
    log_q, log_p = (
        torch.distributions.Normal(m, v.sqrt()).log_prob(z_s)[..., 0]
        for m, v in (q_posterior_z(z_t, z, s, t, schedule) for z in (z_0, z_hat))
    )
    log_ratio = torch.where(x_s == MASK, log_q - log_p, -math.log(p))[masked]  # rho cancels between q and p
    mean, error = float(log_ratio.mean()), float(log_ratio.std() / len(log_ratio) ** 0.5)
    s, t, ce = s[:1], t[:1], -math.log(p)
    kl = float(kl_continuous(z_0[:1], z_hat[:1], s, t, schedule))
    flip, keep = float(schedule.rho_flip(s, t)), float(schedule.rho_keep(s, t))
    assert abs(mean - (flip * ce + keep * kl)) < 5 * error
    assert abs(mean - (0.9 * flip * ce + (1 - 0.9 * flip) * kl)) > 5 * error


def test_elbo_weights_are_lemma_1_in_small_steps():
    """Compare the weights of CE and squared error with rho_flip / h and (SNR(t - h) - SNR(t)) / 2h for h = 1e-6.

    The uniform weights are 1.
    """
    t, h = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-6
    for schedule in (NoiseSchedule(d, c) for d in ("linear", "cosine") for c in ("linear", "cosine", "flow")):
        ce, mse = time_weights(t, schedule, "elbo")
        torch.testing.assert_close(ce, schedule.rho_flip(t - h, t) / h, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mse, (schedule.snr(t - h) - schedule.snr(t)) / (2 * h), rtol=1e-4, atol=1e-4)
        assert all((w == 1).all() for w in time_weights(t, schedule, "uniform"))


def test_kl_is_infinite_at_zero_unless_the_estimate_is_right():
    """Check s = 0, where the posterior is a point: a wrong estimate's KL is infinite, a right one's is 0, not NaN."""
    zero, t, z = torch.zeros(1), torch.ones(1) / 2, torch.ones(1, 1, 2)
    assert kl_continuous(z, z + 1, zero, t, NoiseSchedule()).item() == math.inf
    assert kl_continuous(z, z, zero, t, NoiseSchedule()).item() == 0


@pytest.mark.parametrize("continuous", ["linear", "cosine", "capped", "flow"])
def test_prior_kl_is_zero(continuous):
    """Check that z_1 is pure noise, so that the prior costs nothing."""
    assert (kl_prior(torch.randn(2, 3, 4, generator=rng(0)), NoiseSchedule("linear", continuous)) == 0).all()


def bound(table: torch.Tensor, schedule: NoiseSchedule, steps: int | None, law=LAW, count=100_000, seed=0):
    """Estimate the bound in nats per token, and its standard error, on pairs of tokens of the law LAW.

    law: for which the denoiser is exact. steps: T, or None for continuous time.
    """
    x_0 = torch.multinomial(LAW, count * 2, replacement=True, generator=rng(seed)).view(count, 2)
    nats = nelbo(oracle(table, schedule, law), x_0, table, schedule, MASK, steps=steps, generator=rng(seed + 1)) / 2
    return float(nats.mean()), float(nats.std() / count**0.5)


@pytest.mark.parametrize("discrete", ["linear", "cosine", "all-at-once"])
@pytest.mark.parametrize("continuous", ["linear", "cosine", "capped", "flow"])
def test_exact_denoiser_meets_the_entropy_in_continuous_time(discrete, continuous):
    """Check that the bound is tight with the exact denoiser in continuous time: tokens and latents cost H(x_0).

    "all-at-once" is the continuous model. A correct bound is beyond five standard errors with probability 6e-7.
    """
    mean, error = bound(toy(), NoiseSchedule(discrete, continuous), None)
    assert abs(mean - ENTROPY) < 5 * error + 2e-4  # the last step [0, 1e-4] is not infinitesimal


def test_masked_model_meets_the_entropy_at_every_t():
    """Check that without latents the bound of independent tokens is the entropy, however few the steps."""
    for steps in (1, 3, None):
        mean, error = bound(toy(dim=0), NoiseSchedule(), steps, count=50_000)
        assert abs(mean - ENTROPY) < 5 * error + 1e-6


def test_discrete_bound_falls_to_the_continuous_one():
    """Check that the bound with latents falls to its limit as T grows from 1 to 256, and stays above the entropy."""
    schedule, table = NoiseSchedule(), toy()
    means, errors = zip(*(bound(table, schedule, steps) for steps in (1, 4, 16, 64, 256)))
    limit, error = bound(table, schedule, None)
    slack = 5 * max(*errors, error)
    assert all(mean > ENTROPY - slack for mean in means)  # bound >= true NLL
    assert means[1] > limit + slack and abs(means[-1] - limit) < slack
    assert abs(means[-1] - limit) < abs(means[2] - limit) + slack < abs(means[1] - limit) + 2 * slack


def test_a_wrong_denoiser_pays_its_kl():
    """Check that the exact denoiser of another law costs KL(LAW || law) beyond the entropy, and no more.

    Tokens and latents count together.
    """
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
    """Check that each of `count` equal parts of [0, 1] has one time, and that any eight in a row have a mean near 1/2.

    A micro-batch takes times in a row: sorted times would give it one noise level.
    """
    shift = torch.rand((), generator=rng(count), dtype=torch.float64)
    t = stratified_times(count, rng(count))
    assert torch.equal(((t - 1 + shift) * count).round().long().remainder(count).sort()[0], torch.arange(count))
    for start in range(count - 7):
        assert 0.3 < t[start : start + 8].mean() < 0.7


@pytest.mark.parametrize("mask_id", [None, 4, 13])
def test_token_losses_equal_the_plain_ones(mask_id):
    """Compare the chunked CE and squared error, values and gradients, with the plain formulas.

    The mask has probability zero where it is among the V = 13 logits.
    """
    features = torch.randn(70, 8, generator=rng(0), dtype=torch.float64, requires_grad=True)
    head = torch.randn(13, 8, generator=rng(1), dtype=torch.float64, requires_grad=True)
    targets, weight = torch.randint(4, (70,), generator=rng(2)), torch.rand(70, generator=rng(3))
    table = torch.randn(14, 5, generator=rng(4), dtype=torch.float64)

    def plain(with_table: bool):
        logits = features @ head.T
        if mask_id == 4:
            logits = logits.index_fill(1, torch.tensor([4]), -math.inf)
        ce = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return ce, (table[targets] - logits.softmax(-1) @ table[:13]).square().sum(-1) * with_table

    for with_table in (False, True):
        results = []
        for ce, mse in (
            token_losses(features, head, targets, table=table if with_table else None, mask_id=mask_id, chunk=32),
            plain(with_table),
        ):
            total = (weight * (ce + mse)).sum()
            results.append((total, *torch.autograd.grad(total, (features, head))))
        for chunked, whole in zip(*results):
            torch.testing.assert_close(chunked.double(), whole, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ dependent tokens

CORE = {  # dimension of the latents, schedule, and numbers of steps over which the bound falls
    "mdlm": (0, NoiseSchedule("cosine"), (1, 2, 4)),
    "cadd": (1, NoiseSchedule("linear", "capped"), (1, 2, 4)),
    "cdm": (1, NoiseSchedule("all-at-once", "linear"), (16, 64)),
}
WORDS = torch.tensor([[-0.8], [0.2], [1.0], [0.0]], dtype=torch.float64)  # the last row is the mask's, never used
APART = float((JOINT * (JOINT / (JOINT.sum(1)[:, None] * JOINT.sum(0))).log()).sum())  # mutual information, nats


def pair_oracle(table: torch.Tensor, schedule: NoiseSchedule):
    """Make the exact p(x_0^i | x_t, z_t) of two tokens with the law JOINT, by Bayes' rule over all nine pairs."""

    def denoise(x_t, z_t, t):
        by_token = torch.nn.functional.one_hot(x_t, 4)[..., :3].double().log()  # (B, 2, 3): 0 or -inf
        by_latent = told_by_latent(z_t, t, table[:3], schedule)  # (B, 2, 3)
        likelihood = torch.where((x_t == MASK)[..., None], by_latent, by_token)
        joint = JOINT.log() + likelihood[:, 0, :, None] + likelihood[:, 1, None]  # (B, 3, 3)
        return torch.stack([joint.logsumexp(2), joint.logsumexp(1)], 1)  # (B, 2, 3)

    return denoise


def enumerated(name: str, steps: int, nodes: int = 16) -> torch.Tensor:
    """Compute the mean of the bound's two parts (2,), nats a pair, as a weighted sum over all steps, pairs and masks.

    H(JOINT) is subtracted from the tokens' part. Nothing is drawn: latents lie on Gauss-Hermite nodes. A position that
    stays masked costs the KL of the two Gaussians of Prop. 2, whose variance is the same.
    """
    dim, schedule, _ = CORE[name]
    points, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(nodes if dim else 1))
    cases = torch.cartesian_prod(*(torch.arange(n) for n in (3, 3, 2, 2, len(points), len(points))))
    x_0, masked, node = cases[:, :2], cases[:, 2:4] == 1, cases[:, 4:]
    table, x_t, p_pair = WORDS[:, :dim], torch.where(masked, MASK, x_0), JOINT[x_0[:, 0], x_0[:, 1]]
    z_0, p_nodes = table[x_0], (weights[node] / weights.sum()).prod(-1)
    total = torch.stack([(JOINT * JOINT.log()).sum(), torch.zeros((), dtype=torch.float64)])
    for k in range(1, steps + 1):
        s, t = torch.tensor([[k - 1], [k]], dtype=torch.float64) / steps
        alpha_s, alpha_t = schedule.alpha(s), schedule.alpha(t)
        flip = (alpha_s - alpha_t) / (1 - alpha_t)
        z_t = schedule.signal(t) * z_0 + schedule.noise(t) * points[node][..., None]
        log_p = pair_oracle(table, schedule)(x_t, z_t, t).log_softmax(-1)
        ce, kl = -log_p.gather(-1, x_0[..., None])[..., 0], torch.zeros(x_0.shape, dtype=torch.float64)
        if k > 1:  # the step to s = 0 flips every position
            z_hat = log_p.exp() @ table[:3]
            (mean, variance), (mean_hat, _) = (q_posterior_z(z_t, z, s, t, schedule) for z in (z_0, z_hat))
            kl = ((mean - mean_hat) ** 2 / (2 * variance)).sum(-1)
        weight = p_pair * p_nodes * torch.where(masked, 1 - alpha_t, alpha_t).prod(-1)
        nats = torch.stack([flip * ce, (1 - flip) * kl], -1) * masked[..., None]
        total = total + (weight[:, None] * nats.sum(1)).sum(0)
    return total


def pair_parts(name: str, steps: int | None, count: int = 100_000) -> torch.Tensor:
    """Draw the bound's two parts (count, 2) for pairs of the law JOINT. -log p(x_0) is subtracted from the tokens'."""
    (dim, schedule, _), x_0 = CORE[name], pairs(count)
    table = WORDS[:, :dim]
    parts = nelbo_parts(pair_oracle(table, schedule), x_0, table, schedule, MASK, steps=steps, generator=rng(1))
    return torch.stack([parts.discrete + JOINT[x_0[:, 0], x_0[:, 1]].log(), parts.continuous], -1)


def within(nats: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether the means of draws (N, K) are the expected means (K,), to five standard errors each."""
    return bool(((nats.mean(0) - expected).abs() <= 5 * nats.std(0) / len(nats) ** 0.5 + 1e-6).all())


@pytest.mark.parametrize("name", CORE)
def test_dependent_tokens_cost_the_enumerated_bound(name):
    """Compare both parts of the bound with their enumerated values, to five standard errors.

    A correct bound fails with probability 1e-5. One step costs APART, the mutual information of the two tokens. The
    masked model costs at every T APART times the probability that both tokens are unmasked in one step. Power: the
    bound of T + 1 steps is caught, and so is a latents' part that counts one step too few.
    """
    (dim, schedule, _), drawn = CORE[name], {steps: pair_parts(name, steps) for steps in (1, 2, 3)}
    assert float(enumerated(name, 1).sum()) == pytest.approx(APART, rel=1e-9)
    for steps in (1, 2):
        expected = enumerated(name, steps)
        assert within(drawn[steps], expected) and not within(drawn[steps + 1], expected)
        if dim == 0:
            alpha = schedule.alpha(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
            assert expected.tolist() == pytest.approx([APART * float(alpha.diff().square().sum()), 0], rel=1e-9)
    assert dim == 0 or not within(drawn[2] * torch.tensor([1, 1 / 2]), enumerated(name, 2))


@pytest.mark.parametrize("name", CORE)
def test_bound_of_dependent_tokens_falls_to_the_likelihood(name):
    """Check that the bound is never below the true NLL, falls with more steps, and is tight in continuous time.

    To five standard errors, which a correct bound exceeds with probability 1e-5. cdm starts at 16 steps: there its
    bound is no lower than in one step, as z0_hat is a mean, which is exact in small steps only. Power: without the
    latents' part the bound is below the NLL.
    """
    draws = [pair_parts(name, steps, count=200_000) for steps in (*CORE[name][2], None)]
    means = [float(nats.sum(-1).mean()) for nats in draws]
    errors = [float(nats.sum(-1).std() / len(nats) ** 0.5) for nats in draws]
    assert all(mean > -5 * error for mean, error in zip(means, errors))
    assert means == sorted(means, reverse=True)
    assert abs(means[-1]) < 5 * errors[-1] + 5e-4  # the last step [0, 1e-4] is not infinitesimal
    assert CORE[name][0] == 0 or float(draws[-1][:, 0].mean()) < -5 * errors[-1]


@pytest.mark.parametrize("name, steps", [("mdlm", 1), ("mdlm", 3), ("mdlm", None), ("cadd", 1), ("cadd", None)])
def test_the_bound_of_a_token_given_the_other_is_its_conditional_likelihood(name, steps):
    """Compare the bound of each pair's second token, given the first, with -log p(second | first) on average.

    The bound of one token is tight: without a latent at every T, with a latent in one step and in continuous time.
    Power: with the first token hidden, or both scored, the bound is another.
    """
    (dim, schedule, _), x_0 = CORE[name], pairs(50_000)
    table, free = WORDS[:, :dim], torch.tensor([False, True]).expand(50_000, -1)
    exact = -(JOINT[x_0[:, 0], x_0[:, 1]] / JOINT.sum(1)[x_0[:, 0]]).log()  # nats
    denoiser = pair_oracle(table, schedule)

    def hidden(x_t, z_t, t):
        return denoiser(x_t.index_fill(1, torch.tensor([0]), MASK), z_t * torch.tensor([0, 1])[:, None], t)

    def excess(denoiser, free) -> torch.Tensor:
        parts = nelbo_parts(denoiser, x_0, table, schedule, MASK, steps=steps, free=free, generator=rng(1))
        return (sum(parts) - exact)[:, None]  # (N, 1)

    zero = torch.tensor([0.0])
    assert within(excess(denoiser, free), zero)
    assert not within(excess(denoiser, None), zero) and not within(excess(hidden, free), zero)
