"""The baselines: their formulas against Bayes' rule, their bounds and samples against a known law of two tokens."""

import math

import pytest
import torch
from scipy import stats

from cadd_min import ops
from cadd_min.baselines import ar, common, dispatch, sedd, udm
from cadd_min.loss import stratified_times
from cadd_min.model import BASELINES, ModelConfig
from cadd_min.objective import Batch, Objective
from cadd_min.orders import Sampling
from cadd_min.sampler import first_tokens
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.errors import InputError
from tests.test_dit import first_attention
from tests.toys import ALPHA, JOINT, NANO, nano, pairs, randomized, rng

MODULES = {"ar": ar, "udm": udm, "sedd": sedd}
SCHEDULES = [NoiseSchedule("linear"), NoiseSchedule("cosine")]
f64 = torch.float64


def drawn(module, model, shape, *, prompt=None, generator=None, callback=None, **settings):
    """Draw samples by a baseline's chain, as dispatch.py does."""
    x = first_tokens(shape, model.mask_id, prompt, torch.zeros(model.mask_id + 1, 0))
    return module.sample(model, x, Sampling(**settings), ops.draw_seed(generator), callback)


class Toy:
    """A stand-in for a network on pairs of tokens, V = 3: law(x_t, t, schedule) -> log p (B, 2, 3), exact or not."""

    def __init__(self, law, schedule=SCHEDULES[0]):
        self.law, self.schedule, self.mask_id = law, schedule, 3

    def features(self, x_t, z_t, t, label=None):
        return self.law(x_t, t.double(), self.schedule)

    def head_matrix(self):
        return torch.eye(3, dtype=f64)


def left_to_right(x, t, schedule):
    """Compute log p(x^1), then log p(x^2 | x^1), from the shifted input x."""
    first = JOINT.sum(1).log().expand(len(x), 1, 3)
    rows = [first] if x.shape[1] == 1 else [first, (JOINT / JOINT.sum(1, keepdim=True)).log()[x[:, 1]][:, None]]
    return torch.cat(rows, 1)


def leave_one_out(x_t, t, schedule):
    """Compute log p(x_0^i | the other token of x_t) under uniform noise."""
    alpha = schedule.alpha(t)[:, None, None]
    noise = alpha * torch.eye(3, dtype=f64) + (1 - alpha) / 3  # (B, x_0, x_t)
    rows = []
    for joint, other in ((JOINT, x_t[:, 1]), (JOINT.T, x_t[:, 0])):
        likelihood = noise.gather(2, other[:, None, None].expand(-1, 3, 1))[..., 0]  # (B, the other's x_0)
        rows.append(likelihood @ joint.T)
    p = torch.stack(rows, 1)
    return (p / p.sum(-1, keepdim=True)).log()


def counted_twice(x_t, t, schedule):
    """Compute log p(x_0^i | x_t), position i included: wrong for udm, whose formula adds what position i tells."""
    alpha = schedule.alpha(t)[:, None, None]
    own = alpha * torch.nn.functional.one_hot(x_t, 3) + (1 - alpha) / 3
    return (leave_one_out(x_t, t, schedule).exp() * own).log().log_softmax(-1)


def given_unmasked(x_t, t, schedule):
    """Compute log V + log p(x_0^i | x_t) where i is masked: the output of an exact network's head."""
    padded = torch.cat([JOINT, JOINT.sum(0, keepdim=True)]), torch.cat([JOINT.T, JOINT.sum(1)[None]])
    p = torch.stack([padded[1][x_t[:, 1]], padded[0][x_t[:, 0]]], 1)
    return (p / p.sum(-1, keepdim=True)).log() + math.log(3)


def doubtful(law):
    """Make a wrong denoiser: too uncertain, and not normalised."""
    return lambda x_t, t, schedule: 0.4 * law(x_t, t, schedule)


EXACT = {"ar": left_to_right, "udm": leave_one_out, "sedd": given_unmasked}


def p_value(x: torch.Tensor, joint: torch.Tensor = JOINT) -> float:
    """Compute the p-value of the chi-square test of pairs of tokens (N, 2) against a joint law (3, 3)."""
    counts = torch.bincount(3 * x[:, 0] + x[:, 1], minlength=9)
    return float(stats.chisquare(counts.numpy(), (joint.flatten() * len(x)).numpy()).pvalue)


# ------------------------------------------------------------------------------------------------ uniform states


def chain(start: float, end: float, schedule: NoiseSchedule, vocab_size: int, steps: int = 50) -> torch.Tensor:
    """Compute P(x_end | x_start) (V, V) as a product of small steps that each keep a token or draw any token."""
    times = torch.linspace(start, end, steps + 1, dtype=f64)
    matrix = torch.eye(vocab_size, dtype=f64)
    for s, t in zip(times[:-1], times[1:]):
        keep = schedule.alpha(t) / schedule.alpha(s)
        matrix = matrix @ (keep * torch.eye(vocab_size, dtype=f64) + (1 - keep) / vocab_size)
    return matrix


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("s, t", [(0.0, 0.3), (0.2, 0.5), (0.5, 0.51), (0.05, 1.0)])
def test_udm_posterior_is_bayes_rule(schedule, s, t):
    """Compare the posterior with Bayes' rule for all (x_0, x_t, x_s) of four tokens, and for a mixture over x_0.

    The forward process is a product of small steps here, so a wrong a = alpha_t / alpha_s or normaliser shows.
    """
    early, late = chain(0, s, schedule, 4), chain(s, t, schedule, 4)
    joint = early[:, :, None] * late[None]  # (x_0, x_s, x_t)
    expected = (joint / joint.sum(1, keepdim=True)).transpose(1, 2)  # (x_0, x_t, x_s)
    time = torch.tensor([s, t], dtype=f64)
    hot, x_t = torch.eye(4, dtype=f64)[:, None].expand(-1, 4, -1), torch.arange(4).expand(4, -1)
    torch.testing.assert_close(udm.posterior(x_t, hot, *time, schedule), expected, rtol=1e-10, atol=1e-12)
    law = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=f64)
    mixed = torch.einsum("a,ast->ts", law, joint)
    posterior = udm.posterior(torch.arange(4), law.expand(4, -1), *time, schedule)
    torch.testing.assert_close(posterior, mixed / mixed.sum(1, keepdim=True), rtol=1e-10, atol=1e-12)


def test_udm_forward_frequencies():
    """Compare the frequencies of x_t, for token 1 of five at alpha = 0.4, with q(x_t | x_0) by chi-square at 1e-4.

    Power: alpha = 0.41 is rejected.
    """
    x_0, t = torch.ones(20_000, 10, dtype=torch.int64), torch.full((20_000,), 0.6, dtype=f64)
    counts = torch.bincount(udm.q_sample(x_0, t, SCHEDULES[0], 5, rng(0)).flatten(), minlength=5).double()

    def p(alpha: float) -> float:
        law = alpha * torch.eye(5, dtype=f64)[1] + (1 - alpha) / 5
        return float(stats.chisquare(counts.numpy(), (law * counts.sum()).numpy()).pvalue)

    assert p(0.4) > ALPHA > p(0.41)


def grid(c: torch.Tensor, dtype=f64):
    """Make all N = 25 pairs (x_t, x_0) of five tokens with random laws of x_0.

    Returns: probs (N, 5), x_t (N,), x_0 (N,) and the `Law`, its spread at c.
    """
    x_t, x_0 = torch.arange(5).repeat(5), torch.arange(5).repeat_interleave(5)
    p = torch.randn(25, 5, generator=rng(3), dtype=f64).mul(2).softmax(-1)
    law = udm.laws(p.log().to(dtype), torch.eye(5, dtype=dtype), x_t, x_0, c.expand(25))
    return p, x_t, x_0, law


def kl(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Compute KL(q || p) in nats over the last dimension."""
    return torch.where(q > 0, q * (q / p).log(), 0).sum(-1)


def posterior_kl(p, x_t, x_0, s, t, schedule):
    """Compute the KL between the posteriors given x_0 and given the law p (N, 5), over all V outcomes, (N,) nats."""
    hot = torch.eye(5, dtype=f64)[x_0]
    return kl(udm.posterior(x_t, hot, s, t, schedule), udm.posterior(x_t, p, s, t, schedule))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("s, t", [(0.0, 0.3), (0.2, 0.5), (0.9, 1.0), (0.0, 1.0)])
def test_udm_step_is_the_kl_of_the_posteriors(schedule, s, t):
    """Compare `kl_step`, which needs 3 numbers of x_theta, with a sum over all tokens, also for s = 0 and t = 1."""
    s, t = torch.tensor([s, t], dtype=f64)
    p, x_t, x_0, law = grid(udm.odds(s, schedule, 5))
    step = udm.kl_step(law, x_t == x_0, s.expand(25), t.expand(25), schedule, 5)
    torch.testing.assert_close(step, posterior_kl(p, x_t, x_0, s, t, schedule), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("t", [0.01, 0.3, 0.7, 0.999])
def test_udm_rate_is_the_kl_of_jump_processes_and_of_small_steps(schedule, t):
    """Compare `kl_rate` with the sum over jumps written out, and with the KL of a step of 1e-6 divided by its length.

    Power: without the terms V / y_i - V / x_i the sum over jumps is different.
    """
    t, h = torch.tensor(t, dtype=f64), 1e-6
    p, x_t, x_0, law = grid(udm.odds(t, schedule, 5))
    rate = udm.kl_rate(law, x_t == x_0, t.expand(25), schedule, 5)
    alpha = schedule.alpha(t)
    r = schedule.flip_rate(t) * (1 - alpha) / alpha
    x, y = (5 * alpha * probs + 1 - alpha for probs in (torch.eye(5, dtype=f64)[x_0], p))
    true_jump, model_jump = (r / 5 * row / row.gather(1, x_t[:, None]) for row in (x, y))
    changes = torch.arange(5) != x_t[:, None]
    entropy = (true_jump * (true_jump / model_jump).log() * changes).sum(-1)
    torch.testing.assert_close(rate, entropy + ((model_jump - true_jump) * changes).sum(-1), rtol=1e-8, atol=1e-12)
    assert not torch.allclose(rate, entropy, rtol=1e-2)
    torch.testing.assert_close(rate, posterior_kl(p, x_t, x_0, t - h, t, schedule) / h, rtol=1e-3, atol=1e-5)


def test_udm_rate_keeps_its_digits_in_float32():
    """Check that float32 logits give float64's rate at V = 50,257, and that rate and gradient are 0 at t = 1.

    Power: the same sum in float32 with alpha in the denominator is off by more than 0.01.
    """
    schedule, size = SCHEDULES[0], 50_257
    t = torch.tensor([1e-4, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6, 1.0], dtype=f64)
    logits = 2 * torch.randn(7, size, generator=rng(0), dtype=f64)
    x_0, same = torch.arange(7), torch.tensor([True, False] * 3 + [False])
    x_t = torch.where(same, x_0, torch.arange(7) + 100)
    rates = []
    for dtype in (f64, torch.float32):
        rows = logits.to(dtype).requires_grad_()
        spread = torch.log1p(udm.odds(t, schedule, size)[:, None].to(dtype) * rows.softmax(-1)).sum(-1)
        own, true = (rows.log_softmax(-1).gather(1, x[:, None])[:, 0] for x in (x_t, x_0))
        rates.append(udm.kl_rate(udm.Law(own, true, spread), same, t, schedule, size))
        gradient = torch.autograd.grad(rates[-1].sum(), rows)[0]
        assert gradient.isfinite().all() and (gradient[-1] == 0).all()
    torch.testing.assert_close(rates[1], rates[0], rtol=1e-3, atol=1e-5)
    assert (rates[0] >= 0).all() and rates[0][-1] == 0
    alpha, p = schedule.alpha(t).float()[:, None], logits.float().softmax(-1)
    x = size * alpha * torch.nn.functional.one_hot(x_0, size) + 1 - alpha
    y = size * alpha * p + 1 - alpha
    x_i, y_i = (row.gather(1, x_t[:, None]) for row in (x, y))
    total = (x / x_i * (x * y_i / (x_i * y)).log()).sum(-1) - size * (1 / x_i - 1 / y_i)[:, 0]
    naive = total / size / alpha[:, 0]
    assert (naive[:-1] - rates[0][:-1]).abs().max() > 0.01


@pytest.mark.parametrize("module, function", [(udm, "laws"), (sedd, "scores")])
def test_chunks_change_nothing(module, function, monkeypatch):
    """Compare values and gradients in one chunk of 70 rows with those in chunks of 32, the last of which is short."""
    rows = torch.randn(70, 8, generator=rng(0), dtype=f64, requires_grad=True)
    head = torch.randn(13, 8, generator=rng(1), dtype=f64, requires_grad=True)
    tokens = [torch.randint(13, (70,), generator=rng(2 + i)) for i in range(2)]
    inputs = [*tokens, torch.rand(70, generator=rng(4))] if module is udm else tokens[:1]
    results = []
    for chunk in (70, 32):
        monkeypatch.setattr(module, "chunk_rows", lambda head, chunk=chunk: chunk)
        values = getattr(module, function)(rows, head, *inputs)
        results.append((*values, *torch.autograd.grad(sum(v.sum() for v in values), (rows, head))))
    for whole, chunked in zip(*results):
        torch.testing.assert_close(chunked, whole)


# ------------------------------------------------------------------------------------------------ score entropy


def test_sedd_is_the_score_entropy():
    """Compare with sigma' (sum_v s_v - ratio log s + ratio (log ratio - 1)) written out, for scores with Z not 1."""
    schedule, t = SCHEDULES[1], torch.tensor(0.4, dtype=f64)
    alpha, f = schedule.alpha(t), torch.randn(6, 5, generator=rng(0), dtype=f64)
    ratio, x_0 = alpha / (1 - alpha), torch.arange(6) % 5
    s = ratio * f.exp()
    sigma_prime = schedule.flip_rate(t) * (1 - alpha) / alpha
    own = s.gather(1, x_0[:, None])[:, 0]
    expected = sigma_prime * (s.sum(-1) - ratio * own.log() + ratio * (ratio.log() - 1))
    log_z, f_0 = sedd.scores(f + math.log(5), torch.eye(5, dtype=f64), x_0)
    torch.testing.assert_close(schedule.flip_rate(t) * sedd.score_entropy(log_z, f_0), expected, rtol=1e-10, atol=0)


def test_sedd_step_is_the_kl_of_its_kernel():
    """Compare `kl_step` with the KL over V + 1 outcomes written out.

    It is infinite where the kernel never stays masked, the CE at rho = 1, and the score entropy times rho near rho = 0.
    """
    f = torch.tensor([[-1.0, -2.0, -0.5]] * 3, dtype=f64)
    log_z = f.logsumexp(-1)
    for rho in torch.tensor([0.1, 0.5, 0.8], dtype=f64):
        p = torch.cat([rho * f.exp(), 1 - rho * log_z.exp()[:, None]], 1)
        q = torch.cat([rho * torch.eye(3, dtype=f64), torch.full((3, 1), float(1 - rho), dtype=f64)], 1)
        torch.testing.assert_close(sedd.kl_step(log_z, f[0], rho.expand(3)), kl(q, p), rtol=1e-10, atol=0)
    assert (sedd.kl_step(log_z + 1, f[0] + 1, torch.full((3,), 0.9)) == math.inf).all()
    torch.testing.assert_close(sedd.kl_step(log_z, f[0], torch.ones(3)), log_z - f[0])
    small = torch.full((3,), 1e-6, dtype=f64)
    torch.testing.assert_close(
        sedd.kl_step(log_z, f[0], small) / 1e-6, sedd.score_entropy(log_z, f[0]), rtol=1e-5, atol=0
    )


# ------------------------------------------------------------------------------------------------ bounds and samples


def excess(name: str, law, steps: int | None, schedule=SCHEDULES[0], count: int = 300_000) -> tuple[float, float]:
    """Measure the mean of the bound less the true -log p(x_0), in nats per sequence, and its standard error."""
    x_0 = pairs(count)
    bound = MODULES[name].nelbo_parts(Toy(law, schedule), x_0, steps=steps, generator=rng(1))
    over = sum(bound) + JOINT[x_0[:, 0], x_0[:, 1]].log()
    return float(over.mean()), float(over.std() / count**0.5)


def test_ar_likelihood_is_exact():
    """Check that the exact network gives -log p(x_0) for every sequence. Power: an uncertain network pays for it."""
    mean, error = excess("ar", left_to_right, None, count=100)
    assert abs(mean) < 1e-12 and error < 1e-12
    assert excess("ar", doubtful(left_to_right), None)[0] > 0.01


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("name", ["udm", "sedd"])
def test_exact_denoiser_meets_the_likelihood(name, schedule):
    """Check that the bound is tight in continuous time, to five standard errors (a seed fails with probability 6e-7).

    Power: a too uncertain denoiser, and for udm a denoiser that counts x_t twice, exceed it by more than that.
    """
    mean, error = excess(name, EXACT[name], None, schedule)
    assert abs(mean) < 5 * error + 5e-4  # the last step [0, 1e-4] is not infinitesimal
    for wrong in [doubtful(EXACT[name])] + [counted_twice] * (name == "udm"):
        mean, error = excess(name, wrong, None, schedule, count=1_000_000)
        assert mean > 5 * error + 5e-4


def summed(name: str, law, steps: int, schedule, monkeypatch) -> float:
    """Compute the mean bound in `steps` steps less the entropy, exactly: a weighted sum over all times, x_0 and x_t."""
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    noisy = every if name == "udm" else torch.cartesian_prod(torch.arange(2), torch.arange(2)).bool()
    index = torch.cartesian_prod(torch.arange(1, steps + 1), torch.arange(9), torch.arange(len(noisy)))
    u, x_0, x_t = (index[:, 0] - 0.5) / steps, every[index[:, 1]], noisy[index[:, 2]]
    alpha = schedule.alpha(index[:, :1].double() / steps)
    q = alpha * (x_t == x_0) + (1 - alpha) / 3 if name == "udm" else torch.where(x_t, 1 - alpha, alpha)
    truth = JOINT[x_0[:, 0], x_0[:, 1]]
    monkeypatch.setattr(MODULES[name], "stratified_times", lambda *args: u.double())
    monkeypatch.setattr(MODULES[name], "q_sample" if name == "udm" else "masked_at", lambda *args: x_t)
    bound = MODULES[name].nelbo_parts(Toy(law, schedule), x_0, steps=steps).discrete
    return float((truth * q.prod(-1) * (bound + truth.log())).sum() / steps)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("name", ["udm", "sedd"])
def test_discrete_bounds_fall_to_the_likelihood(name, schedule, monkeypatch):
    """Check the excess over the entropy with the exact denoiser: in one step, and as the number of steps T grows.

    One step draws the two tokens independently, so its excess is their mutual information. The excess of T steps falls
    like 1/T. Power: that of a too uncertain denoiser, and for udm of a denoiser that counts x_t twice, stays.
    """
    mutual_information = float((JOINT * (JOINT / (JOINT.sum(1)[:, None] * JOINT.sum(0))).log()).sum())
    over = {steps: summed(name, EXACT[name], steps, schedule, monkeypatch) for steps in (1, 2, 16, 512, 1024)}
    assert over[1] == pytest.approx(mutual_information, rel=1e-6)
    assert over[1] > over[2] > over[16] > over[512] > over[1024] > 0
    assert 2 * over[1024] - over[512] == pytest.approx(0, abs=2e-5)  # extrapolated to infinitely many steps
    for wrong in [doubtful(EXACT[name])] + [counted_twice] * (name == "udm"):
        assert summed(name, wrong, 1024, schedule, monkeypatch) > 0.02
    with pytest.raises(InputError, match="steps"):
        excess(name, EXACT[name], 0)


@pytest.mark.parametrize("name", BASELINES)
def test_samples_follow_the_law(name):
    """Compare 20,000 pairs drawn with the exact denoiser with the joint law, by chi-square at 1e-4.

    Power: a too uncertain denoiser is rejected. So is a single step, which draws the two tokens independently.
    """

    def draw(law, steps, **settings):
        return drawn(MODULES[name], Toy(law), (20_000, 2), steps=steps, generator=rng(0), **settings)

    assert p_value(draw(EXACT[name], 200)) > ALPHA
    assert p_value(draw(doubtful(EXACT[name]), 200)) < ALPHA
    if name == "udm":
        assert p_value(draw(counted_twice, 200)) < ALPHA
    if name != "ar":
        assert p_value(draw(EXACT[name], 200, time_grid="cosine")) > ALPHA
        one = draw(EXACT[name], 1)
        assert p_value(one) < ALPHA < p_value(one, JOINT.sum(1)[:, None] * JOINT.sum(0))


def test_sedd_stays_masked_by_its_scores():
    """Check that the first of two steps unmasks the share min(1, rho_flip Z) = min(1, 0.5 Z), and the last the rest.

    The share is compared to five standard errors. Power: a sampler that ignores Z would unmask the share 0.5 for all
    three Z. A last step like the others would leave four of ten masks at Z = 0.6.
    """
    for z, expected in ((1.0, 0.5), (0.6, 0.3), (3.0, 1.0)):
        shares = []
        drawn(
            sedd,
            Toy(lambda *a, z=z: given_unmasked(*a) + math.log(z)),
            (10_000, 2),
            steps=2,
            generator=rng(0),
            callback=lambda step, shares=shares: shares.append(float(step.fresh.double().mean())),
        )
        assert abs(shares[0] - expected) < 5 * (expected * (1 - expected) / 20_000) ** 0.5 + 1e-9
        assert abs(sum(shares) - 1) < 1e-9


@pytest.mark.parametrize("name", BASELINES)
def test_prompts_stay_seeds_repeat_and_no_mask_is_left(name):
    """Check prompts with gaps anywhere, seeds, the callback's last x, temperature, top_p, and settings out of range.

    No mask may be left, and no drawn token may lie outside of the vocabulary.
    """
    net, module = randomized(nano(name), 0.2), MODULES[name]
    prompt = torch.randint(11, (3, 12), generator=rng(0))
    free = torch.rand(3, 12, generator=rng(1)) < 0.6
    prompt[free] = net.mask_id
    steps = []
    first, repeated, other_seed = (
        drawn(module, net, (3, 12), steps=5, prompt=prompt, generator=rng(seed), callback=steps.append)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, repeated) and not torch.equal(first, other_seed)
    assert torch.equal(steps[-1].x, other_seed) and steps[-1].belief().shape == (3, 12)
    assert torch.equal(first[~free], prompt[~free]) and first.dtype == torch.int64
    for x in (first, drawn(module, net, (3, 12), steps=5, temperature=0.7, top_p=0.5, generator=rng(0))):
        assert ((0 <= x) & (x < net.mask_id)).all()
    greedy = [drawn(module, net, (2, 12), steps=30, temperature=0.0, generator=rng(seed)) for seed in (0, 1)]
    assert torch.equal(*greedy) or name != "ar"
    with pytest.raises(InputError, match="prompt"):
        drawn(module, net, (3, 12), steps=5, prompt=prompt[:2])
    with pytest.raises(InputError, match="top_p"):
        drawn(module, net, (3, 12), steps=5, top_p=0.0)
    with pytest.raises(InputError, match="temperature"):
        drawn(module, net, (3, 12), steps=5, temperature=-1.0)


# ------------------------------------------------------------------------------------------------ the network


@pytest.mark.parametrize("neighbours", [False, True])
def test_ar_is_causal(neighbours):
    """Check that token 5 changes no logits up to position 5, and all after it.

    Power: in the bidirectional network it changes logits before position 5, too.
    """
    x = torch.randint(11, (2, 12), generator=rng(0))
    changed = x.clone()
    changed[:, 5] = (x[:, 5] + 1) % 11

    def affected(name: str) -> torch.Tensor:
        net = randomized(nano(name, neighbours=neighbours), 0.2)
        inputs = (ar.shifted(tokens, net.mask_id) for tokens in (x, changed))
        before, after = (common.features(net, shifted, torch.zeros(2)) @ net.head_matrix().T for shifted in inputs)
        return (before != after).any(-1).any(0)  # (L,)

    assert not affected("ar")[:6].any() and affected("ar")[6:].all()
    assert affected("mdlm")[:6].any()


def test_causal_heads_start_at_the_tokens_before():
    """Check that heads 0 and 1 attend most to the inputs at offsets 0 and -1 before training.

    The inputs are shifted, so these are the tokens i - 1 and i - 2.
    """
    net = nano("ar", length=64).backbone
    for block in net.blocks:
        attention, rows = first_attention(block, net.rotary, 64), torch.arange(10, 50)
        for head in range(block.heads):
            assert torch.equal(attention[head, rows].argmax(-1), rows - head)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_have_no_latent_and_are_for_text(name):
    """Check that the latent table has no columns, and that a configuration for images is refused."""
    net = nano(name)
    assert net.table().shape == (12, 0) and net.latent.dim == 0
    with pytest.raises(InputError, match=f"model {name} is for text"):
        ModelConfig(17, 64, NANO, image=(8, 8, 1), model=name)


@pytest.mark.parametrize("name", BASELINES)
def test_given_tokens_and_no_steps_are_refused(name):
    """Check that a baseline refuses a batch with given tokens, which it would train on and score like all tokens."""
    net, x_0 = nano(name), torch.randint(11, (2, 12), generator=rng(0))
    given = Batch(x_0, free=x_0 > 3)
    with pytest.raises(InputError, match=f"given tokens are for cadd, mdlm and cdm, and this is {name}"):
        dispatch.training_loss(name)(net, given, stratified_times(2, rng(1)), Objective(), rng(2))
    with pytest.raises(InputError, match=f"given tokens are for cadd, mdlm and cdm, and this is {name}"):
        dispatch.bound(net, given)
    with pytest.raises(InputError, match=f"labels are for cadd, mdlm and cdm, and this is {name}"):
        dispatch.bound(net, Batch(x_0, label=torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(InputError, match="steps"):
        dispatch.bound(net, Batch(x_0), steps=0)


@pytest.mark.parametrize("name", BASELINES)
def test_starts_at_the_uniform_law(name):
    """Check that the untrained loss and bound are about log V a token."""
    net, batch = nano(name), Batch(torch.randint(11, (32, 12), generator=rng(0)))
    u = stratified_times(32, rng(1))
    loss = MODULES[name].training_loss(net, batch, u, Objective(), rng(2))
    bound = MODULES[name].nelbo_parts(net, batch.x_0, generator=rng(0))
    assert float(loss.total.detach()) == pytest.approx(math.log(11), rel=0.3)
    assert float(bound.discrete.mean()) / 12 == pytest.approx(math.log(11), rel=0.3)


@pytest.mark.parametrize(
    "settings",
    [{"order": "entropy"}, {"order": "confidence", "block": 4}, {"remask": 0.2}, {"time_grid": "first-hitting"}],
    ids=str,
)
def test_sedd_takes_a_plan_as_the_masked_model_does(settings):
    """Compare with the masked model of the same weights: softmax(f) is p(x_0 | x_t). Z has no part in a plan."""
    score, masked = nano("sedd"), nano("mdlm")
    torch.nn.init.normal_(score.head.weight, std=0.5, generator=rng(1))  # an untrained head is zero
    masked.load_state_dict(score.state_dict())
    tokens = [dispatch.draw(m, 6, Sampling(5, **settings), generator=rng(3)) for m in (score.eval(), masked.eval())]
    assert torch.equal(*tokens) and len(tokens[0].unique()) > 3
    plain = [dispatch.draw(m, 6, Sampling(5), generator=rng(3)) for m in (score, masked)]
    assert not torch.equal(*plain)  # without a plan a position of sedd flips with rho_flip Z


def test_sedd_refuses_what_only_a_latent_has():
    with pytest.raises(InputError, match="num latents is for cadd, mdlm and cdm, and this is sedd"):
        dispatch.check(nano("sedd"), Sampling(num_latents=2, order="entropy"))
