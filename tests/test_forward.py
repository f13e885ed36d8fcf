"""Proposition 1: the closed form is what the chain does, the time of masking included."""

import pytest
import torch
from scipy import stats

from cadd_min.forward import q_sample, q_step
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.errors import InputError
from tests.toys import ALPHA, rng

MASK, COUNT = 7, 20000


def chain(z_0: torch.Tensor, times: list[float], schedule: NoiseSchedule, seed: int, step=q_step):
    """Run COUNT single tokens of latent z_0 through the chain; returns x, z and when each was masked (-1: never)."""
    gen, x = rng(seed), torch.zeros(COUNT, 1, dtype=torch.int64)
    z, when = z_0.expand(COUNT, 1, -1), torch.full((COUNT,), -1)
    for i, (s, t) in enumerate(zip([0.0, *times], times)):
        before = x[:, 0] == MASK
        x, z = step(
            x, z, *(torch.full((COUNT,), v, dtype=torch.float64) for v in (s, t)), schedule, MASK, generator=gen
        )
        when[(x[:, 0] == MASK) & ~before] = i
    return x[:, 0], z[:, 0], when


def p_values(x, z, when, z_0, t: float, schedule: NoiseSchedule) -> list[float]:
    """Chi-square of the mask, KS of z per dimension, for all masked and for each time of masking with enough tokens."""
    time = torch.tensor(t, dtype=torch.float64)
    masked = x == MASK
    expected = COUNT * (1 - float(schedule.alpha(time)))
    found = [1.0] if expected == COUNT else []
    if expected < COUNT:
        found = [stats.chisquare([int(masked.sum()), int((~masked).sum())], [expected, COUNT - expected]).pvalue]
    law = [stats.norm(float(schedule.signal(time) * m), float(schedule.noise(time))) for m in z_0]
    for group in [masked, *(when == i for i in range(int(when.max()) + 1))]:
        if group.sum() > 500:
            found += [stats.kstest(z[group, d].numpy(), law[d].cdf).pvalue for d in range(len(z_0))]
    return found


@pytest.mark.parametrize("continuous", ["linear", "cosine", "capped", "flow"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_chain_has_the_closed_forms_law(continuous, seed):
    schedule, z_0 = NoiseSchedule("cosine" if seed == 3 else "linear", continuous), torch.tensor([1.5, -0.7]).double()
    for times in ([0.3, 0.5, 0.6], [0.1, 0.55, 0.9], [0.2, 0.4, 0.6, 0.8]):
        x, z, when = chain(z_0, times, schedule, seed)
        assert min(p_values(x, z, when, z_0, times[-1], schedule)) > ALPHA
        assert torch.equal(z[x != MASK], z_0.expand(int((x != MASK).sum()), -1))  # frozen bitwise while unmasked


@pytest.mark.parametrize("continuous", ["linear", "capped", "flow"])
def test_closed_form_has_its_law(continuous):
    schedule, z_0 = NoiseSchedule("linear", continuous), torch.tensor([1.5, -0.7]).double()
    for seed, t in enumerate((0.05, 0.3, 0.7, 1.0)):
        x_0 = torch.zeros(COUNT, 1, dtype=torch.int64)
        times = torch.full((COUNT,), t, dtype=torch.float64)
        x, z = q_sample(x_0, z_0.expand(COUNT, 1, -1), times, schedule, MASK, generator=rng(seed))
        nothing = torch.full((COUNT,), -1)
        assert min(p_values(x[:, 0], z[:, 0], nothing, z_0, t, schedule)) > ALPHA
        assert t < 1 or (x == MASK).all()


def test_a_chain_that_forgets_when_it_masked_is_caught():
    """Power: noising a token masked earlier as if it were masked now must fail the KS test."""
    schedule, z_0 = NoiseSchedule(), torch.tensor([1.5, -0.7]).double()

    def broken(x_s, z_s, s, t, schedule, mask_id, *, generator):
        x_t, z_t = q_step(x_s, z_s, s, t, schedule, mask_id, generator=generator)
        again = q_sample(x_s, z_s, torch.ones_like(t), schedule, mask_id, generator=generator)[1]
        mixed = schedule.signal(t)[:, None, None] * z_s + schedule.noise(t)[:, None, None] * again
        return x_t, torch.where((x_t == mask_id)[..., None], mixed, z_t)

    x, z, when = chain(z_0, [0.3, 0.5, 0.6], schedule, 1, broken)
    assert min(p_values(x, z, when, z_0, 0.6, schedule)) < ALPHA


def test_a_chain_with_the_wrong_mask_rate_is_caught():
    """Power: masking with probability t in each step, not 1 - alpha_t / alpha_s, must fail the chi-square test."""
    schedule, z_0 = NoiseSchedule(), torch.tensor([1.5]).double()

    def broken(x_s, z_s, s, t, schedule, mask_id, *, generator):
        x_t, z_t = q_sample(x_s, z_s, t, schedule, mask_id, generator=generator)
        was = x_s == mask_id
        return x_t.masked_fill(was, mask_id), z_t

    x, z, when = chain(z_0, [0.3, 0.5, 0.6], schedule, 1, broken)
    assert p_values(x, z, when, z_0, 0.6, schedule)[0] < ALPHA


def test_ends():
    x_0, z_0 = torch.arange(6).reshape(2, 3), torch.randn(2, 3, 4, generator=rng(0))
    for discrete in ("linear", "cosine", "gone"):
        schedule = NoiseSchedule(discrete)
        x, z = q_sample(x_0, z_0, torch.zeros(2), schedule, MASK, generator=rng(1))
        assert torch.equal(x, x_0) and torch.equal(z, z_0)
        x, z = q_sample(x_0, z_0, torch.ones(2), schedule, MASK, generator=rng(1))
        assert (x == MASK).all() and not torch.isclose(z, z_0).any()
        same = q_step(x, z, torch.ones(2), torch.ones(2), schedule, MASK, generator=rng(2))
        assert torch.equal(same[0], x) and torch.allclose(same[1], z)  # s = t = 1


def test_seeds_reproduce_and_shapes_are_checked():
    x_0, z_0, t = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4), torch.tensor([0.2, 0.9])
    one, two = (q_sample(x_0, z_0, t, NoiseSchedule(), MASK, generator=rng(5)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    with pytest.raises(InputError, match=r"z \(B, L, D\)"):
        q_sample(x_0, z_0[:, :2], t, NoiseSchedule(), MASK)
    with pytest.raises(InputError, match=r"t \(B,\)"):
        q_sample(x_0, z_0, t[:1], NoiseSchedule(), MASK)
