"""Muon against its definition: the SVD, torch's own Muon, and what a step must leave alone."""

import pytest
import torch

from cadd_min.training.muon import Muon, orthogonalized


def exact(matrix: torch.Tensor) -> torch.Tensor:
    """Return U V^T of the singular value decomposition."""
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vt


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32), (3, 2, 48, 24)])
def test_newton_schulz_keeps_directions_and_makes_singular_values_about_one(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    got = orthogonalized(g)
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    inside = u.mT @ got @ vt.mT  # diagonal where the directions are kept
    values = inside.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inside, torch.diag_embed(values), atol=1e-9, rtol=0)
    large = s > 0.01 * g.norm(dim=(-2, -1))[..., None]
    assert values[large].min() > 0.68 and values.max() < 1.21
    assert (orthogonalized(g, 1).diagonal(dim1=-2, dim2=-1).abs().max()) < 0.9, "one step is not enough"


def trained(make, steps: int = 4, **options) -> list[torch.Tensor]:
    """Return the weights of two matrices after `steps` steps whose gradients do not depend on the weights."""
    gen = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(24, 16, generator=gen)) for _ in range(2)]
    optimizer = make(params, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon of its own")
def test_steps_are_those_of_torchs_own_muon():
    options = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}
    ours = trained(lambda params, **o: Muon([{"params": params}], **o), **options)
    theirs = trained(torch.optim.Muon, **options, adjust_lr_fn="match_rms_adamw")  # in bfloat16
    start = trained(torch.optim.Muon, 0)
    for a, b, c in zip(ours, theirs, start):
        assert (a - b).norm() < 0.03 * (b - c).norm()
    undamped = trained(lambda params, **o: Muon([{"params": params}], **o), **options | {"momentum": 0.5})
    assert (undamped[0] - theirs[0]).norm() > 0.1 * (theirs[0] - start[0]).norm()


def test_a_step_is_the_orthogonal_matrix_of_nesterovs_average():
    gen = torch.Generator().manual_seed(2)
    p = torch.nn.Parameter(torch.zeros(40, 10, dtype=torch.float64))
    optimizer, average = Muon([{"params": [p]}], lr=0.1, momentum=0.8), torch.zeros_like(p)
    for _ in range(3):
        before, p.grad = p.detach().clone(), torch.randn(p.shape, generator=gen, dtype=torch.float64)
        optimizer.step()
        average = 0.8 * average + 0.2 * p.grad
        step = (before - p) / (0.1 * 0.2 * 40**0.5)
        assert (step - exact(0.2 * p.grad + 0.8 * average)).norm() < 0.35 * step.norm()
        torch.testing.assert_close(step, orthogonalized(0.2 * p.grad + 0.8 * average))


def test_stacked_matrices_are_orthogonal_one_by_one():
    gen = torch.Generator().manual_seed(3)
    stacked = torch.nn.Parameter(torch.zeros(30, 10))
    apart = [torch.nn.Parameter(torch.zeros(10, 10)) for _ in range(3)]
    stacked.grad = torch.randn(30, 10, generator=gen)
    for p, grad in zip(apart, stacked.grad.chunk(3)):
        p.grad = grad.clone()
    Muon([{"params": [stacked], "stack": 3}], lr=0.1).step()
    Muon([{"params": apart}], lr=0.1).step()
    torch.testing.assert_close(stacked.data, torch.cat([p.data for p in apart]))
    together = torch.nn.Parameter(torch.zeros(30, 10))
    together.grad = stacked.grad
    Muon([{"params": [together]}], lr=0.1).step()
    assert (together - stacked).norm() > 0.1 * stacked.norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_without_a_finite_gradient_changes_nothing(bad):
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([{"params": [p]}], lr=0.1, weight_decay=0.1)
    p.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(4))
    optimizer.step()
    before, momentum = p.detach().clone(), optimizer.state[p]["momentum"].clone()
    p.grad = torch.full((4, 4), bad)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(p, before) and torch.equal(optimizer.state[p]["momentum"], momentum)


def test_a_parameter_without_a_gradient_stays():
    p = torch.nn.Parameter(torch.ones(4, 4))
    Muon([{"params": [p]}], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(p, torch.ones(4, 4))
