"""The bound is Lemma 1's sum, written out position by position, with the noise of the same generator."""

import math

import pytest
import torch

from cadd_min.forward import q_sample
from cadd_min.loss import nelbo_parts, stratified_times
from cadd_min.schedule import CONTINUOUS, NoiseSchedule
from tests.toys import rng

MASK = 5  # the head lacks it
W = torch.randn(6, 3, generator=rng(0), dtype=torch.float64)
X_0 = torch.randint(5, (4, 7), generator=rng(1))
WEIGHTS = torch.randn(6, 5, generator=rng(2), dtype=torch.float64)
LOW = 0.2  # where the last step begins: far from 0, so that its share is seen
# gamma_bar ends at 0.36: z_1 still knows x_0, so the prior has a cost.
EARLY_END = (lambda t: 1 - 0.64 * t, lambda t: torch.full_like(t, -0.64))


def logits(x, z, t):
    return WEIGHTS[x] + (z @ W.T)[..., :5] * t[:, None, None]


def errors(x_0, free, t, schedule, gen):
    """Yield each masked position: its sequence, -log p(x_0), the squared error of z0_hat, and its time."""
    x, z = q_sample(x_0, W[x_0], t, schedule, MASK, generator=gen)
    x = torch.where(free, x, x_0)
    p = logits(x, z, t).softmax(-1)
    for b, i in (free & (x == MASK)).nonzero().tolist():
        yield b, -p[b, i, x_0[b, i]].log(), (p[b, i] @ W[:5] - W[x_0[b, i]]).square().sum(), t[b]


def prior(x_0, free, schedule):
    """Compute KL(q(z_1 | x_0) || N(0, I)) of the free positions by torch's formula for two Gaussians, (B,)."""
    normal, gamma_bar = torch.distributions.Normal, schedule.gamma_bar(torch.ones(()).double())
    q = normal(gamma_bar.sqrt() * W[x_0], (1 - gamma_bar).sqrt())
    return (torch.distributions.kl_divergence(q, normal(torch.zeros(()).double(), 1.0)).sum(-1) * free).sum(1)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("steps", [1, 3, None])
def test_the_bound_is_written_out(steps, given, monkeypatch):
    """Compare both parts, of all tokens and of those that are not given. A given token may be the mask itself."""
    monkeypatch.setattr("cadd_min.loss.T_MIN", LOW)
    monkeypatch.setitem(CONTINUOUS, "early end", EARLY_END)
    schedule, gen, x_0, free = NoiseSchedule("cosine", "early end"), rng(3), X_0.clone(), torch.ones(4, 7).bool()
    if given:
        free = torch.rand(4, 7, generator=rng(5)) < 0.7
        x_0[0, 1], free[0, 1] = MASK, False
    u, alpha = stratified_times(4, gen), schedule.alpha
    tokens, latents = torch.zeros(4).double(), prior(x_0, free, schedule)
    if steps is None:
        for b, nats, error, t in errors(x_0, free, LOW + (1 - LOW) * u, schedule, gen):
            slope = math.pi / 2 * math.cos(math.pi / 2 * t)  # -alpha'
            tokens[b] += (1 - LOW) * slope / (1 - alpha(t)) * nats
            latents[b] += (1 - LOW) * 0.64 / (0.64 * t) ** 2 / 2 * error
        for b, nats, _, _ in errors(x_0, free, torch.full_like(u, LOW), schedule, gen):
            tokens[b] += nats
    else:
        for b, nats, error, t in errors(x_0, free, (u * steps).ceil() / steps, schedule, gen):
            first = t < 1.5 / steps  # then s = 0, and no position stays masked
            flip = 1 if first else (alpha(t - 1 / steps) - alpha(t)) / (1 - alpha(t))
            tokens[b] += steps * flip * nats
            if not first:
                latents[b] += steps * (1 - flip) * (schedule.snr(t - 1 / steps) - schedule.snr(t)) / 2 * error
    parts = nelbo_parts(logits, x_0, W, schedule, MASK, steps=steps, free=free if given else None, generator=rng(3))
    torch.testing.assert_close(parts.discrete, tokens)
    torch.testing.assert_close(parts.continuous, latents)
    assert prior(x_0, free, schedule).min() > 0.1
