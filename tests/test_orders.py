"""The field's samplers: each keeps its order, its number of tokens a step, its marginals and its promises."""

import itertools
import math

import pytest
import torch
from scipy import stats

from cadd_min.baselines.dispatch import draw
from cadd_min.orders import HITTING, ORDERS, SCORES, Sampling, first_in_order, hitting_times, remask_flip, remask_rate
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.errors import InputError
from tests.toys import ALPHA, LAW, MASK, chain, nano, oracle, rng, toy

MODES = [{"order": order} for order in ORDERS[1:]]
MODES += [{"block": 4}, {"block": 5, "order": "entropy"}, {"remask": 0.3}, {"remask": 0.2, "order": "confidence"}]
MODES += [{"time_grid": HITTING}]


def steps_of(options, model="cadd", **more):
    """The callback's steps, and the samples, of an untrained network with a prompt in it."""
    net, mask = nano(model), 11
    torch.nn.init.normal_(net.head.weight, std=0.3, generator=rng(0))
    prompt = torch.full((3, 12), mask)
    prompt[:, 3:6] = torch.tensor([4, 0, 9])
    prompt[1] = torch.arange(12) % 11  # nothing to draw
    steps, how = [], {"steps": 6, "generator": rng(0), "prompt": prompt} | options | more
    x = chain(net, (3, 12), net.table().detach(), net.schedule, mask, callback=steps.append, **how)
    return x, steps, prompt, net


@pytest.mark.parametrize("model", ["cadd", "mdlm"])
@pytest.mark.parametrize("num_latents", [1, 2])
@pytest.mark.parametrize("options", MODES, ids=str)
def test_every_order_keeps_the_promises(options, model, num_latents):
    """No mask is left, what was given never changes, time falls, and the same seed draws the same."""
    x, steps, prompt, _ = steps_of(options, model, num_latents=num_latents)
    assert ((0 <= x) & (x < 11)).all() and torch.equal(x[prompt != 11], prompt[prompt != 11])
    assert steps[0].t == 1 and all(a.s == b.t and a.t > a.s for a, b in itertools.pairwise(steps))
    for step in steps:
        assert torch.equal(step.x[prompt != 11], prompt[prompt != 11])
    assert torch.equal(x, steps_of(options, model, num_latents=num_latents)[0])


@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"temperature": 0.1}, {"top_p": 0.1}], ids=str)
@pytest.mark.parametrize("order", SCORES)
def test_the_surest_come_first(order, how):
    """Every token of a step was surer than all that stayed masked, and their number follows 1 - alpha.

    However cold tokens are drawn: ranked by the drawn probabilities, all would tie and go from left to right.
    """
    seen = []
    net = nano("mdlm")
    for i, weight in enumerate(net.parameters()):  # an untrained network is equally sure of all positions
        torch.nn.init.normal_(weight, std=0.15, generator=rng(i))

    def denoise(x, z, t):
        seen.append((x.clone(), net(x, z, t)))
        return seen[-1][1]

    steps = []
    chain(denoise, (4, 12), net.table().detach(), net.schedule, 11, steps=5, order=order, generator=rng(0),
           callback=steps.append, **how)  # fmt: skip
    for (before, logits), step in zip(seen, steps):
        score = SCORES[order](logits.softmax(-1).flatten(0, 1)).view(4, 12)
        for row in range(4):
            stays, fresh = step.x[row] == 11, step.fresh[row]
            assert int(stays.sum()) == round(12 * step.s) and torch.equal(stays | fresh, before[row] == 11)
            if stays.any() and fresh.any():
                assert score[row][fresh].min() >= score[row][stays].max() - 1e-6
    assert not steps[0].fresh[:, :2].all()  # which is not from left to right


def test_scores_by_hand():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.6, 0.2, 0.2], [0.55, 0.45, 0.0]])
    assert SCORES["confidence"](p).argsort(descending=True).tolist() == [1, 2, 0]
    assert SCORES["entropy"](p).argsort(descending=True).tolist() == [2, 0, 1]  # of two tokens only
    torch.testing.assert_close(SCORES["margin"](p), torch.tensor([0.0, 0.4, 0.1]))


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_blocks_go_from_left_to_right(order):
    _, steps, prompt, _ = steps_of({"order": order, "block": 4}, steps=12)
    free = prompt[0] == 11
    for step in steps:
        done = [bool((step.x[0, b : b + 4] != 11).all()) for b in (0, 4, 8)]
        begun = [bool((step.x[0, b : b + 4] != 11)[free[b : b + 4]].any()) for b in (0, 4, 8)]
        assert all(done[i] for i in range(2) if begun[i + 1])


def test_first_in_order_against_sorting():
    gen = rng(0)
    score, block = torch.rand(40, generator=gen), torch.randint(3, (40,), generator=gen)
    sequence, count = torch.arange(40) // 10, torch.tensor([0, 3, 10, 25])
    for row in range(4):
        mine = [i for i in range(40) if sequence[i] == row]
        best = sorted(mine, key=lambda i: (int(block[i]), -float(score[i])))[: int(count[row])]
        found = first_in_order(score, sequence, block, count).nonzero()[:, 0].tolist()
        assert sorted(best) == [i for i in found if i in mine]


@pytest.mark.parametrize("discrete", ["linear", "cosine"])
def test_remasking_keeps_the_masked_share(discrete):
    """alpha_s = alpha_t (1 - sigma) + (1 - alpha_t) flip, sigma within bounds, and nothing is masked at the end."""
    schedule = NoiseSchedule(discrete, "linear")
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    s = t - 0.05
    s[0] = 0
    for most in (0.0, 0.1, 1.0):
        sigma = remask_rate(most, s, t, schedule)
        flip = remask_flip(sigma, s, t, schedule)
        torch.testing.assert_close(
            schedule.alpha(t) * (1 - sigma) + (1 - schedule.alpha(t)) * flip, schedule.alpha(s), atol=1e-12, rtol=0
        )
        assert ((0 <= sigma) & (sigma <= most) & (flip <= 1 + 1e-12)).all() and sigma[0] == 0


def law_of(**options):
    """Tokens that an oracle's chain draws with L = 1, in float64."""
    table, schedule = toy(), NoiseSchedule()
    x = chain(oracle(table, schedule), (20_000, 1), table, schedule, MASK, zhat="sample", generator=rng(2), **options)
    return torch.bincount(x.flatten(), minlength=3).numpy()


@pytest.mark.parametrize("options", [{"remask": 0.3, "steps": 8}, {"time_grid": HITTING}], ids=str)
def test_remasking_and_first_hitting_are_exact(options):
    """With an exact denoiser and z0_hat = w[v], v ~ p the law is the target's: chi-square at ALPHA."""
    assert stats.chisquare(law_of(**options), LAW.numpy() * 20_000).pvalue > ALPHA


def test_stale_latents_after_remasking_are_caught(monkeypatch):
    """Power: a token masked again whose latent stays w[x], without noise, changes the law."""
    import cadd_min.sampler as module

    def stale(x, z, rows, table, schedule, s, mask_id, seed):
        x.view(-1)[rows] = mask_id

    monkeypatch.setattr(module, "mask_again", stale)
    assert stats.chisquare(law_of(remask=0.3, steps=8), LAW.numpy() * 20_000).pvalue < 1e-6


@pytest.mark.parametrize("discrete", ["linear", "cosine"])
def test_hitting_times_have_their_law(discrete):
    """P(masked at t) = 1 - alpha_t: Kolmogorov-Smirnov at ALPHA; times drawn for the other schedule are caught."""
    schedule, other = (NoiseSchedule(d, "linear") for d in (discrete, {"linear": "cosine"}.get(discrete, "linear")))
    u = torch.rand(20_000, generator=rng(0), dtype=torch.float64)
    cdf = lambda t: 1 - schedule.alpha(torch.as_tensor(t)).numpy()
    assert stats.kstest(hitting_times(u, schedule).numpy(), cdf).pvalue > ALPHA
    assert stats.kstest(hitting_times(u, other).numpy(), cdf).pvalue < 1e-6


def test_first_hitting_unmasks_one_token_a_step():
    _, steps, prompt, _ = steps_of({"time_grid": HITTING})
    assert len(steps) == 9 and all((step.fresh.sum(1) == torch.tensor([1, 0, 1])).all() for step in steps)
    assert (prompt[0] == 11).sum() == 9


@pytest.mark.parametrize(
    "options, message",
    [
        ({"order": "sorted"}, "order must be one of random, confidence, entropy, margin"),
        ({"remask": 1.5}, r"remask must be in \[0, 1\]"),
        ({"block": -1}, "block must be 0 or more"),
        ({"time_grid": HITTING, "order": "margin"}, "leaves no choice"),
        ({"time_grid": HITTING, "remask": 0.1}, "leaves no choice"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        steps_of(options)


def test_first_hitting_needs_a_model_that_unmasks_one_by_one():
    with pytest.raises(InputError, match="all at once"):
        steps_of({"time_grid": HITTING}, "cdm")


@pytest.mark.parametrize("model", ["ar", "udm", "sedd"])
def test_baselines_in_steps_have_the_cosine_grid_and_nothing_else_of_these(model):
    net, steps = nano(model), []
    settings, how = Sampling(steps=3, time_grid="cosine"), {"generator": rng(0), "callback": steps.append}
    if model == "ar":
        with pytest.raises(InputError, match="the time grid cosine is not for ar"):
            draw(net, 2, settings, **how)
    else:
        draw(net, 4, settings, **how)
        assert [step.t for step in steps] == pytest.approx([1, math.sin(math.pi / 3), 0.5])
    with pytest.raises(InputError, match=f"the time grid first-hitting is not for {model}"):
        draw(net, 2, Sampling(time_grid=HITTING))
    with pytest.raises(InputError, match=f"order is for cadd, mdlm and cdm, and this is {model}"):
        draw(net, 2, Sampling(order="entropy"))
