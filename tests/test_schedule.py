"""The noise schedules: exact end points, falling curves, true derivatives, and the flip probability of Prop. 2."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cadd_min.schedule import CONTINUOUS, DISCRETE, NoiseSchedule, ratio
from cadd_min.utils.errors import InputError

PAIRS = [(d, c) for d in DISCRETE for c in CONTINUOUS]
time = st.floats(0, 1, allow_nan=False, width=32)


@pytest.mark.parametrize("discrete, continuous", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_end_points_are_exact(discrete, continuous, dtype):
    """Compare the curves with 1 and 0 at both ends, bit for bit: nothing downstream clips them."""
    schedule, ends = NoiseSchedule(discrete, continuous), torch.tensor([0.0, 1.0], dtype=dtype)
    for curve in (schedule.alpha, schedule.gamma_bar, schedule.signal):
        assert curve(ends).tolist() == [1.0, 0.0]
    assert schedule.noise(ends).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("discrete, continuous", PAIRS)
def test_curves_fall_and_their_derivatives_agree(discrete, continuous):
    """Compare SNR'(t) with autograd, and the flip rate with rho_flip(t - dt, t) / dt for dt = 1e-7.

    A wrong sign or factor in a derivative fails here, and would otherwise only bend the weights of the loss.
    """
    schedule = NoiseSchedule(discrete, continuous)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    assert (schedule.alpha(t).diff() <= 0).all() and (schedule.gamma_bar(t).diff() < 0).all()
    (snr_prime,) = torch.autograd.grad(schedule.snr(t).sum(), t)
    torch.testing.assert_close(schedule.snr_prime(t), snr_prime, rtol=1e-9, atol=1e-9)
    dt = 1e-7
    rate = schedule.rho_flip(t - dt, t) / dt
    torch.testing.assert_close(schedule.flip_rate(t), rate, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(schedule.snr(t), (schedule.signal(t) / schedule.noise(t)) ** 2, rtol=1e-9, atol=0)


@given(a=time, b=time, pair=st.sampled_from(PAIRS))
def test_flip_and_keep_are_probabilities(a, b, pair):
    """Check rho_flip and rho_keep at any two times: in [0, 1], sum 1, all flip at s = 0, nothing flips at s = t."""
    schedule = NoiseSchedule(*pair)
    s, t = torch.tensor(min(a, b), dtype=torch.float64), torch.tensor(max(a, b), dtype=torch.float64)
    flip, keep = schedule.rho_flip(s, t), schedule.rho_keep(s, t)
    assert 0 <= flip <= 1 and flip + keep == 1
    if t > 0:
        assert schedule.rho_flip(torch.zeros_like(s), t) == 1  # s = 0 flips all
    assert schedule.rho_flip(t, t) == 0  # s = t is the identity


def test_flow_latent_is_the_straight_line():
    """Check z_t = (1 - t) z_0 + t eps (paper, App. B.1)."""
    schedule, t = NoiseSchedule(continuous="flow"), torch.linspace(0, 1, 11)
    torch.testing.assert_close(schedule.signal(t), 1 - t)
    torch.testing.assert_close(schedule.noise(t), t)


def test_unknown_names_are_listed():
    with pytest.raises(InputError, match="linear, power2"):
        NoiseSchedule("linaer")
    with pytest.raises(InputError, match="linear, cosine, capped, flow"):
        NoiseSchedule(continuous="x")


@pytest.mark.parametrize("discrete", ["linear", "power8", "cosine"])
def test_a_step_to_zero_unmasks_all_however_short_the_step(discrete):
    """Check rho_flip(0, t) = 1 where 1 - alpha_t is too small for float32."""
    s, t = torch.zeros(3), torch.tensor([1e-12, 1e-6, 1.0])
    assert NoiseSchedule(discrete).rho_flip(s, t).tolist() == [1.0, 1.0, 1.0]


def test_a_ratio_of_zeros_is_one():
    """Check that a curve that is 0 at both times has the ratio 1, without NaN in the gradient."""
    part, whole = torch.tensor([1.0, 0.0, 0.0, 0.3], requires_grad=True), torch.tensor([2.0, 0.5, 0.0, 0.3])
    assert ratio(part, whole).tolist() == [0.5, 0.0, 1.0, 1.0]
    ratio(part, whole).sum().backward()
    assert torch.isfinite(part.grad).all()
