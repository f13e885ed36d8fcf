"""The latent: its length and what it tells of the token, its fusion with the tokens, and trap 1.

Trap 1 is a latent table that learns: its rows grow until z_t spells out x_0, the loss falls, and samples collapse.
"""

import math

import pytest
import torch

from benchmarks.sources import Source
from cadd_min.dit import PRESETS
from cadd_min.forward import q_sample
from cadd_min.latent import FUSIONS, HINTS, Latent, evidence_norm, log_likelihood, ordered_rows, table_norm
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.objective import Batch
from cadd_min.sampler import sample
from cadd_min.schedule import NoiseSchedule
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.utils.device import seeded
from cadd_min.utils.errors import InputError
from tests.toys import nano, rng

DEFAULTS = {"table": "tied", "fusion": "add", "hint": "linear", "unit": 1.0}


@pytest.mark.parametrize("continuous", ["linear", "capped"])
def test_evidence_norm_makes_the_latent_worth_its_share_of_log_v(continuous):
    """Check how often the likeliest token under z_t is the true token, at t = 1/2 and for shares 1/4, 1 and 4 of log V.

    By capacity a share of 1 names about every second token, 1/4 hardly any, and 4 all.
    """
    schedule, vocab, t = NoiseSchedule("linear", continuous), 512, torch.full((4000,), 0.5)
    directions = torch.nn.functional.normalize(torch.randn(vocab, 256, generator=rng(0)), dim=-1)
    x = torch.randint(vocab, (4000, 1), generator=rng(1))
    rates = []
    for share in (0.25, 1.0, 4.0):
        norm = evidence_norm(vocab, schedule, share, 256)
        x_t, z = q_sample(x, norm * directions[x], t, schedule, vocab, generator=rng(2))
        named = log_likelihood(z, t, norm * directions, schedule).argmax(-1) == x
        rates.append(float(named[x_t == vocab].float().mean()))
    assert rates[0] < 0.2 < 0.25 < rates[1] < 0.9 < 0.99 < rates[2]


@pytest.mark.parametrize("vocab, dim, share", [(64, 64, 0.1), (64, 4, 0.333), (1024, 7, 0.346), (1024, 128, 0.1)])
def test_evidence_is_the_information_that_the_latent_carries(vocab, dim, share):
    """Compare I(x; z_t) at t = 1/2, by Monte Carlo with 20,000 latents, with the share of log V, to a tenth of it.

    Power: the limit of many dimensions, ||w||^2 SNR / 2, is off by more than a tenth where there are few.
    """
    schedule, t = NoiseSchedule(), torch.full((20_000,), 0.5)
    norm = evidence_norm(vocab, schedule, share, dim)
    table = norm * torch.nn.functional.normalize(torch.randn(vocab, dim, generator=rng(0)), dim=-1)
    x = torch.randint(vocab, (20_000, 1), generator=rng(1))
    eps = torch.randn(20_000, 1, dim, generator=rng(2))
    z = schedule.signal(t)[:, None, None] * table[x] + schedule.noise(t)[:, None, None] * eps
    log_p = log_likelihood(z, t, table, schedule).log_softmax(-1).gather(-1, x[..., None])
    information = float(log_p.mean()) + math.log(vocab)  # I(x; z_t), nats
    assert information / math.log(vocab) == pytest.approx(share, rel=0.1)
    many_dimensions = norm**2 * float(schedule.snr(t[0].double())) / 2
    assert (many_dimensions / math.log(vocab) > 1.1 * share) == (dim < 10)


@pytest.mark.parametrize("continuous", ["linear", "cosine", "capped", "flow"])
def test_log_likelihood_is_the_gaussian_density(continuous):
    """Compare with torch's normal density, up to the constant that all tokens share."""
    schedule = NoiseSchedule("linear", continuous)
    z, w = torch.randn(2, 3, 4, generator=rng(0)).double(), torch.randn(5, 4, generator=rng(1)).double()
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    law = torch.distributions.Normal(
        schedule.signal(t)[:, None, None, None] * w, schedule.noise(t)[:, None, None, None]
    )
    exact = law.log_prob(z[:, :, None, :]).sum(-1)
    log_p = log_likelihood(z, t, w, schedule)
    torch.testing.assert_close(log_p - log_p[..., :1], exact - exact[..., :1])


@pytest.mark.parametrize("continuous", ["linear", "cosine", "capped", "flow"])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 1.0])
def test_the_linear_hint_is_the_regression_of_z_0_on_z_t(t, continuous):
    """Compare the hint with the least-squares line through 40,000 latents of dimension 6 and length 3.

    Power: a factor of z_t that is 3% off leaves a larger error.
    """
    schedule, t = NoiseSchedule("linear", continuous), torch.tensor([t], dtype=torch.float64)
    latent = Latent(5, 6, 6, 3.0, schedule, table="fixed", hint="linear", unit=0.7)
    z_0 = 3 * torch.nn.functional.normalize(torch.randn(1, 40_000, 6, generator=rng(0), dtype=torch.float64), dim=-1)
    z_t = schedule.signal(t) * z_0 + schedule.noise(t) * torch.randn(z_0.shape, generator=rng(1), dtype=torch.float64)
    slope = float((z_0 * z_t).sum() / z_t.square().sum())
    masked = torch.ones(1, 40_000, dtype=torch.bool)
    hint = latent.fuse(torch.zeros_like(z_0), z_t, masked, t) / 0.7
    factor = float((hint * z_t).sum() / z_t.square().sum())
    torch.testing.assert_close(hint, factor * z_t)
    assert factor == pytest.approx(slope, abs=0.01)
    error = lambda factor: float((z_0 - factor * z_t).square().sum())
    assert error(factor) < min(error(1.03 * factor), error(0.97 * factor)) or factor == 0


@pytest.mark.parametrize("hint", HINTS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusions_and_hints_by_their_formulas(fusion, hint):
    """Compare z_tilde with the formulas of the docstrings, with a projection from 4 to 8 dimensions and unit 0.7."""
    schedule = NoiseSchedule("linear", "capped")
    latent = Latent(5, 8, 4, 3.0, schedule, table="fixed", fusion=fusion, hint=hint, unit=0.7).double()
    e, z_t = torch.randn(2, 3, 8, generator=rng(0)).double(), torch.randn(2, 3, 4, generator=rng(1)).double()
    masked, t = torch.tensor([[True, False, True], [False, True, True]]), torch.tensor([0.3, 0.8], dtype=torch.float64)
    gamma_bar = ((1 - t**2) / 2)[:, None, None]
    read = {
        "raw": z_t,
        "linear": gamma_bar.sqrt() * 9 / 4 / (gamma_bar * 9 / 4 + 1 - gamma_bar) * z_t,
    }[hint]  # fmt: skip
    z = 0.7 * read * masked[..., None]
    matrix = latent.project.weight.T
    expected = {
        "add": lambda: e + z @ matrix,
        "concat": lambda: torch.cat([e, z], -1) @ matrix,
        "reweight": lambda: torch.where(masked[..., None], (1 - gamma_bar) * e + gamma_bar * (z @ matrix), e),
    }
    torch.testing.assert_close(latent.fuse(e, z_t, masked, t), expected[fusion]())


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("hint", HINTS)
@pytest.mark.parametrize("table, dim", [("tied", 0), ("tied", 8), ("fixed", 8), ("free", 0)])
def test_unmasked_positions_see_no_latent(fusion, hint, table, dim):
    """Check that z_t changes nothing while all tokens are unmasked, and something once a token is masked."""
    net = nano(fusion=fusion, hint=hint, latent_table=table, latent_dim=dim)
    torch.nn.init.normal_(net.head.weight, generator=rng(5))
    x, t = torch.randint(11, (2, 12), generator=rng(0)), torch.tensor([0.3, 0.6])
    z_1, z_2 = torch.randn(2, 2, 12, net.latent.dim, generator=rng(1))
    assert torch.equal(net(x, z_1, t), net(x, z_2, t))
    x[:, 4] = 11
    assert not torch.allclose(net(x, z_1, t), net(x, z_2, t))


@torch.no_grad()
@pytest.mark.parametrize("bayes_head", [False, True])
def test_a_bias_of_the_head_is_added_to_every_logit(bayes_head):
    plain, biased = (nano(bayes_head=bayes_head, head_bias=bias) for bias in (False, True))
    biased.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.normal_(biased.head.bias, generator=rng(2))
    x, z, t = torch.full((2, 12), 11), torch.randn(2, 12, 32, generator=rng(1)), torch.tensor([0.3, 0.6])
    torch.testing.assert_close(biased(x, z, t), plain(x, z, t) + biased.head.bias)


def test_held_tables_pass_no_gradient_and_keep_their_norm():
    """Check every table but "free", which is the trap: no gradient, and rows of the length that was asked for."""
    for kind, dim in (("tied", 0), ("tied", 8), ("fixed", 0), ("fixed", 8)):
        table = nano(latent_table=kind, latent_dim=dim, latent_norm=2.5).table()
        assert not table.requires_grad
        torch.testing.assert_close(table.norm(dim=-1), torch.full((12,), 2.5))
    assert nano(latent_table="free").table().requires_grad


def test_masked_model_is_the_latent_of_dimension_zero():
    net = nano("mdlm")
    assert net.table().shape == (12, 0)
    with pytest.raises(InputError, match="width"):
        nano(latent_dim=8, latent_table="free")


def test_bayes_head_alone_is_the_exact_posterior():
    """Compare an untrained network, whose own logits are zero, with log N(z_t; signal w_v, noise^2 I) normalised."""
    net = nano(bayes_head=True, latent_norm=2.0)
    x, t = torch.full((2, 12), 11), torch.tensor([0.3, 0.8])
    z = torch.randn(2, 12, 32, generator=rng(0))
    exact = log_likelihood(z, t, net.table()[:-1], net.schedule)
    torch.testing.assert_close(net(x, z, t).log_softmax(-1), exact.log_softmax(-1), rtol=1e-4, atol=1e-4)


STEPS, SOURCE = 900, Source()


def trained(wrong_hints: float = 0.1, **options: object) -> Trainer:
    """Train a small network on SOURCE. `last` of the trainer holds the losses of the last step."""
    torch.manual_seed(0)
    config = ModelConfig(64, 32, PRESETS["nano"], **options)  # type: ignore[arg-type]
    settings = TrainConfig(steps=STEPS, batch_size=32, lr=2e-3, dtype="float32", wrong_hints=wrong_hints)
    trainer = Trainer(Denoiser(config), lambda i: Batch(SOURCE.draw(32, seeded(3, i))), settings)
    for _ in range(STEPS):
        trainer.last = trainer.train_step()
    return trainer


def samples(trainer: Trainer) -> dict[str, float]:
    """Score 1,000 sequences that the averaged network draws."""
    net = trainer.ema
    return SOURCE.score(sample(net, (1000, 32), net.table(), net.schedule, 64, steps=32, zhat="hard", generator=rng(0)))


@pytest.mark.slow
def test_a_free_table_leaks_and_a_held_one_does_not():
    """Compare two runs in the paper's plain form that differ in their table only (trap 1). `-s` prints both.

    The free table must grow, lower the CE by a third and still make the samples worse. The held table must not.
    """
    plain = {"hint": "raw", "continuous": "linear", "latent_norm": 1.0}
    held, free = trained(0.0, **plain), trained(0.0, latent_table="free", **plain)
    assert held.latent_norm() == pytest.approx(1.0, rel=1e-4)
    assert free.latent_norm() > 2  # it starts from 1
    assert free.last["ce"] < 0.7 * held.last["ce"]  # the loss of a leak looks good
    truth, held_score, free_score = SOURCE.score(SOURCE.draw(1000, rng(1))), samples(held), samples(free)
    for name, run, score in (("held", held, held_score), ("free", free, free_score)):
        print(f"\n{name}: norm {run.latent_norm():.2f}, CE {run.last['ce']:.3f}, impossible {score['bad']:.1%}, "
              f"bigram entropy {score['entropy']:.2f} bits of {truth['entropy']:.2f}")  # fmt: skip
    assert abs(held_score["entropy"] - truth["entropy"]) < 1.5 and held_score["bad"] < 0.2
    assert free_score["bad"] > 1.5 * held_score["bad"]


def test_the_length_of_rows_is_exact_on_every_device_and_has_an_end():
    """Check the formula to float64, the masked model's length 0, a model on no device, and the longest rows."""
    schedule = NoiseSchedule(continuous="capped")
    snr = float(schedule.gamma_bar(torch.tensor(0.5, dtype=torch.float64)))
    expected = math.sqrt(7 * math.expm1(2 * 0.3 * math.log(500) / 7) * (1 - snr) / snr)
    with torch.device("meta"):
        assert evidence_norm(500, schedule, 0.3, 7) == pytest.approx(expected, rel=1e-12)
    assert evidence_norm(500, schedule, 0.3, 0) == 0
    assert table_norm(1e18, 500, schedule, 0.3, 7) == 1e18
    with pytest.raises(InputError, match=r"^the latent.s rows would have the length 1\.1e\+18: lower evidence"):
        table_norm(1.1e18, 500, schedule, 0.3, 7)


def test_a_latent_is_tied_added_and_linear_unless_it_is_told():
    """Compare with a latent of the documented defaults: its weights, its table, and what the network reads."""
    e, t = torch.randn(12, 8, generator=rng(0)), torch.tensor([0.3, 0.9])
    masked = torch.rand(2, 3, generator=rng(2)) < 0.7
    for dim in (8, 5, 0):
        latents = [Latent(11, 8, dim, 2.5, NoiseSchedule(), **told) for told in ({}, DEFAULTS)]
        latents[0].load_state_dict(latents[1].state_dict())  # a latent of another width has a weight
        z = torch.randn(2, 3, dim, generator=rng(1))
        results = [(own.table(e), own.fuse(e[:6].view(2, 3, 8), z, masked, t)) for own in latents]
        assert all(torch.equal(a, b) for a, b in zip(*results))
        assert bool(latents[0].state_dict()) == (dim == 5)


@pytest.mark.parametrize("table, dim", [("tied", 1), ("tied", 5), ("fixed", 1), ("fixed", 8), ("ordered", 1)])
def test_directions_are_the_same_in_every_run_and_as_many_as_rows(table, dim):
    """Check that torch's own seed does not move a table, and that a latent of another width is mapped."""
    latents = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        latents.append(Latent(11, 8, dim, 2.5, NoiseSchedule(), table=table))
    e = torch.randn(12, 8, generator=rng(0))
    assert torch.equal(latents[0].table(e), latents[1].table(e)) and latents[0].table(e).shape == (12, dim)
    names = {"tied": "mixing", "fixed": "directions", "ordered": "directions"}
    assert latents[0].state_dict().keys() == {names[table]} | ({"project.weight"} if dim != 8 else set())


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 8])
def test_ordered_rows_are_a_scale(dim):
    """Check that neighbours are nearest, the ends farthest, and rows of length 1 (of mean square 1 on a line)."""
    rows = ordered_rows(256, dim)
    assert rows.shape == (256, dim)
    distance = torch.cdist(rows, rows)
    for i in (0, 100, 255):
        nearest = distance[i].argsort()
        assert (nearest[:3] - i).abs().max() <= 2  # itself and its neighbours
    at = 2 * math.pi * torch.arange(1, 5) / 5  # k pi u at u = 2 / 5, the third of six rows
    wave = torch.stack([at.cos(), at.sin()], 1).flatten()[:dim]  # cos 1, sin 1, cos 2, sin 2, ...
    if dim > 1:
        torch.testing.assert_close(ordered_rows(6, dim)[2], wave / wave.norm())
    if dim <= 2:  # on a line and on half a circle every step leads away
        assert (distance[0].diff() > 0).all() and (distance[-1].diff() < 0).all()
    if dim > 1:
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(256))
    else:
        assert float(rows.square().mean()) == pytest.approx(1, rel=0.01)


def test_an_ordered_table_never_moves_and_ends_with_the_mask():
    """Check that the table ignores the token embedding, and that the mask's row is zero."""
    latent = Latent(17, 8, 4, 2.5, NoiseSchedule(), table="ordered")
    table = latent.table(torch.randn(18, 8, requires_grad=True))
    torch.testing.assert_close(table[:17], 2.5 * ordered_rows(17, 4))
    assert not table.requires_grad and (table[17] == 0).all()
