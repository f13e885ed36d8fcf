"""The losses, bounds and chains of score entropy and uniform states, written out with the same random numbers."""

import math

import pytest
import torch

from cadd_min import ops
from cadd_min.baselines import ar, sedd, udm
from cadd_min.kernels import philox
from cadd_min.loss import stratified_times
from cadd_min.objective import Batch, Objective
from cadd_min.orders import Sampling
from tests.toys import batch, nano, randomized, rng

V, LOWEST = 11, 1e-4
X_0 = batch(2).x_0[:4]


def lively(model: str):
    return randomized(nano(model), 0.08 if model == "sedd" else 0.15).double()


def logits_of(net, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return net(x_t, torch.zeros(*x_t.shape, 0), t.float())


def picked(log_p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return log_p.gather(-1, x[..., None])[..., 0]


# Both models have the linear schedule: alpha = 1 - t, and -alpha' / (1 - alpha) = 1 / t.


class ScoreEntropy:
    module = sedd

    def drawn(self, t: torch.Tensor, gen: torch.Generator) -> torch.Tensor:
        return X_0.masked_fill(torch.rand(X_0.shape, generator=gen) >= 1 - t[:, None], V)

    def rate(self, net, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the score entropy (B, L) per unit of time, and the CE (B, L), where masked."""
        f = logits_of(net, x_t, t) - math.log(V)
        entropy = (f.exp().sum(-1) - 1 - picked(f, X_0)) / t[:, None]
        return entropy * (x_t == V), -picked(f.log_softmax(-1), X_0) * (x_t == V)

    def step(self, net, x_t: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Compute the KL (B, L) of one step: flips to v at the rate rho e^(f_v), all of softmax(f) where s = 0."""
        f, rho = logits_of(net, x_t, t) - math.log(V), ((t - s) / t)[:, None]
        flip = rho * (rho / (rho * picked(f, X_0).exp())).log()
        stay = torch.where(rho < 1, (1 - rho) * ((1 - rho) / (1 - rho * f.exp().sum(-1))).log(), 0)
        last = -picked(f.log_softmax(-1), X_0)
        return torch.where(s[:, None] > 0, flip + stay, last) * (x_t == V)


class UniformStates:
    module = udm

    def drawn(self, t: torch.Tensor, gen: torch.Generator) -> torch.Tensor:
        u = torch.rand(X_0.shape, generator=gen)
        return torch.where(u < 1 - t[:, None], X_0, torch.randint(V, X_0.shape, generator=gen))

    def rate(self, net, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the KL rate of the two jump processes (B, L) by a sum over all jumps, and the CE (B, L)."""
        p, alpha = logits_of(net, x_t, t).softmax(-1), (1 - t)[:, None, None]
        x, y = (V * alpha * law + 1 - alpha for law in (torch.nn.functional.one_hot(X_0, V), p))
        r = (1 / (1 - t))[:, None, None] / V
        to, by = (r * rates / rates.gather(-1, x_t[..., None]) for rates in (x, y))
        jump = (to * (to / by).log() - to + by).scatter(-1, x_t[..., None], 0.0)
        return jump.sum(-1), -picked(p.log(), X_0)

    def posterior(self, x_t: torch.Tensor, law: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Compute q(x_s | x_t, law) (B, L, V) by Bayes' rule: the step's likelihood times the law at time s."""
        a, alpha_s = ((1 - t) / (1 - s)).nan_to_num(1.0)[:, None, None], (1 - s)[:, None, None]
        joint = (a * torch.nn.functional.one_hot(x_t, V) + (1 - a) / V) * (alpha_s * law + (1 - alpha_s) / V)
        return joint / joint.sum(-1, keepdim=True)

    def step(self, net, x_t: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Compute the KL (B, L) between the posteriors given x_0 and by the network."""
        p = logits_of(net, x_t, t).softmax(-1)
        q, p = (self.posterior(x_t, law, s, t) for law in (torch.nn.functional.one_hot(X_0, V).double(), p))
        return torch.where(q > 0, q * (q / p).log(), 0).sum(-1)


METHODS = {"sedd": ScoreEntropy(), "udm": UniformStates()}


@pytest.mark.parametrize("name", METHODS)
def test_training_losses(name):
    net, method, u = lively(name), METHODS[name], stratified_times(4, rng(1))
    loss = method.module.training_loss(net, Batch(X_0), u, Objective(mse=1.0), rng(5))
    t = LOWEST + (1 - LOWEST) * u
    x_t = method.drawn(t, rng(5))
    rate, ce = method.rate(net, x_t, t)
    torch.testing.assert_close(loss.total, (1 - LOWEST) * rate.sum() / X_0.numel(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(loss.ce, ce.detach().sum(), rtol=1e-6, atol=1e-8)
    assert loss.masked == ((x_t == V).sum() if name == "sedd" else X_0.numel())
    assert loss.mse == 0 and loss.mse.shape == () and not loss.ce.requires_grad and loss.total.requires_grad


def test_the_autoregressive_loss():
    net, inputs = lively("ar"), torch.cat([torch.full((4, 1), V), X_0[:, :-1]], 1)
    ce = -picked(logits_of(net, inputs, torch.zeros(4)).log_softmax(-1), X_0)
    loss = ar.training_loss(net, Batch(X_0), torch.ones(4), Objective(mse=1.0), rng(5))
    torch.testing.assert_close(loss.total, ce.mean())
    torch.testing.assert_close(loss.ce, ce.sum().detach())
    assert loss.masked == X_0.numel() and loss.mse == 0 and loss.mse.shape == () and not loss.ce.requires_grad
    bound = ar.nelbo_parts(net, X_0)
    torch.testing.assert_close(bound.discrete, ce.sum(1).detach())
    assert torch.equal(bound.continuous, torch.zeros(4))


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4, None])
@pytest.mark.parametrize("name", METHODS)
def test_bounds(name, steps, monkeypatch):
    """The last step begins at 0.2, so that its share is seen."""
    net, method, gen, lowest = lively(name), METHODS[name], rng(6), 0.2
    monkeypatch.setattr(method.module, "T_MIN", lowest)
    bound = method.module.nelbo_parts(net, X_0, steps=steps, generator=rng(6))
    u = stratified_times(4, gen)
    if steps is None:
        t, low = lowest + (1 - lowest) * u, torch.full_like(u, lowest)
        expected = (1 - lowest) * method.rate(net, method.drawn(t, gen), t)[0]
        expected = expected + method.step(net, method.drawn(low, gen), 0 * u, low)
    else:
        number = (u * steps).ceil()
        t = number / steps
        expected = steps * method.step(net, method.drawn(t, gen), (number - 1) / steps, t)
    torch.testing.assert_close(bound.discrete, expected.sum(1), rtol=1e-5, atol=1e-7)
    assert torch.equal(bound.continuous, torch.zeros(4))


def inverse_cdf(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    cdf = p.double().cumsum(-1)
    return (cdf <= (u * cdf[..., -1])[..., None]).sum(-1)


def nucleus(p: torch.Tensor) -> torch.Tensor:
    """Keep the most probable tokens until 0.8 of the mass is reached."""
    falling = p.sort(-1, descending=True).values
    least = falling.masked_fill(falling.cumsum(-1) - falling >= 0.8, 1).amin(-1, keepdim=True)
    return p * (p >= least) / (p * (p >= least)).sum(-1, keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_chains(name):
    """Make the samples of five steps by hand: top-p, a temperature that falls, and a prompt with two tokens."""
    net, method, tau = lively(name), METHODS[name], lambda t: 0.5 + t
    prompt = torch.full((4, 12), V)
    prompt[:, 3:5] = torch.tensor([9, 1])
    free, seed, place = prompt == V, ops.draw_seed(rng(7)), torch.arange(48).view(4, 12)
    u = philox.choices(seed, place)[1]
    x, steps = prompt if name == "sedd" else torch.where(free, (V * u).long(), prompt), []
    drawn = method.module.sample(net, prompt, Sampling(5, temperature=tau, top_p=0.8), seed, steps.append)
    for n, step in enumerate(steps):
        t, s = (torch.full((4,), 1 - k / 5, dtype=torch.float64) for k in (n, n + 1))
        u_flip, u_token = philox.choices(torch.stack([seed[0], torch.tensor(n + 1)]), place)
        logits = logits_of(net, x, t)
        p = nucleus((logits / tau(float(t[0]))).softmax(-1))
        if name == "sedd":
            flip = u_flip < 1 / (5 - n) * (logits - math.log(V)).exp().sum(-1)
            change, token = (x == V) & (flip if n < 4 else True), inverse_cdf(p, u_token)
            best = torch.where(x == V, logits.argmax(-1), torch.where(change, token, x))
        else:
            change, token = free, inverse_cdf(method.posterior(x, p, s, t), u_token)
            best = torch.where(free, p.argmax(-1), x)
        after = torch.where(change, token, x)
        assert torch.equal(step.x, after) and torch.equal(step.fresh, after != x)
        assert torch.equal(step.belief(), best)
        x = after
    assert len(steps) == 5 and torch.equal(drawn, x) and (prompt == V).sum() == 40  # the prompt itself stays
