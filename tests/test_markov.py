"""The whole sampler with the exact denoiser of a source whose law is known; and the benchmark, markov.py.

No network is trained, so an error is the sampler's. Samples are judged by their share of impossible transitions and by
their total variation from the law. A sampler that forgets its latents must fail.
"""

import itertools

import pytest
import torch

from benchmarks.markov import build, ce_gap, of_sampling, parse, spread, tables
from benchmarks.sources import ExactDenoiser, Source, random_table, softened
from cadd_min.forward import q_sample
from cadd_min.sampler import sample
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.errors import InputError
from tests.toys import rng


@pytest.mark.parametrize("topics, wrong", [(1, 0.0), (3, 0.0), (1, 0.3)])
def test_exact_denoiser_is_exact(topics, wrong):
    """Compare forward-backward with Bayes' rule summed over all topics and all sequences of length 4.

    wrong: the share of the latents that are around a random state.
    """
    source = Source(states=3, successors=2, topics=topics, length=4)
    schedule, table = NoiseSchedule(), random_table(3, 2, 1.0, rng(0))
    x_0 = source.draw(50, rng(1))
    t = torch.full((50,), 0.5)
    x_t, z_t = q_sample(x_0, table[x_0], t, schedule, source.mask_id, generator=rng(2))
    law, start = softened(source.law), softened(source.start)
    joint = torch.zeros(50, 4, 3, dtype=torch.float64)
    around = lambda rows: torch.distributions.Normal(0.5**0.5 * rows, 0.5**0.5).log_prob(z_t).sum(-1)
    for topic in range(topics):
        for word in itertools.product(range(3), repeat=4):
            p = start[topic, word[0]]
            for a, b in itertools.pairwise(word):
                p = p * law[topic, a, b]
            w = torch.tensor(word)
            density = around(table[w])
            if wrong:
                anywhere = torch.stack([around(row) for row in table[:3]]).exp().mean(0)
                density = ((1 - wrong) * density.exp() + wrong * anywhere).log()
            likelihood = torch.where(x_t == 3, density.double(), torch.where(x_t == w, 0.0, -torch.inf)).sum(-1).exp()
            joint[:, range(4), w] += (p * likelihood)[:, None]
    exact = joint / joint.sum(-1, keepdim=True)
    p = ExactDenoiser(source, table, schedule, wrong)(x_t, z_t, t).double().exp()
    torch.testing.assert_close(p, exact, rtol=1e-3, atol=1e-4)
    if wrong:
        trusting = ExactDenoiser(source, table, schedule)(x_t, z_t, t).double().exp()
        assert (trusting - exact).abs().max() > 0.1, "a denoiser that trusts its latents is another one"


def score(
    dim: int, zhat: str, steps: int, discrete: str = "linear", norm: float = 2.0, num_latents: int = 1
) -> dict[str, float]:
    """Score 2,048 sequences of the exact denoiser with latents of dimension `dim`; 0 is the masked model."""
    source, schedule, table = Source(), NoiseSchedule(discrete), random_table(64, dim, norm, rng(5))
    denoiser = ExactDenoiser(source, table, schedule)
    options = {"steps": steps, "zhat": zhat, "num_latents": num_latents}
    return source.score(sample(denoiser, (2048, 32), table, schedule, 64, **options, generator=rng(3)))


@pytest.mark.slow
@pytest.mark.parametrize("steps, removed", [(4, 0.12), (16, 0.35)])
def test_the_latent_removes_errors_at_equal_t(steps, removed):
    """Check that the latent removes at least an eighth (T = 4) or a third (T = 16) of the masked model's errors.

    `sample` and `soft` must also be nearer to the law in total variation, and `hard` must have the fewest errors. With
    2,048 samples the share of errors has a standard error of about 0.001.
    """
    masked = score(0, "hard", steps)
    cadd = {zhat: score(64, zhat, steps) for zhat in ("sample", "soft", "hard")}
    for zhat in cadd:
        assert cadd[zhat]["bad"] < (1 - removed) * masked["bad"]
    assert max(cadd["sample"]["tv"], cadd["soft"]["tv"]) < masked["tv"]
    assert cadd["hard"]["bad"] < min(cadd["sample"]["bad"], cadd["soft"]["bad"])


@pytest.mark.slow
def test_tokens_that_are_revealed_late_leave_few_errors():
    """Check docs/tables/schedules.md at T = 8, to four of its spreads over laws: alpha_t = (1 - t)^p, length 3."""
    for discrete, errors, spread_ in (("linear", 0.064, 0.001), ("power2", 0.025, 0.002), ("power8", 0.006, 0.001)):
        assert score(9, "soft", 8, discrete, 3.0)["bad"] == pytest.approx(errors, abs=4 * spread_)
    assert score(9, "soft", 8, "power4", 3.0, num_latents=2)["bad"] == pytest.approx(0.140, abs=0.01), "K = 2"


@pytest.mark.slow
def test_a_latent_that_forgets_loses_the_advantage():
    """Power: catch a sampler whose latents are fresh noise at every step. It must not pass the test above."""
    source, schedule, table = Source(), NoiseSchedule(), random_table(64, 64, 2.0, rng(5))
    exact, gen = ExactDenoiser(source, table, schedule), rng(9)

    def forgetful(x, z, t):
        return exact(x, torch.randn(z.shape, generator=gen), t)

    x = sample(forgetful, (2048, 32), table, schedule, 64, steps=16, zhat="sample", generator=rng(3))
    assert source.score(x)["bad"] > 0.65 * score(0, "hard", 16)["bad"]


def test_score_of_the_source_itself():
    """Check the ends of the scale: the source's own sequences make no error, random tokens make almost only errors."""
    source = Source(topics=2)
    truth = source.score(source.draw(4000, rng(0)))
    assert truth["bad"] == 0 and truth["tv"] < 0.05
    noise = source.score(torch.randint(64, (4000, 32), generator=rng(1)))
    assert noise["bad"] > 0.8 and noise["tv"] > 0.8


def test_instrument_parses_and_tabulates():
    """Check the specs of models, the spread over seeds, the CE gap of an untrained network, and a line of the table."""
    assert parse("cadd:hint=raw,latent_norm=1.5,steps=7") == ("cadd", {"hint": "raw", "latent_norm": 1.5, "steps": 7})
    with pytest.raises(InputError, match="no field"):
        parse("cadd:hnit=raw")
    with pytest.raises(InputError, match="first-hitting ignores T"):
        of_sampling({"time_grid": "first-hitting"})
    assert spread([1.0, 2.0]) == "1.500 ± 0.707"
    source = Source()
    gap = ce_gap(source, build(source, "cadd", {}, 0), count=64)
    assert all(g > 0 for g in gap["gap"])  # an untrained network is worse than the exact one
    row = {"spec": "cadd", "trained": True, "T": [4], "train_seconds": 1.0, **gap}
    row["scores"] = {"soft 4": {"bad": 0.1, "tv": 0.2, "entropy": 0.3}}
    assert "| trained cadd | soft | 0.100 ± 0.000 / 0.200 ± 0.000 / 0.30 ± 0.00 |" in tables([row, row])
