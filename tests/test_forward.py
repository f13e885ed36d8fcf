"""Proposition 1: the closed form q(x_t, z_t | x_0) is the law of the chain of forward steps.

Tokens are compared by chi-square, latents by Kolmogorov-Smirnov. The law of z_t must not depend on the step that masked
the token. Two broken chains must fail: a chain that forgets when it masked, and a chain with the wrong mask rate.
"""

import itertools

import pytest
import torch
from scipy import stats

from cadd_min.forward import q_sample, q_step
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.errors import InputError
from tests.toys import ALPHA, rng

MASK, COUNT = 7, 20000


def chain(z_0: torch.Tensor, times: list[float], schedule: NoiseSchedule, seed: int, step=q_step):
    """Run COUNT sequences of one token, all with the latent z_0 (D,), through the chain at `times`.

    Returns: x (COUNT,), z (COUNT, D), and when (COUNT,), the number of the step that masked the token, or -1.
    """
    gen, x = rng(seed), torch.zeros(COUNT, 1, dtype=torch.int64)
    z, when = z_0.expand(COUNT, 1, -1), torch.full((COUNT,), -1)
    for i, (s, t) in enumerate(zip([0.0, *times], times)):
        was_masked = x[:, 0] == MASK
        x, z = step(
            x, z, *(torch.full((COUNT,), v, dtype=torch.float64) for v in (s, t)), schedule, MASK, generator=gen
        )
        when[(x[:, 0] == MASK) & ~was_masked] = i
    return x[:, 0], z[:, 0], when


def p_values(x, z, when, z_0, t: float, schedule: NoiseSchedule) -> list[float]:
    """Compute the p-values of tokens and latents at time t under the closed form.

    First the chi-square of the masked share, or 1 where all tokens must be masked. Then Kolmogorov-Smirnov of each
    dimension of z, for all masked tokens and for the tokens of each masking step. Groups up to 500 tokens are left out.
    """
    time = torch.tensor(t, dtype=torch.float64)
    masked = x == MASK
    expected = COUNT * (1 - float(schedule.alpha(time)))
    values = [1.0] if expected == COUNT else []
    if expected < COUNT:
        values = [stats.chisquare([int(masked.sum()), int((~masked).sum())], [expected, COUNT - expected]).pvalue]
    law = [stats.norm(float(schedule.signal(time) * m), float(schedule.noise(time))) for m in z_0]
    for group in [masked, *(when == i for i in range(int(when.max()) + 1))]:
        if group.sum() > 500:
            values += [stats.kstest(z[group, d].numpy(), law[d].cdf).pvalue for d in range(len(z_0))]
    return values


@pytest.mark.parametrize("continuous", ["linear", "cosine", "capped", "flow"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_chain_has_the_closed_forms_law(continuous, seed):
    """Compare three or four forward steps with the closed form at the last time. Unmasked latents stay bit for bit."""
    schedule, z_0 = NoiseSchedule("cosine" if seed == 3 else "linear", continuous), torch.tensor([1.5, -0.7]).double()
    for times in ([0.3, 0.5, 0.6], [0.1, 0.55, 0.9], [0.2, 0.4, 0.6, 0.8]):
        x, z, when = chain(z_0, times, schedule, seed)
        assert min(p_values(x, z, when, z_0, times[-1], schedule)) > ALPHA
        assert torch.equal(z[x != MASK], z_0.expand(int((x != MASK).sum()), -1))


@pytest.mark.parametrize("continuous", ["linear", "capped", "flow"])
def test_closed_form_has_its_law(continuous):
    """Compare `q_sample` at four times with alpha_t, signal_t and noise_t. At t = 1 every token is masked."""
    schedule, z_0 = NoiseSchedule("linear", continuous), torch.tensor([1.5, -0.7]).double()
    for seed, t in enumerate((0.05, 0.3, 0.7, 1.0)):
        x_0 = torch.zeros(COUNT, 1, dtype=torch.int64)
        times = torch.full((COUNT,), t, dtype=torch.float64)
        x, z = q_sample(x_0, z_0.expand(COUNT, 1, -1), times, schedule, MASK, generator=rng(seed))
        when = torch.full((COUNT,), -1)  # there are no steps
        assert min(p_values(x[:, 0], z[:, 0], when, z_0, t, schedule)) > ALPHA
        assert t < 1 or (x == MASK).all()


def test_a_chain_that_forgets_when_it_masked_is_caught():
    """Power: catch a chain that noises every masked latent as if it were masked now, by Kolmogorov-Smirnov.

    A token that was masked in an earlier step is then noised from its noisy z_s, with the factors of a clean z_0.
    """
    schedule, z_0 = NoiseSchedule(), torch.tensor([1.5, -0.7]).double()

    def broken(x_s, z_s, s, t, schedule, mask_id, *, generator):
        x_t, z_t = q_step(x_s, z_s, s, t, schedule, mask_id, generator=generator)
        eps = q_sample(x_s, z_s, torch.ones_like(t), schedule, mask_id, generator=generator)[1]
        noised = schedule.signal(t)[:, None, None] * z_s + schedule.noise(t)[:, None, None] * eps
        return x_t, torch.where((x_t == mask_id)[..., None], noised, z_t)

    x, z, when = chain(z_0, [0.3, 0.5, 0.6], schedule, 1, broken)
    assert min(p_values(x, z, when, z_0, 0.6, schedule)) < ALPHA


def test_a_chain_with_the_wrong_mask_rate_is_caught():
    """Power: catch a chain that masks with probability t in each step, not 1 - alpha_t / alpha_s, by chi-square."""
    schedule, z_0 = NoiseSchedule(), torch.tensor([1.5]).double()

    def broken(x_s, z_s, s, t, schedule, mask_id, *, generator):
        x_t, z_t = q_sample(x_s, z_s, t, schedule, mask_id, generator=generator)
        return x_t.masked_fill(x_s == mask_id, mask_id), z_t

    x, z, when = chain(z_0, [0.3, 0.5, 0.6], schedule, 1, broken)
    assert p_values(x, z, when, z_0, 0.6, schedule)[0] < ALPHA


def test_ends():
    """Check that t = 0 changes nothing, that t = 1 leaves masks and noise, and that a step from 1 to 1 is no step."""
    x_0, z_0 = torch.arange(6).reshape(2, 3), torch.randn(2, 3, 4, generator=rng(0))
    for discrete in ("linear", "cosine", "all-at-once"):
        schedule = NoiseSchedule(discrete)
        x, z = q_sample(x_0, z_0, torch.zeros(2), schedule, MASK, generator=rng(1))
        assert torch.equal(x, x_0) and torch.equal(z, z_0)
        x, z = q_sample(x_0, z_0, torch.ones(2), schedule, MASK, generator=rng(1))
        assert (x == MASK).all() and not torch.isclose(z, z_0).any()
        x_1, z_1 = q_step(x, z, torch.ones(2), torch.ones(2), schedule, MASK, generator=rng(2))
        assert torch.equal(x_1, x) and torch.allclose(z_1, z)


def test_seeds_reproduce_and_shapes_are_checked():
    x_0, z_0, t = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4), torch.tensor([0.2, 0.9])
    (x_t, z_t), (x_again, z_again) = (q_sample(x_0, z_0, t, NoiseSchedule(), MASK, generator=rng(5)) for _ in range(2))
    assert torch.equal(x_t, x_again) and torch.equal(z_t, z_again)
    with pytest.raises(InputError, match=r"z \(B, L, D\)"):
        q_sample(x_0, z_0[:, :2], t, NoiseSchedule(), MASK)
    with pytest.raises(InputError, match=r"t \(B,\)"):
        q_sample(x_0, z_0, t[:1], NoiseSchedule(), MASK)


@pytest.mark.parametrize("continuous", ["linear", "cosine", "capped", "flow"])
def test_samples_are_their_formulas_with_the_generators_numbers(continuous):
    """Write out q_sample and q_step for each token, with uniforms and then normals of the same generator.

    Tokens masked before, masked in this step and still unmasked all occur.
    """
    schedule, s, t = NoiseSchedule("cosine", continuous), torch.tensor([0.3, 0.5, 1.0]), torch.tensor([0.6, 0.9, 1.0])
    s, t = s.double(), t.double()
    x_0, z_0 = torch.randint(MASK, (3, 30), generator=rng(0)), torch.randn(3, 30, 2, generator=rng(1)).double()
    gen = rng(3)
    u, eps = torch.rand(3, 30, generator=gen), torch.randn(3, 30, 2, generator=gen, dtype=torch.float64)
    x_s, z_s = q_sample(x_0, z_0, s, schedule, MASK, generator=rng(3))
    x_t, z_t = q_step(x_s, z_s, s, t, schedule, MASK, generator=rng(3))
    kinds = set()
    for b, i in itertools.product(range(3), range(30)):
        alpha_s, alpha_t = float(schedule.alpha(s[b])), float(schedule.alpha(t[b]))
        (a_s, n_s), (a_t, n_t) = ((schedule.signal(time), schedule.noise(time)) for time in (s[b], t[b]))
        masked = bool(u[b, i] >= alpha_s)
        assert x_s[b, i] == (MASK if masked else x_0[b, i])
        torch.testing.assert_close(z_s[b, i], a_s * z_0[b, i] + n_s * eps[b, i] if masked else z_0[b, i])
        later = masked or bool(u[b, i] >= alpha_t / alpha_s)
        assert x_t[b, i] == (MASK if later else x_0[b, i])
        if masked and t[b] == 1:
            expected = z_s[b, i] if s[b] == 1 else eps[b, i]
        elif masked:
            c = a_t / a_s
            expected = c * z_s[b, i] + (n_t**2 - c**2 * n_s**2).sqrt() * eps[b, i]
        else:
            expected = a_t * z_s[b, i] + n_t * eps[b, i] if later else z_s[b, i]
        torch.testing.assert_close(z_t[b, i], expected)
        kinds.add((masked, later))
    assert kinds == {(True, True), (False, True), (False, False)}
