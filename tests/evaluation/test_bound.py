"""The held-out bound: the mean over draws that differ, and its standard error over sequences."""

import math

import numpy as np
import pytest
import torch

from cadd_min.baselines.dispatch import bound
from cadd_min.evaluation.bound import held_out_bound, summary
from cadd_min.model import MODELS
from cadd_min.utils.device import seeded
from tests.toys import batch, nano, rng


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("steps", [4, None])
def test_each_draw_has_a_noise_of_its_own(model, steps):
    """Compare with the mean of the bounds of the six generators (batch, draw), which all differ."""
    net = nano(model)
    torch.nn.init.normal_(net.head.weight, std=0.3, generator=rng(0))
    batches, rows = [batch(index) for index in range(2)], []
    for index, held_out in enumerate(batches):
        draws = [bound(net, held_out, steps=steps, generator=seeded(5, 3 * index + n)) for n in range(3)]
        rows.append(torch.stack([torch.stack([*parts], -1).double() for parts in draws]))  # (3, B, 2)
        assert all(torch.equal(rows[-1][0], row) == (model == "ar") for row in rows[-1][1:])
    measured = held_out_bound(net, batches, steps=steps, repeat=3, seed=5, dtype="float32")
    torch.testing.assert_close(measured, torch.cat([row.mean(0) for row in rows]))
    assert model == "ar" or not torch.equal(rows[0], rows[1])


def test_the_standard_error_is_over_sequences():
    nats = torch.rand(50, 2, generator=rng(0)).double()
    expected = summary(nats, per=7.0)
    values = nats.sum(1).numpy() / 7
    assert expected["bound"] == pytest.approx(values.mean())
    assert expected["standard error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(50))
    assert expected["of it tokens"] + expected["of it latents"] == pytest.approx(expected["bound"])
    assert expected["of it tokens"] == pytest.approx(float(nats[:, 0].mean()) / 7)
    assert math.isnan(summary(nats[:1], per=1.0)["standard error"])
