"""The reverse chain: it draws the true law, also in the tail, and never changes given tokens.

Tokens are compared with known laws by chi-square or by their cross-entropy. Two wrong samplers must fail: `hard`, which
is not exact, and the usual one-stage draw in float32, which loses the tail.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cadd_min.baselines.common import logits_of
from cadd_min.orders import TIME_GRIDS, Sampling, cosine_temperature
from cadd_min.reverse import ZHATS, draw, estimate_z_0, token_probs
from cadd_min.sampler import sample
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.errors import InputError
from tests.toys import ALPHA, LAW, MASK, chain, nano, oracle, rng, toy


def oracle_law(zhat: str, steps: int, count: int = 200_000, table=None, **options) -> torch.Tensor:
    """Count the tokens (3,) that the chain of the exact denoiser draws, L = 1. In float32 the kernel runs if built."""
    table, schedule = toy().float() if table is None else table, options.pop("schedule", NoiseSchedule())
    x = chain(
        oracle(table, schedule), (count, 1), table, schedule, MASK, steps=steps, zhat=zhat, generator=rng(1), **options
    )
    return torch.bincount(x.flatten(), minlength=3)


@pytest.mark.parametrize(
    "discrete, continuous",
    [("linear", "linear"), ("cosine", "cosine"), ("linear", "capped"), ("linear", "flow"), ("all-at-once", "linear")],
)
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_sample_is_exact_at_every_t(steps, discrete, continuous):
    """Compare the tokens with LAW by chi-square: with z0_hat = w[v], v ~ p, the chain is exact at every T."""
    counts = oracle_law("sample", steps, 50_000, schedule=NoiseSchedule(discrete, continuous))
    assert stats.chisquare(counts.numpy(), (LAW * counts.sum()).numpy()).pvalue > ALPHA


def test_soft_converges_and_hard_sharpens():
    """Check that `soft` tends to LAW as T grows, and that `hard` draws more of the mode. Power: chi-square says so."""
    law = LAW.numpy()
    soft = [np.abs(oracle_law("soft", steps, 50_000).numpy() / 50_000 - law).sum() for steps in (4, 64)]
    assert soft[1] < 0.02 and soft[1] < soft[0]
    hard = oracle_law("hard", 64, 50_000).numpy() / 50_000
    assert hard[0] > law[0] + 0.03 and hard[1] < law[1] and hard[2] < law[2]
    assert stats.chisquare(hard * 50_000, law * 50_000).pvalue < 1e-12


def zipf_cross_entropy(draw_step, steps: int, rows: int = 1000) -> tuple[float, float]:
    """Estimate the mean -log p(x), and its standard error, of tokens drawn for a Zipf unigram p, V = 50,257.

    draw_step: (log_p (V,), steps, rows) -> tokens (rows,).
    """
    vocab = 50_257
    log_p = (-torch.arange(1, vocab + 1, dtype=torch.float64).log()).log_softmax(0)
    nats = -log_p[draw_step(log_p.float(), steps, rows)]
    return float(nats.mean()), float(nats.std() / rows**0.5)


def flip_then_draw(log_p, steps, rows):
    """Draw by the project's sampler, 500 rows at a time."""
    table, parts = torch.zeros(len(log_p) + 1, 0), []
    for i in range(rows // 500):
        denoise = lambda x, z, t: log_p.expand(*x.shape, -1)
        parts.append(sample(denoise, (500, 1), table, NoiseSchedule(), len(log_p), steps=steps, generator=rng(i)))
    return torch.cat(parts)[:, 0]


def one_stage_float32(log_p, steps, rows):
    """Draw the wrong way: one (V + 1)-way draw a step with the mask as an outcome, argmax(q / E) in float32.

    E = -log(u) with float32 uniforms u. The mask scores at least (1 - flip) / 17, so a token can win only with E below
    17 p flip / (1 - flip). The logarithms of all other tokens are not taken, which saves time and changes no result.
    """
    gen, p, x = np.random.default_rng(0), log_p.exp().numpy(), []
    for i in range(steps, 0, -1):
        flip, n = np.float32(1 / i), rows - len(x)
        reach = 17 * p[0] * flip / (1 - flip) if i > 1 else np.inf
        u = gen.random((n, len(p)), dtype=np.float32)
        row, token = np.nonzero(u > np.exp(-np.float32(reach)))
        scores = p[token] * flip / -np.log(u[row, token])
        mask = (1 - flip) / -np.log(gen.random(n, dtype=np.float32))
        order = np.lexsort((scores, row))  # best candidate last in each row
        last = np.flatnonzero(np.diff(row[order], append=n))
        best = order[last]
        x += token[best[scores[best] > mask[row[best]]]].tolist()
    return torch.tensor(x)


ZIPF_ENTROPY = 7.566  # nats


@pytest.mark.slow
@pytest.mark.parametrize("steps", [16, 64, 512])
def test_zipf_entropy_does_not_fall_with_t(steps):
    """Compare the tokens' cross-entropy with the Zipf law's entropy, to four standard errors, at few and many steps.

    A sampler that loses the tail draws frequent tokens too often, the more so the more steps it takes.
    """
    mean, error = zipf_cross_entropy(flip_then_draw, steps)
    assert abs(mean - ZIPF_ENTROPY) < 4 * error


@pytest.mark.slow
def test_one_stage_draw_fails_the_zipf_test():
    """Power: catch the one-stage draw in float32, which loses the tail."""
    mean, error = zipf_cross_entropy(one_stage_float32, 512, rows=200)
    assert abs(mean - ZIPF_ENTROPY) > 4 * error


def test_draw_has_its_law_in_the_tail():
    """Compare 500,000 draws over 2,000 tokens with their law by chi-square, a token of probability 2e-5 included.

    Tokens of probability zero, at block borders too, must never be drawn.
    """
    p = torch.rand(2000, generator=rng(0))
    p[[0, 255, 256, 777, 1999]] = 0.0
    p = p / p.sum()
    p[1234] = 2e-5
    counts = torch.zeros(2000, dtype=torch.int64)
    for i in range(50):
        u = torch.rand(10_000, generator=rng(i), dtype=torch.float64)
        counts += torch.bincount(draw(p.expand(len(u), -1), u), minlength=2000)
    assert counts[p == 0].sum() == 0
    law = (p.double() / p.double().sum())[p > 0] * counts.sum()
    assert stats.chisquare(counts[p > 0].numpy(), law.numpy()).pvalue > ALPHA


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 1 - 2**-53]))
def test_draw_never_returns_a_token_without_mass(size, seed, u):
    """Check sparse rows of any size at the extreme uniforms, where rounding could step beyond the last token."""
    p = torch.rand(size, generator=rng(seed)) * (torch.rand(size, generator=rng(seed + 1)) < 0.2)
    p[seed % size] = 0.3
    token = draw(p[None], torch.tensor([u], dtype=torch.float64))
    assert 0 <= token.item() < size and p[token] > 0


def test_the_least_uniform_steps_over_blocks_without_mass():
    p = torch.zeros(1, 600)
    p[0, 500:] = 0.01
    assert draw(p, torch.zeros(1)).item() == 500


def test_probabilities_are_float32_at_least_and_cold_at_the_least_temperature():
    logits = torch.tensor([[[0.0, 1e-6, -5.0, 9.0]]], dtype=torch.float64)
    assert token_probs(logits, 3, 1e-6).tolist() == [[0, 1, 0, 0]] and token_probs(logits, 3, 2e-6)[0, 0] > 0.3
    for dtype, precise in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        assert token_probs(logits.to(dtype), 3).dtype == precise
        rows, head = torch.ones(2, 4, dtype=dtype), torch.ones(3, 4)
        assert logits_of(rows, head).dtype == precise and logits_of(rows, head).tolist() == [[4.0] * 3] * 2


def test_the_belief_of_a_single_place():
    """Check that the nearest latent is sought among all tokens, for one place, and never the mask."""
    for x_0 in range(3):
        sure, steps, table = 1e4 * torch.nn.functional.one_hot(torch.tensor([[x_0]]), 4).double(), [], toy()
        schedule = NoiseSchedule()
        for zhat in ZHATS:
            chain(lambda *_, sure=sure: sure, (1, 1), table, schedule, MASK, steps=1, zhat=zhat, callback=steps.append)
        assert [step.belief().item() for step in steps] == [x_0] * 3


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_token_probs_refuse_logits_that_are_no_law(temperature, bad):
    logits = torch.zeros(1, 3, 8)
    token_probs(logits, 7, temperature)
    logits[0, 1] = bad
    with pytest.raises(InputError, match=r"^the denoiser returned logits that are NaN or all minus infinity$"):
        token_probs(logits, 7, temperature)


def test_token_probs_average_probabilities():
    """Check that probabilities, not logits, are averaged over the latents; then the mask and temperature 0."""
    logits = torch.randn(3, 5, 7, generator=rng(0))
    expected = logits.softmax(-1).mean(0)
    torch.testing.assert_close(token_probs(logits, 7), expected)
    torch.testing.assert_close(token_probs(logits[[2, 0, 1]], 7), expected)  # in any order
    torch.testing.assert_close(token_probs(logits[:1].repeat(4, 1, 1), 7), token_probs(logits[:1], 7))  # as K = 1
    assert not torch.allclose(expected, logits.mean(0).softmax(-1), atol=1e-3)  # the averaged logits'
    assert (token_probs(logits, 2)[:, 2] == 0).all()
    assert token_probs(logits[:1], 7, 0.0).argmax(-1).equal(logits[0].argmax(-1))


def test_zhat_estimates():
    """Compare `hard` and `soft` with argmax and mean, and 20,000 tokens of `sample` with p by chi-square."""
    p, table = torch.tensor([[0.1, 0.7, 0.2]]), torch.randn(4, 5, generator=rng(0))
    u = torch.rand(1, 20_000, generator=rng(1), dtype=torch.float64)
    assert torch.equal(estimate_z_0(p, table, "hard", u)[0, 0], table[1])
    torch.testing.assert_close(estimate_z_0(p, table, "soft", u)[0, 0], p[0] @ table[:3])
    drawn = estimate_z_0(p.expand(20_000, -1), table, "sample", u)[0]
    counts = [int((drawn == row).all(-1).sum()) for row in table[:3]]
    assert stats.chisquare(counts, [2000, 14000, 4000]).pvalue > ALPHA


@pytest.mark.parametrize("zhat", ZHATS)
@pytest.mark.parametrize("model", ["cadd", "mdlm", "cdm"])
@pytest.mark.parametrize("num_latents", [1, 3])
def test_chain_promises(zhat, model, num_latents):
    """Check that no mask is left, prompts never change, unmasked x and z carry over bitwise, and time runs from 1 to 0.

    The denoiser gives the mask the largest logit: a chain that could draw the mask fails.
    """
    net, mask = nano(model), 11
    prompt = torch.full((2, 12), mask)
    prompt[:, 3:6] = torch.tensor([4, 0, 9])
    steps = []

    def denoise(x, z, t):
        assert x.shape == (2 * num_latents, 12) and (0 < t).all()
        return torch.cat([net(x, z, t), torch.full((*x.shape, 1), 1e4)], -1)

    x = sample(
        denoise, (2, 12), net.table().detach(), net.schedule, mask, steps=6, zhat=zhat, num_latents=num_latents,
        prompt=prompt, generator=rng(0), callback=steps.append,
    )  # fmt: skip
    assert ((0 <= x) & (x < mask)).all() and torch.equal(x[:, 3:6], prompt[:, 3:6])
    assert steps[0].t == 1 and steps[-1].s == 0 and all(a.s == b.t and a.t > a.s for a, b in itertools.pairwise(steps))
    for before, after in itertools.pairwise(steps):
        done = before.x != mask
        assert torch.equal(after.x[done], before.x[done]) and torch.equal(after.z[:, done], before.z[:, done])
        assert torch.equal(after.fresh, ~done & (after.x != mask))
    if model == "cdm":
        assert all((s.x[:, 6:] == mask).all() for s in steps[:-1])  # tokens appear at the end only


def test_seeds_reproduce_and_differ():
    net = nano()
    args = (net, (3, 12), net.table().detach(), net.schedule, 11)
    first, again, another_seed = (sample(*args, steps=5, generator=rng(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, another_seed)


@pytest.mark.parametrize("num_latents", [1, 3])
def test_the_head_at_masked_positions_only_draws_the_same(num_latents):
    """Compare the samples with those of a head at all positions, and check which positions `logits_at` is asked for."""
    net = nano()
    torch.nn.init.normal_(net.head.weight)  # a new head is zero: every row would look alike
    args = ((3, 12), net.table().detach(), net.schedule, 11)
    options = {"steps": 5, "num_latents": num_latents}
    everywhere = sample(lambda x, z, t: net(x, z, t), *args, generator=rng(1), **options)
    calls, logits_at = [], net.logits_at
    net.logits_at = lambda x, z, t, rows: calls.append((rows, x.flatten())) or logits_at(x, z, t, rows)
    assert torch.equal(sample(net, *args, generator=rng(1), **options), everywhere)
    assert all(torch.equal(rows, (x == 11).nonzero()[:, 0]) for rows, x in calls)
    assert len(calls[-1][0]) < len(calls[0][0])


def test_temperature_decay_and_time_grids():
    tau = cosine_temperature(2.5, 0.5)
    assert tau(1.0) == pytest.approx(2.5) and tau(0.0) == pytest.approx(0.5) and tau(0.5) == pytest.approx(1.5)
    for grid in TIME_GRIDS.values():
        times = grid(torch.linspace(1, 0, 9, dtype=torch.float64))
        assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"num_latents": 0}, "num_latents must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": math.nan}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"temperature": math.inf}, "temperature must be 0 or more"),
        ({"zhat": "softer"}, "zhat must be one of hard, soft, sample"),
        ({"time_grid": "log"}, "time grid must be one of uniform, cosine"),
        ({"temperature": lambda t: -1.0}, "temperature must be 0 or more"),
        ({"strength": math.inf}, "strength must be a number"),
        ({"prompt": torch.zeros(2, 3, dtype=torch.int64)}, "prompt must have the shape"),
        ({"prompt": torch.full((2, 12), -1)}, "prompt must hold token ids, or 11 where free"),
        ({"prompt": torch.full((2, 12), 12)}, "prompt must hold token ids"),
    ],
)
def test_bad_arguments_are_named(options, message):
    net = nano()
    if "top_p" in options:
        with pytest.raises(InputError, match=message):
            Sampling(**options)
    with pytest.raises(InputError, match=message):
        chain(net, (2, 12), net.table().detach(), net.schedule, 11, **({"steps": 4} | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by the kernel, if built, and by the reference
def test_nan_logits_are_refused(dtype):
    """Check both implementations: NaN compares false with everything, so that a draw from it would look valid."""
    table = toy().to(dtype)
    for order in ("random", "entropy"):  # an order looks at the logits first; both name the step
        with pytest.raises(InputError, match=r"step 1: .*NaN"):
            broken = lambda x, z, t: torch.full((*x.shape, 3), math.nan)
            chain(broken, (2, 2), table, NoiseSchedule(), MASK, steps=2, order=order)
