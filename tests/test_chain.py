"""The chain is Proposition 2, step by step, and its options are what they say.

A denoiser that knows x_0 makes the estimate z0_hat exact. Each step must then be `q_posterior_sample` with the same
randomness. The correlations of the chain's noise are tested without a word of where the noise comes from.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from cadd_min import ops, posterior
from cadd_min.kernels import philox
from cadd_min.orders import HITTING, ORDERS, TIME_GRIDS
from cadd_min.reverse import ZHATS, nucleus, token_probs
from cadd_min.sampler import Step
from cadd_min.schedule import NoiseSchedule
from tests.toys import ALPHA, MASK, chain, nano, rng, toy

X_0 = torch.tensor([[0, 1, 2, 1, 0, 2, 2], [2, 0, 0, 1, 1, 2, 0]])


def knowing(x_0: torch.Tensor):
    """Make a denoiser that is certain of x_0 (B, L)."""
    sure = 1e4 * torch.nn.functional.one_hot(x_0, MASK).double()
    return lambda x, z, t: sure.repeat(len(x) // len(x_0), 1, 1)


def recorded(denoiser, shape, table, schedule, **settings) -> tuple[torch.Tensor, list[Step], list[torch.Tensor]]:
    """Run the chain. Returns its tokens, its steps, and the latents that the denoiser was shown."""
    steps, shown = [], []
    watch = lambda x, z, t: shown.append(z.clone()) or denoiser(x, z, t)
    settings = {"generator": rng(5), "callback": steps.append} | settings
    return chain(watch, shape, table, schedule, MASK, **settings), steps, shown


@pytest.mark.parametrize("zhat", ZHATS)
@pytest.mark.parametrize("continuous", ["linear", "cosine", "capped", "flow"])
@pytest.mark.parametrize("grid", TIME_GRIDS)
def test_every_step_is_the_posterior_with_the_same_randomness(grid, continuous, zhat, monkeypatch):
    """Compare x and z of each of four steps of three latents with `q_posterior_sample`.

    A prompt gives two tokens. The denoiser is shown half of each latent, and the chain's own latent must not shrink.
    """
    schedule, table, seed = NoiseSchedule("cosine", continuous), toy(), ops.draw_seed(rng(5))
    prompt = torch.full_like(X_0, MASK)
    prompt[:, 2:4] = X_0[:, 2:4]
    x, steps, shown = recorded(
        knowing(X_0), (2, 7), table, schedule, steps=4, zhat=zhat, num_latents=3, time_grid=grid, strength=0.5,
        prompt=prompt,
    )  # fmt: skip
    assert torch.equal(x, X_0)
    position, everywhere = torch.arange(14).view(2, 7), torch.arange(42).view(3, 2, 7)
    given = prompt != MASK
    z = torch.where(given[..., None], table[X_0], philox.normals(seed, everywhere, 4).double())
    x, times = prompt, TIME_GRIDS[grid](torch.linspace(1, 0, 5, dtype=torch.float64))
    for n, step in enumerate(steps):
        torch.testing.assert_close(shown[n].view_as(z), 0.5 * z)
        now = torch.stack([seed[0], torch.tensor(n + 1)])
        u, eps = philox.choices(now, position)[0], philox.normals(now, everywhere, 4).double()
        x_s, z_s = [], []
        for z_k, eps_k in zip(z, eps):
            fixed = SimpleNamespace(rand=lambda *_, u=u, **__: u, randn=lambda *_, eps=eps_k, **__: eps)
            with monkeypatch.context() as patch:
                patch.setattr(posterior, "torch", SimpleNamespace(**(vars(torch) | vars(fixed))))
                t, s = times[n].expand(2), times[n + 1].expand(2)
                some = posterior.q_posterior_sample(x, z_k, X_0, table[X_0], s, t, schedule, MASK)
            x_s.append(some[0]), z_s.append(some[1])
        x, z = x_s[0], torch.stack(z_s)
        assert torch.equal(step.x, x) and (step.t, step.s) == pytest.approx((float(times[n]), float(times[n + 1])))
        torch.testing.assert_close(step.z, z, rtol=1e-5, atol=1e-5)


PLANS = [{}, {"remask": 0.4}, {"block": 3}, {"block": 3, "remask": 0.4}, {"time_grid": HITTING}]
PLANS += [{"order": order, "remask": remask} for order in ORDERS[1:] for remask in (0.0, 0.4)]


@pytest.mark.parametrize("continuous", ["capped", "flow"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_latents_follow_their_tokens_under_every_plan(plan, continuous):
    """Write out the latent of each position after each step: given what its token did, and the step's normals.

    A position that is unmasked takes w[x_0]. One that stays masked moves by Prop. 2, at the times of its sequence. One
    that is masked again is drawn from q(z_s | x_0). All others carry over.
    """
    schedule, table, seed = NoiseSchedule("linear", continuous), toy(), ops.draw_seed(rng(5))
    seen, everywhere = [], torch.arange(28).view(2, 2, 7)
    watch = lambda x, z, t: seen.append((x[:2].clone(), t[:2].double())) or knowing(X_0)(x, z, t)
    prompt = torch.full_like(X_0, MASK)
    prompt[0, 2:4] = X_0[0, 2:4]
    _, steps, shown = recorded(
        watch, (2, 7), table, schedule, steps=5, num_latents=2, zhat="soft", prompt=prompt, **plan
    )  # fmt: skip
    z, happened = shown[0].view(2, 2, 7, 4), set()
    times = [t for _, t in seen]
    for n, step in enumerate(steps):
        s = times[n + 1] if plan.get("time_grid") == HITTING and n + 1 < len(times) else torch.full((2,), step.s)
        eps = philox.normals(torch.stack([seed[0], torch.tensor(n + 1)]), everywhere, 4).double()
        for b, i in itertools.product(range(2), range(7)):
            was, now, w = int(seen[n][0][b, i]) == MASK, int(step.x[b, i]) == MASK, table[X_0[b, i]]
            mean, variance = posterior.q_posterior_z(
                z[:, b, i], w.expand(2, 4), s[b].expand(2), times[n][b].expand(2), schedule
            )
            kinds = {
                (True, False): w.expand(2, 4),
                (True, True): mean + variance.sqrt() * eps[:, b, i],
                (False, True): schedule.signal(s[b]) * w + schedule.noise(s[b]) * eps[:, b, i],
                (False, False): z[:, b, i],
            }
            happened.add((was, now))
            if plan.get("time_grid") != HITTING or step.fresh[b].any():  # else the sequence is done
                torch.testing.assert_close(step.z[:, b, i], kinds[was, now], rtol=1e-4, atol=1e-4)
        z = step.z
    assert ((False, True) in happened) == (plan.get("remask", 0) > 0) and len(happened) >= 3


@pytest.mark.parametrize("remask", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", [{"block": 4}, {"order": "entropy"}, {"order": "margin", "block": 5}], ids=str)
def test_an_order_leaves_the_schedules_number_of_masks(options, remask):
    """Count the masks of each sequence after each step: round(free (1 - alpha_s)), of 12 or 9 free positions.

    Where more tokens than that are masked again, nothing else stays masked.
    """
    schedule, net = NoiseSchedule("cosine"), nano("mdlm")
    torch.nn.init.normal_(net.head.weight, std=0.3, generator=rng(0))
    prompt = torch.full((2, 12), 11)
    prompt[1, 3:6] = 4
    steps = []
    chain(net, (2, 12), net.table(), schedule, 11, steps=5, remask=remask, prompt=prompt, generator=rng(1),
          callback=steps.append, **options)  # fmt: skip
    before, again = prompt, 0
    for step in steps:
        left = 1 - schedule.alpha(torch.tensor(step.s, dtype=torch.float64))
        remasked = ((before != 11) & (step.x == 11)).sum(1).tolist()
        expected = [max(round(free * float(left)), count) for free, count in zip((12, 9), remasked)]
        assert (step.x == 11).sum(1).tolist() == expected
        before, again = step.x, again + sum(remasked)
    assert (again > 0) == (remask > 0)


@pytest.mark.parametrize("zhat", ZHATS)
def test_the_belief_is_the_token_nearest_to_z0_hat(zhat):
    """Write out the belief of each masked position at the step's temperature and top-p, for the first latent."""
    schedule, table, seed, tau = NoiseSchedule(), toy(), ops.draw_seed(rng(5)), lambda t: 0.3 + t
    given, calls = torch.randn(3, 6, 3, generator=rng(0), dtype=torch.float64), []
    fixed = lambda x, z, t: calls.append(x.clone()) or given.repeat(len(x) // 3, 1, 1)
    options = {"steps": 4, "zhat": zhat, "num_latents": 2, "temperature": tau, "top_p": 0.8}
    _, steps, _ = recorded(fixed, (3, 6), table, schedule, **options)
    for n, step in enumerate(steps):
        p = nucleus((given / tau(step.t)).softmax(-1).flatten(0, 1), 0.8)
        u = philox.hat_choice(torch.stack([seed[0], torch.tensor(n + 1)]), torch.arange(18))
        drawn = (p.cumsum(-1) <= u[:, None]).sum(-1)
        z_hat = {"hard": table[p.argmax(-1)], "soft": p @ table[:3], "sample": table[drawn]}[zhat]
        nearest = torch.cdist(z_hat, table[:3]).argmin(-1).view(3, 6)
        assert torch.equal(step.belief(), torch.where(calls[n][:3] == MASK, nearest, step.x))


# ------------------------------------------------------------------------------------------------ independence


def independent(variables: torch.Tensor, lags: tuple[int, ...] = (0, 1, 2, 7)) -> float:
    """Return the p-value of independence: of V variables (V, P) at P positions, and of positions `lag` apart.

    Correlations of independent variables are near normal with variance 1 / P. So P times their squares sum to a
    chi-square.
    """
    x = (variables - variables.mean(1, keepdim=True)) / variables.std(1, keepdim=True)
    total, count = 0.0, 0
    for lag in lags:
        there = x[:, : x.shape[1] - lag] @ x[:, lag:].T / (x.shape[1] - lag) ** 0.5
        pairs = there[torch.triu(torch.ones_like(there), diagonal=1) > 0] if lag == 0 else there.flatten()
        total, count = total + float(pairs.square().sum()), count + len(pairs)
    return float(stats.chi2.sf(total, count))


def noise() -> torch.Tensor:
    """Recover the normals of z_1 and of three steps, for two latents of dimension 4, (4, 2, 2000, 4).

    "all-at-once" keeps every position masked until the last step.
    """
    schedule, table, x_0 = NoiseSchedule("all-at-once", "linear"), toy(), torch.zeros(2, 1000, dtype=torch.int64)
    _, steps, shown = recorded(knowing(x_0), (2, 1000), table, schedule, steps=4, num_latents=2)
    z = [shown[0].view(2, 2, 1000, 4), *(step.z for step in steps[:-1])]
    eps = [z[0]]
    for before, after, step in zip(z, z[1:], steps):
        s, t = (torch.tensor([time], dtype=torch.float64) for time in (step.s, step.t))
        mean, variance = posterior.q_posterior_z(before.flatten(0, 1), table[0], s.expand(4), t.expand(4), schedule)
        eps.append(((after.flatten(0, 1) - mean) / variance.sqrt()).view_as(after))
    return torch.stack(eps).flatten(2, 3)


def test_noise_is_normal_and_independent_between_steps_latents_positions_and_dimensions():
    eps = noise()
    assert stats.kstest(eps.flatten().numpy(), "norm").pvalue > ALPHA
    assert independent(eps.permute(0, 1, 3, 2).flatten(0, 2)) > ALPHA


def test_one_noise_for_all_steps_is_caught(monkeypatch):
    """Power: catch a chain that makes the noise of every step from the words of z_1."""
    same = lambda seed, count: torch.stack([seed[0].expand(count), torch.zeros(count, dtype=torch.int64)], 1)
    monkeypatch.setattr(philox, "step_seeds", same)
    assert independent(noise().permute(0, 1, 3, 2).flatten(0, 2)) < 1e-9


def test_the_tokens_of_z0_hat_are_independent_between_steps_and_latents():
    """Recover the token v of each z0_hat = w[v], v ~ p, three latents and steps: the flow latent has no other noise."""
    schedule, table = NoiseSchedule("all-at-once", "flow"), toy()
    fair = lambda x, z, t: torch.zeros(*x.shape, 2, dtype=torch.float64)
    _, steps, shown = recorded(fair, (2, 1000), table, schedule, steps=4, num_latents=3, zhat="sample")
    z = [shown[0].view(3, 2, 1000, 4), *(step.z for step in steps[:-1])]
    hats = []
    for before, after, step in zip(z, z[1:], steps):
        hat = (after - step.s / step.t * before) / (1 - step.s / step.t)
        hats.append(torch.cdist(hat.view(-1, 4), table[:2]).argmin(-1).view(3, 2000).double())
    v = torch.cat(hats)
    assert stats.binomtest(int(v.sum()), v.numel()).pvalue > ALPHA and independent(v) > ALPHA


@pytest.mark.parametrize("plan", [{}, {"block": 1000}], ids=str)
def test_when_a_token_comes_tells_nothing_of_the_token_nor_of_others(plan):
    """Check the step at which a position flips, and its token, at 3,000 positions of a masked model.

    Also where the chain chooses the positions in random order.
    """
    fair = lambda x, z, t: torch.zeros(*x.shape, 3, dtype=torch.float64)
    x, steps, _ = recorded(fair, (3, 1000), toy(dim=0), NoiseSchedule(), steps=4, **plan)
    when = sum(step.number * step.fresh.double() for step in steps)
    assert stats.chisquare(torch.bincount(when.long().flatten(), minlength=4).numpy()).pvalue > ALPHA
    assert stats.chisquare(torch.bincount(x.flatten(), minlength=3).numpy()).pvalue > ALPHA
    assert independent(torch.stack([when.flatten(), *(x.flatten() == v for v in (0, 1))]).double(), (1, 2, 7)) > ALPHA
    assert independent(torch.stack([when.flatten(), x.flatten().double()])) > ALPHA


# ------------------------------------------------------------------------------------------------ options


LOGITS = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_temperature_of_a_step_is_that_of_its_time(steps):
    """Compare the tokens that come in each step with softmax(logits / tau(t)), t the time before the step.

    tau is 1/2 at t = 1 and 4 at t = 1/2: the tokens of the wrong time are far off.
    """
    flat = lambda x, z, t: LOGITS.expand(*x.shape, 3)
    asked = []
    tau = lambda t: asked.append(t) or (0.5 if t == 1 else 4.0)
    x, trace, _ = recorded(flat, (2, 5000), toy(dim=0), NoiseSchedule(), steps=steps, temperature=tau)
    assert asked == [1.0, 0.5][:steps]
    for step in trace:
        counts = torch.bincount(x[step.fresh], minlength=3)
        law = (LOGITS / (0.5 if step.t == 1 else 4.0)).softmax(-1) * counts.sum()
        assert stats.chisquare(counts.numpy(), law.numpy()).pvalue > ALPHA


@pytest.mark.parametrize(
    "top_p, kept",
    [(0.4, [0]), (0.5, [0]), (0.51, [0, 1]), (0.75, [0, 1]), (0.76, [0, 1, 2, 3]), (1 - 1e-9, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it_with_ties(top_p, kept):
    """Compare with sets made by hand. The probabilities are powers of 1/2, so that their sums are exact."""
    p = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8], [1 / 8, 1 / 4, 1 / 8, 1 / 2]], dtype=torch.float64)
    expected = torch.zeros(4, dtype=torch.float64)
    expected[kept] = p[0, kept] / p[0, kept].sum()
    assert torch.equal(nucleus(p, top_p), torch.stack([expected, expected[[2, 1, 3, 0]]]))
    for dtype in (torch.float32, torch.float64):  # by the kernel, if built, and by the reference
        logits = p[0].log().to(dtype)
        flat = lambda x, z, t, logits=logits: logits.expand(*x.shape, 4)
        table = torch.zeros(5, 0, dtype=dtype)
        x = chain(flat, (2, 2000), table, NoiseSchedule(), 4, steps=1, top_p=top_p, generator=rng(5))
        assert sorted(x.unique().tolist()) == kept


@pytest.mark.parametrize("discrete", ["linear", "power4", "cosine"])
@pytest.mark.parametrize("remask", [0.0, 0.3, 1.0])
def test_the_share_of_masks_is_that_of_the_schedule_at_every_time(remask, discrete):
    """Check after each step that a share 1 - alpha_s of 20,000 tokens is masked, to a binomial test."""
    schedule = NoiseSchedule(discrete)
    fair = lambda x, z, t: torch.zeros(*x.shape, 3, dtype=torch.float64)
    _, steps, _ = recorded(fair, (2, 10_000), toy(dim=0), schedule, steps=5, remask=remask)
    for step in steps:
        masked, share = int((step.x == MASK).sum()), 1 - float(schedule.alpha(torch.tensor(step.s)))
        assert stats.binomtest(masked, 20_000, min(1.0, max(0.0, share))).pvalue > ALPHA
    again = [bool(((a.x != MASK) & (b.x == MASK)).any()) for a, b in itertools.pairwise(steps)]
    assert any(again) == (remask > 0)


def test_first_hitting_unmasks_at_its_own_times():
    """Check that each position comes at the step of its hitting time, the last time first, in every sequence."""
    fair = lambda x, z, t: torch.zeros(*x.shape, 3, dtype=torch.float64)
    times = []
    watch = lambda x, z, t: times.append(t.clone()) or fair(x, z, t)
    _, steps, _ = recorded(watch, (500, 6), toy(dim=0), NoiseSchedule("cosine"), steps=99, time_grid=HITTING)
    times = torch.stack(times)  # (6, 500): the time before each step, 1 at first
    assert (times[0] == 1).all() and (times.diff(dim=0) < 0).all() and all((s.fresh.sum(1) == 1).all() for s in steps)
    # the n-th largest of six uniforms 1 - alpha_t has the law Beta(7 - n, n)
    for n in range(1, 6):
        u = 1 - NoiseSchedule("cosine").alpha(times[n].double())
        assert stats.kstest(u.numpy(), stats.beta(7 - n, n).cdf).pvalue > ALPHA
    where = torch.stack([step.fresh.double().argmax(1) for step in steps[:-1]])  # (5, 500)
    for row in where:
        assert stats.chisquare(torch.bincount(row, minlength=6).numpy()).pvalue > ALPHA


def test_probabilities_are_averaged_over_the_latents():
    """Check with two latents that the chain draws from the mean of their laws, here a fair coin, in both backends."""
    for dtype in (torch.float32, torch.float64):
        sure = 1e4 * torch.eye(2, dtype=dtype)
        each = lambda x, z, t, sure=sure: sure.repeat_interleave(len(x) // 2, 0)[:, None].expand(*x.shape, 2)
        x, _, _ = recorded(each, (2, 2000), toy().to(dtype), NoiseSchedule(), steps=1, num_latents=2)
        assert stats.binomtest(int(x.sum()), x.numel()).pvalue > ALPHA
    assert torch.equal(token_probs(1e4 * torch.eye(2)[:, None], MASK), torch.tensor([[0.5, 0.5]]))
