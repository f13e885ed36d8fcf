"""Other orders of unmasking: each keeps its order, its number of tokens a step, its marginals and the given tokens.

Remasking and first hitting are exact: chi-square and Kolmogorov-Smirnov compare their tokens and times with the law. A
chain that leaves stale latents, and times of another schedule, must fail.
"""

import itertools
import math

import pytest
import torch
from scipy import stats

from cadd_min.baselines.dispatch import draw
from cadd_min.orders import HITTING, ORDERS, SCORES, Sampling, first_in_order, hitting_times, remask_flip, remask_rate
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.errors import InputError
from tests.toys import ALPHA, LAW, MASK, chain, nano, oracle, randomized, rng, toy

MODES = [{"order": order} for order in ORDERS[1:]]
MODES += [{"block": 4}, {"block": 5, "order": "entropy"}, {"remask": 0.3}, {"remask": 0.2, "order": "confidence"}]
MODES += [{"time_grid": HITTING}]


def run_chain(options, model="cadd", **settings):
    """Run the chain of an untrained network from a prompt. Returns the samples, all steps, the prompt and the network.

    Rows 0 and 2 of the prompt have nine free positions, row 1 has none.
    """
    net, mask = nano(model), 11
    torch.nn.init.normal_(net.head.weight, std=0.3, generator=rng(0))
    prompt = torch.full((3, 12), mask)
    prompt[:, 3:6] = torch.tensor([4, 0, 9])
    prompt[1] = torch.arange(12) % 11
    steps, settings = [], {"steps": 6, "generator": rng(0), "prompt": prompt} | options | settings
    x = chain(net, (3, 12), net.table().detach(), net.schedule, mask, callback=steps.append, **settings)
    return x, steps, prompt, net


@pytest.mark.parametrize("model", ["cadd", "mdlm"])
@pytest.mark.parametrize("num_latents", [1, 2])
@pytest.mark.parametrize("options", MODES, ids=str)
def test_every_order_keeps_the_promises(options, model, num_latents):
    """Check that no mask is left, given tokens never change, time falls, and one seed draws one sample."""
    x, steps, prompt, _ = run_chain(options, model, num_latents=num_latents)
    assert ((0 <= x) & (x < 11)).all() and torch.equal(x[prompt != 11], prompt[prompt != 11])
    assert steps[0].t == 1 and all(a.s == b.t and a.t > a.s for a, b in itertools.pairwise(steps))
    for step in steps:
        assert torch.equal(step.x[prompt != 11], prompt[prompt != 11])
    assert torch.equal(x, run_chain(options, model, num_latents=num_latents)[0])


@pytest.mark.parametrize("decoding", [{}, {"temperature": 0.0}, {"temperature": 0.1}, {"top_p": 0.1}], ids=str)
@pytest.mark.parametrize("order", SCORES)
def test_the_surest_come_first(order, decoding):
    """Check that unmasked positions score at least as high as those that stay masked, a share 1 - alpha_s of all.

    Temperature and top-p must not count. Ranked by the probabilities after them, all positions would tie, and the order
    would be from left to right.
    """
    calls = []
    net = randomized(nano("mdlm"), 0.15)  # an untrained network is equally sure of all positions

    def denoise(x, z, t):
        calls.append((x.clone(), net(x, z, t)))
        return calls[-1][1]

    steps = []
    chain(denoise, (4, 12), net.table().detach(), net.schedule, 11, steps=5, order=order, generator=rng(0),
           callback=steps.append, **decoding)  # fmt: skip
    for (before, logits), step in zip(calls, steps):
        score = SCORES[order](logits.softmax(-1).flatten(0, 1)).view(4, 12)
        for row in range(4):
            stays, fresh = step.x[row] == 11, step.fresh[row]
            assert int(stays.sum()) == round(12 * step.s) and torch.equal(stays | fresh, before[row] == 11)
            if stays.any() and fresh.any():
                assert score[row][fresh].min() >= score[row][stays].max() - 1e-6
    assert not steps[0].fresh[:, :2].all()  # not from left to right


def test_scores_by_hand():
    """Compare the ranks of three distributions by confidence and by entropy, and their margins, with hand-made ones."""
    p = torch.tensor([[0.5, 0.5, 0.0], [0.6, 0.2, 0.2], [0.55, 0.45, 0.0]])
    assert SCORES["confidence"](p).argsort(descending=True).tolist() == [1, 2, 0]
    assert SCORES["entropy"](p).argsort(descending=True).tolist() == [
        2,
        0,
        1,
    ]  # three tokens: most entropy
    torch.testing.assert_close(SCORES["margin"](p), torch.tensor([0.0, 0.4, 0.1]))


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_blocks_go_from_left_to_right(order):
    """Check after every step that a block has begun only if the block to its left is done."""
    _, steps, prompt, _ = run_chain({"order": order, "block": 4}, steps=12)
    free = prompt[0] == 11
    for step in steps:
        done = [bool((step.x[0, b : b + 4] != 11).all()) for b in (0, 4, 8)]
        begun = [bool((step.x[0, b : b + 4] != 11)[free[b : b + 4]].any()) for b in (0, 4, 8)]
        assert all(done[i] for i in range(2) if begun[i + 1])


def test_first_in_order_against_sorting():
    """Compare with Python's sort by block, then by falling score, in four rows of ten that ask for 0 to 25."""
    gen = rng(0)
    score, block = torch.rand(40, generator=gen), torch.randint(3, (40,), generator=gen)
    sequence, count = torch.arange(40) // 10, torch.tensor([0, 3, 10, 25])
    for row in range(4):
        in_row = [i for i in range(40) if sequence[i] == row]
        expected = sorted(in_row, key=lambda i: (int(block[i]), -float(score[i])))[: int(count[row])]
        chosen = first_in_order(score, sequence, block, count).nonzero()[:, 0].tolist()
        assert sorted(expected) == [i for i in chosen if i in in_row]


@pytest.mark.parametrize("discrete", ["linear", "power4", "cosine"])
def test_remasking_keeps_the_masked_share(discrete):
    """Check alpha_s = alpha_t (1 - sigma) + (1 - alpha_t) flip: what is masked again must be made up for by more flips.

    sigma must stay within its cap and be 0 at the end, the flip probability at most 1.
    """
    schedule = NoiseSchedule(discrete, "linear")
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    s = t - 0.05
    s[0] = 0
    for most in (0.0, 0.1, 1.0):
        sigma = remask_rate(most, s, t, schedule)
        torch.testing.assert_close(sigma[:-1], ((1 - schedule.alpha(s)) / schedule.alpha(t))[:-1].clamp(max=most))
        flip = remask_flip(sigma, s, t, schedule)
        torch.testing.assert_close(
            schedule.alpha(t) * (1 - sigma) + (1 - schedule.alpha(t)) * flip, schedule.alpha(s), atol=1e-12, rtol=0
        )
        assert ((0 <= sigma) & (sigma <= most) & (flip <= 1 + 1e-12)).all() and sigma[0] == 0


def law_of(**options):
    """Count the tokens (3,) that the chain of the exact denoiser draws in 20,000 sequences of L = 1, in float64."""
    table, schedule = toy(), NoiseSchedule()
    x = chain(oracle(table, schedule), (20_000, 1), table, schedule, MASK, zhat="sample", generator=rng(2), **options)
    return torch.bincount(x.flatten(), minlength=3).numpy()


@pytest.mark.parametrize("options", [{"remask": 0.3, "steps": 8}, {"time_grid": HITTING}], ids=str)
def test_remasking_and_first_hitting_are_exact(options):
    """Compare the tokens with LAW by chi-square, for the exact denoiser and z0_hat = w[v] with v ~ p."""
    assert stats.chisquare(law_of(**options), LAW.numpy() * 20_000).pvalue > ALPHA


def test_stale_latents_after_remasking_are_caught(monkeypatch):
    """Power: catch a chain that masks a token again and leaves its latent w[x] without noise, by chi-square."""
    import cadd_min.sampler as module

    def stale(x, z, rows, table, schedule, s, mask_id, seed):
        x.view(-1)[rows] = mask_id

    monkeypatch.setattr(module, "mask_again", stale)
    assert stats.chisquare(law_of(remask=0.3, steps=8), LAW.numpy() * 20_000).pvalue < 1e-6


@pytest.mark.parametrize("discrete", ["linear", "power4", "cosine"])
def test_hitting_times_have_their_law(discrete):
    """Compare the times with P(masked at t) = 1 - alpha_t by Kolmogorov-Smirnov. Power: catch the other schedule's."""
    schedule, wrong = (NoiseSchedule(d, "linear") for d in (discrete, {"linear": "cosine"}.get(discrete, "linear")))
    u = torch.rand(20_000, generator=rng(0), dtype=torch.float64)
    cdf = lambda t: 1 - schedule.alpha(torch.as_tensor(t)).numpy()
    assert stats.kstest(hitting_times(u, schedule).numpy(), cdf).pvalue > ALPHA
    assert stats.kstest(hitting_times(u, wrong).numpy(), cdf).pvalue < 1e-6


def test_first_hitting_unmasks_one_token_a_step():
    """Check that nine free positions take nine steps, and that a row without free positions takes part in none."""
    _, steps, prompt, _ = run_chain({"time_grid": HITTING})
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
        run_chain(options)


def test_first_hitting_needs_a_model_that_unmasks_one_by_one():
    with pytest.raises(InputError, match="all at once"):
        run_chain({"time_grid": HITTING}, "cdm")


@pytest.mark.parametrize("model", ["ar", "udm", "sedd"])
def test_baselines_in_steps_have_the_cosine_grid_and_nothing_else_of_these(model):
    """Check that udm and sedd draw on the cosine grid, and that baselines refuse first hitting and other orders."""
    net, steps = nano(model), []
    settings, options = Sampling(steps=3, time_grid="cosine"), {"generator": rng(0), "callback": steps.append}
    if model == "ar":
        with pytest.raises(InputError, match="the time grid cosine is not for ar"):
            draw(net, 2, settings, **options)
    else:
        draw(net, 4, settings, **options)
        assert [step.t for step in steps] == pytest.approx([1, math.sin(math.pi / 3), 0.5])
    if model != "sedd":  # whose plans are the core's
        with pytest.raises(InputError, match=f"the time grid first-hitting is not for {model}"):
            draw(net, 2, Sampling(time_grid=HITTING))
        with pytest.raises(InputError, match=f"order is for cadd, mdlm, cdm and sedd, and this is {model}"):
            draw(net, 2, Sampling(order="entropy"))
