"""The baselines: their mathematics against Bayes' rule, their bounds and samples against a law that is known."""

import math

import pytest
import torch
from scipy import stats

from cadd_min import ops
from cadd_min.baselines import ar, common, sedd, udm
from cadd_min.loss import stratified_times
from cadd_min.model import BASELINES, ModelConfig
from cadd_min.objective import Batch, Objective
from cadd_min.orders import Sampling
from cadd_min.sampler import first_tokens
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.errors import InputError
from tests.test_dit import first_attention
from tests.toys import ALPHA, JOINT, NANO, nano, pairs, rng

MODULES = {"ar": ar, "udm": udm, "sedd": sedd}
SCHEDULES = [NoiseSchedule("linear"), NoiseSchedule("cosine")]
f64 = torch.float64


def drawn(module, model, shape, *, prompt=None, generator=None, callback=None, **how):
    """Samples by a baseline's chain, as methods.py asks for them."""
    x = first_tokens(shape, model.mask_id, prompt, torch.zeros(model.mask_id + 1, 0))
    return module.sample(model, x, Sampling(**how), ops.draw_seed(generator), callback)


class Toy:
    """A stand-in for a network on two tokens out of three: law(x_t, t) -> log p (B, 2, 3), exact or not."""

    def __init__(self, law, schedule=SCHEDULES[0]):
        self.law, self.schedule, self.mask_id = law, schedule, 3

    def features(self, x_t, z_t, t, label=None):
        return self.law(x_t, t.double(), self.schedule)

    def head_matrix(self):
        return torch.eye(3, dtype=f64)


def left_to_right(x, t, schedule):
    """x is the shifted input: log p(x^1), then log p(x^2 | x^1)."""
    first = JOINT.sum(1).log().expand(len(x), 1, 3)
    rows = [first] if x.shape[1] == 1 else [first, (JOINT / JOINT.sum(1, keepdim=True)).log()[x[:, 1]][:, None]]
    return torch.cat(rows, 1)


def leave_one_out(x_t, t, schedule):
    """log p(x_0^i | the other token of x_t) under uniform noise."""
    alpha = schedule.alpha(t)[:, None, None]
    noise = alpha * torch.eye(3, dtype=f64) + (1 - alpha) / 3  # (B, x_0, x_t)
    rows = []
    for joint, other in ((JOINT, x_t[:, 1]), (JOINT.T, x_t[:, 0])):
        likelihood = noise.gather(2, other[:, None, None].expand(-1, 3, 1))[..., 0]  # (B, the other's x_0)
        rows.append(likelihood @ joint.T)
    p = torch.stack(rows, 1)
    return (p / p.sum(-1, keepdim=True)).log()


def counted_twice(x_t, t, schedule):
    """log p(x_0^i | x_t), position i included: what the formula adds to leave_one_out is in it already."""
    alpha = schedule.alpha(t)[:, None, None]
    own = alpha * torch.nn.functional.one_hot(x_t, 3) + (1 - alpha) / 3
    return (leave_one_out(x_t, t, schedule).exp() * own).log().log_softmax(-1)


def given_unmasked(x_t, t, schedule):
    """log V + log p(x_0^i | x_t) where i is masked: what an exact network's head gives."""
    padded = torch.cat([JOINT, JOINT.sum(0, keepdim=True)]), torch.cat([JOINT.T, JOINT.sum(1)[None]])
    p = torch.stack([padded[1][x_t[:, 1]], padded[0][x_t[:, 0]]], 1)
    return (p / p.sum(-1, keepdim=True)).log() + math.log(3)


def doubtful(law):
    """A denoiser that believes less than it should, and is not normalised."""
    return lambda x_t, t, schedule: 0.4 * law(x_t, t, schedule)


EXACT = {"ar": left_to_right, "udm": leave_one_out, "sedd": given_unmasked}


def p_value(x: torch.Tensor, joint: torch.Tensor = JOINT) -> float:
    """Chi-square of pairs of tokens (N, 2) against a joint law."""
    counts = torch.bincount(3 * x[:, 0] + x[:, 1], minlength=9)
    return float(stats.chisquare(counts.numpy(), (joint.flatten() * len(x)).numpy()).pvalue)


def scrambled(model: str, **options):
    """A small network with weights everywhere: an untrained one is an identity and says nothing."""
    net = nano(model, **options)
    for i, parameter in enumerate(net.parameters()):
        torch.nn.init.normal_(parameter, std=0.2, generator=rng(i))
    return net


# ------------------------------------------------------------------------------------------------ uniform states


def chain(start: float, end: float, schedule: NoiseSchedule, vocab_size: int, steps: int = 50) -> torch.Tensor:
    """P(x_end | x_start) (V, V), a product of `steps` small steps that each keep a token or draw any."""
    times = torch.linspace(start, end, steps + 1, dtype=f64)
    matrix = torch.eye(vocab_size, dtype=f64)
    for s, t in zip(times[:-1], times[1:]):
        keep = schedule.alpha(t) / schedule.alpha(s)
        matrix = matrix @ (keep * torch.eye(vocab_size, dtype=f64) + (1 - keep) / vocab_size)
    return matrix


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("s, t", [(0.0, 0.3), (0.2, 0.5), (0.5, 0.51), (0.05, 1.0)])
def test_udm_posterior_is_bayes_rule(schedule, s, t):
    """On the whole grid (x_0, x_t, x_s) of four tokens, and as the mixture over a leave-one-out law of x_0."""
    early, late = chain(0, s, schedule, 4), chain(s, t, schedule, 4)
    joint = early[:, :, None] * late[None]  # (x_0, x_s, x_t)
    expected = (joint / joint.sum(1, keepdim=True)).transpose(1, 2)  # (x_0, x_t, x_s)
    time = torch.tensor([s, t], dtype=f64)
    hot, x_t = torch.eye(4, dtype=f64)[:, None].expand(-1, 4, -1), torch.arange(4).expand(4, -1)
    torch.testing.assert_close(udm.posterior(x_t, hot, *time, schedule), expected, rtol=1e-10, atol=1e-12)
    law = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=f64)
    mixed = torch.einsum("a,ast->ts", law, joint)
    found = udm.posterior(torch.arange(4), law.expand(4, -1), *time, schedule)
    torch.testing.assert_close(found, mixed / mixed.sum(1, keepdim=True), rtol=1e-10, atol=1e-12)


def test_udm_forward_frequencies():
    """x_t of token 1 out of five at alpha = 0.4: chi-square at 1e-4. Power: not so for alpha = 0.41."""
    x_0, t = torch.ones(20_000, 10, dtype=torch.int64), torch.full((20_000,), 0.6, dtype=f64)
    counts = torch.bincount(udm.q_sample(x_0, t, SCHEDULES[0], 5, rng(0)).flatten(), minlength=5).double()

    def p(alpha: float) -> float:
        law = alpha * torch.eye(5, dtype=f64)[1] + (1 - alpha) / 5
        return float(stats.chisquare(counts.numpy(), (law * counts.sum()).numpy()).pvalue)

    assert p(0.4) > ALPHA > p(0.41)


def grid(c: torch.Tensor, dtype=f64):
    """Every (x_t, x_0) of five tokens with laws of x_0 drawn at random: probs (N, 5), x_t, x_0 and the `Law`."""
    x_t, x_0 = torch.arange(5).repeat(5), torch.arange(5).repeat_interleave(5)
    p = torch.randn(25, 5, generator=rng(3), dtype=f64).mul(2).softmax(-1)
    law = udm.laws(p.log().to(dtype), torch.eye(5, dtype=dtype), x_t, x_0, c.expand(25))
    return p, x_t, x_0, law


def kl(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.where(q > 0, q * (q / p).log(), 0).sum(-1)


def posterior_kl(p, x_t, x_0, s, t, schedule):
    hot = torch.eye(5, dtype=f64)[x_0]
    return kl(udm.posterior(x_t, hot, s, t, schedule), udm.posterior(x_t, p, s, t, schedule))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("s, t", [(0.0, 0.3), (0.2, 0.5), (0.9, 1.0), (0.0, 1.0)])
def test_udm_step_is_the_kl_of_the_posteriors(schedule, s, t):
    s, t = torch.tensor([s, t], dtype=f64)
    p, x_t, x_0, law = grid(udm.odds(s, schedule, 5))
    found = udm.kl_step(law, x_t == x_0, s.expand(25), t.expand(25), schedule, 5)
    torch.testing.assert_close(found, posterior_kl(p, x_t, x_0, s, t, schedule), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("t", [0.01, 0.3, 0.7, 0.999])
def test_udm_rate_is_the_kl_of_jump_processes_and_of_small_steps(schedule, t):
    """Against the sum over jumps written out, and the KL of a step of 1e-6 divided by its length.

    Power: without its terms V / y_i - V / x_i the sum over jumps is another.
    """
    t, h = torch.tensor(t, dtype=f64), 1e-6
    p, x_t, x_0, law = grid(udm.odds(t, schedule, 5))
    found = udm.kl_rate(law, x_t == x_0, t.expand(25), schedule, 5)
    alpha = schedule.alpha(t)
    r = schedule.flip_rate(t) * (1 - alpha) / alpha
    x, y = (5 * alpha * each + 1 - alpha for each in (torch.eye(5, dtype=f64)[x_0], p))
    jump, model = (r / 5 * each / each.gather(1, x_t[:, None]) for each in (x, y))
    others = torch.arange(5) != x_t[:, None]
    entropy = (jump * (jump / model).log() * others).sum(-1)
    torch.testing.assert_close(found, entropy + ((model - jump) * others).sum(-1), rtol=1e-8, atol=1e-12)
    assert not torch.allclose(found, entropy, rtol=1e-2)
    torch.testing.assert_close(found, posterior_kl(p, x_t, x_0, t - h, t, schedule) / h, rtol=1e-3, atol=1e-5)


def test_udm_rate_keeps_its_digits_in_float32():
    """V = 50,257 and t up to 1: float32 logits give float64's rate; at t = 1 it is 0, and so is its gradient.

    Power: the same sum in float32 with alpha in the denominator is off by far more.
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
    x_i, y_i = (each.gather(1, x_t[:, None]) for each in (x, y))
    total = (x / x_i * (x * y_i / (x_i * y)).log()).sum(-1) - size * (1 / x_i - 1 / y_i)[:, 0]
    naive = total / size / alpha[:, 0]
    assert (naive[:-1] - rates[0][:-1]).abs().max() > 0.01


@pytest.mark.parametrize("module, function", [(udm, "laws"), (sedd, "scores")])
def test_chunks_change_nothing(module, function, monkeypatch):
    rows = torch.randn(70, 8, generator=rng(0), dtype=f64, requires_grad=True)
    head = torch.randn(13, 8, generator=rng(1), dtype=f64, requires_grad=True)
    rest = [torch.randint(13, (70,), generator=rng(2 + i)) for i in range(2)] + [torch.rand(70, generator=rng(4))]
    found = []
    for chunk in (70, 32):
        monkeypatch.setattr(module, "chunk_rows", lambda head, chunk=chunk: chunk)
        values = getattr(module, function)(rows, head, *(rest if module is udm else rest[:1]))
        found.append((*values, *torch.autograd.grad(sum(v.sum() for v in values), (rows, head))))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------------------------ score entropy


def test_sedd_is_the_score_entropy():
    """sigma' (sum_v s_v - ratio log s + ratio (log ratio - 1)) written out, with scores that are not normalised."""
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
    """With V + 1 outcomes written out; infinite where the kernel cannot stay; near rho = 0 the score entropy."""
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
    """Mean of the bound less the true -log p(x_0), nats a sequence, and its standard error."""
    x_0 = pairs(count)
    bound = MODULES[name].nelbo_parts(Toy(law, schedule), x_0, steps=steps, generator=rng(1))
    over = sum(bound) + JOINT[x_0[:, 0], x_0[:, 1]].log()
    return float(over.mean()), float(over.std() / count**0.5)


def test_ar_likelihood_is_exact():
    mean, error = excess("ar", left_to_right, None, count=100)
    assert abs(mean) < 1e-12 and error < 1e-12
    assert excess("ar", doubtful(left_to_right), None)[0] > 0.01


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("name", ["udm", "sedd"])
def test_exact_denoiser_meets_the_likelihood(name, schedule):
    """In continuous time the bound is tight, to five standard errors (a seed fails with probability 6e-7).

    Power: one that believes too little, and for udm one that counts x_t twice, pay more than five of them.
    """
    mean, error = excess(name, EXACT[name], None, schedule)
    assert abs(mean) < 5 * error + 5e-4  # the last step [0, 1e-4] is not infinitesimal
    for wrong in [doubtful(EXACT[name])] + [counted_twice] * (name == "udm"):
        mean, error = excess(name, wrong, None, schedule, count=1_000_000)
        assert mean > 5 * error + 5e-4


def summed(name: str, law, steps: int, schedule, monkeypatch) -> float:
    """The mean bound in `steps` steps less the entropy, nothing drawn: all times, x_0 and x_t, by their weights."""
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    noisy = every if name == "udm" else torch.cartesian_prod(torch.arange(2), torch.arange(2)).bool()
    index = torch.cartesian_prod(torch.arange(1, steps + 1), torch.arange(9), torch.arange(len(noisy)))
    u, x_0, x_t = (index[:, 0] - 0.5) / steps, every[index[:, 1]], noisy[index[:, 2]]
    alpha = schedule.alpha(index[:, :1].double() / steps)
    q = alpha * (x_t == x_0) + (1 - alpha) / 3 if name == "udm" else torch.where(x_t, 1 - alpha, alpha)
    truth = JOINT[x_0[:, 0], x_0[:, 1]]
    monkeypatch.setattr(MODULES[name], "stratified_times", lambda *rest: u.double())
    monkeypatch.setattr(MODULES[name], "q_sample" if name == "udm" else "masked_at", lambda *rest: x_t)
    bound = MODULES[name].nelbo_parts(Toy(law, schedule), x_0, steps=steps).discrete
    return float((truth * q.prod(-1) * (bound + truth.log())).sum() / steps)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("name", ["udm", "sedd"])
def test_discrete_bounds_fall_to_the_likelihood(name, schedule, monkeypatch):
    """With the exact denoiser one step costs what the two tokens tell of each other, exactly; T small ones like 1/T.

    Power: a doubtful one, and for udm one that counts x_t twice, keep on paying.
    """
    apart = float((JOINT * (JOINT / (JOINT.sum(1)[:, None] * JOINT.sum(0))).log()).sum())
    over = {steps: summed(name, EXACT[name], steps, schedule, monkeypatch) for steps in (1, 2, 16, 512, 1024)}
    assert over[1] == pytest.approx(apart, rel=1e-6)
    assert over[1] > over[2] > over[16] > over[512] > over[1024] > 0
    assert 2 * over[1024] - over[512] == pytest.approx(0, abs=2e-5)  # extrapolated to infinitely many
    for wrong in [doubtful(EXACT[name])] + [counted_twice] * (name == "udm"):
        assert summed(name, wrong, 1024, schedule, monkeypatch) > 0.02
    with pytest.raises(InputError, match="steps"):
        excess(name, EXACT[name], 0)


@pytest.mark.parametrize("name", BASELINES)
def test_samples_follow_the_law(name):
    """20,000 pairs of the exact denoiser by chi-square at 1e-4. Power: a believer in less is caught, and so is one
    step where it takes many: that draws the two tokens apart."""

    def draw(law, steps, **how):
        return drawn(MODULES[name], Toy(law), (20_000, 2), steps=steps, generator=rng(0), **how)

    assert p_value(draw(EXACT[name], 200)) > ALPHA
    assert p_value(draw(doubtful(EXACT[name]), 200)) < ALPHA
    if name == "udm":
        assert p_value(draw(counted_twice, 200)) < ALPHA
    if name != "ar":
        assert p_value(draw(EXACT[name], 200, time_grid="cosine")) > ALPHA
        one = draw(EXACT[name], 1)
        assert p_value(one) < ALPHA < p_value(one, JOINT.sum(1)[:, None] * JOINT.sum(0))


def test_sedd_stays_masked_by_its_scores():
    """Halfway in two steps the share unmasked is rho_flip Z = 0.5 Z, to five standard errors; at most all.

    Power: with Z = 1, 0.5, the share is far from both others.
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


@pytest.mark.parametrize("name", BASELINES)
def test_prompts_stay_seeds_repeat_and_no_mask_is_left(name):
    """Gaps in the middle, temperature and top_p too; the callback's last x is the sample."""
    net, module = scrambled(name), MODULES[name]
    prompt = torch.randint(11, (3, 12), generator=rng(0))
    free = torch.rand(3, 12, generator=rng(1)) < 0.6
    prompt[free] = net.mask_id
    steps = []
    first, again, other = (
        drawn(module, net, (3, 12), steps=5, prompt=prompt, generator=rng(seed), callback=steps.append)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(steps[-1].x, other) and steps[-1].belief().shape == (3, 12)
    assert torch.equal(first[~free], prompt[~free]) and first.dtype == torch.int64
    for x in (first, drawn(module, net, (3, 12), steps=5, temperature=0.7, top_p=0.5, generator=rng(0))):
        assert ((0 <= x) & (x < net.mask_id)).all()
    sure = [drawn(module, net, (2, 12), steps=30, temperature=0.0, generator=rng(seed)) for seed in (0, 1)]
    assert torch.equal(*sure) or name != "ar"
    with pytest.raises(InputError, match="prompt"):
        drawn(module, net, (3, 12), steps=5, prompt=prompt[:2])
    with pytest.raises(InputError, match="top_p"):
        drawn(module, net, (3, 12), steps=5, top_p=0.0)
    with pytest.raises(InputError, match="temperature"):
        drawn(module, net, (3, 12), steps=5, temperature=-1.0)


# ------------------------------------------------------------------------------------------------ the network


def test_ar_is_causal():
    """Token j changes no logits up to j, and some after it. Power: the bidirectional network's change before it."""
    x = torch.randint(11, (2, 12), generator=rng(0))
    changed = x.clone()
    changed[:, 5] = (x[:, 5] + 1) % 11

    def moved(name: str) -> torch.Tensor:
        net = scrambled(name)
        inputs = (ar.shifted(each, net.mask_id) for each in (x, changed))
        one, other = (common.features(net, each, torch.zeros(2)) @ net.head_matrix().T for each in inputs)
        return (one != other).any(-1).any(0)

    assert not moved("ar")[:6].any() and moved("ar")[6:].all()
    assert moved("mdlm")[:6].any()


def test_causal_heads_start_at_the_tokens_before():
    """Head 0, 1 is sharpest at input offset 0, -1: the inputs are shifted, so these are the tokens i - 1, i - 2."""
    net = nano("ar", length=64).backbone
    for block in net.blocks:
        attention, rows = first_attention(block, net.rotary, 64), torch.arange(10, 50)
        for head in range(block.heads):
            assert torch.equal(attention[head, rows].argmax(-1), rows - head)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_have_no_latent_and_are_for_text(name):
    net = nano(name)
    assert net.table().shape == (12, 0) and net.latent.dim == 0
    with pytest.raises(InputError, match=f"model {name} is for text"):
        ModelConfig(17, 64, NANO, image=(8, 8, 1), model=name)


@pytest.mark.parametrize("name", BASELINES)
def test_starts_at_the_uniform_law_and_learns_a_batch(name):
    """Untrained the loss is about log V; overfitted on two sequences, by 150 steps, less than half of that."""
    net, x_0 = nano(name), torch.randint(11, (2, 12), generator=rng(0))
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=1e-2), []
    batch = Batch(x_0.repeat(16, 1))
    for step in range(150):
        u = stratified_times(len(batch.x_0), rng(step))
        loss, *parts = MODULES[name].training_loss(net, batch, u, Objective(), rng(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    _, masked, mse = parts
    assert not any(part.requires_grad for part in parts)
    assert 0 < masked <= batch.x_0.numel() and mse == 0
    assert losses[0] == pytest.approx(math.log(11), rel=0.3)
    assert sum(losses[-20:]) / 20 < math.log(11) / 2
    bound = MODULES[name].nelbo_parts(net, batch.x_0, generator=rng(0))
    assert bound.discrete.shape == (32,) and (bound.continuous == 0).all()
    assert float(bound.discrete.mean()) / 12 < math.log(11) / 2
