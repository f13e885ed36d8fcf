"""The training step is the plain step of plain.py, in weights and averages, for every setting that changes it."""

import dataclasses
import math

import pytest
import torch

from cadd_min import dit
from cadd_min.dit import PatchSize
from cadd_min.loss import nelbo_parts, stratified_times
from cadd_min.objective import Batch
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.utils.device import seeded
from tests.toys import images, nano, randomized, rng
from tests.training.plain import plain_loss, plain_steps

COMMON = {"batch_size": 5, "steps": 8, "warmup": 1, "lr": 3e-3, "dtype": "float32"}
LARGER = {"mse": 0.5, "wrong_hints": 0.5, "drop_latent": 0.3, "accumulate": 3}
CASES = [  # model, data, settings
    *[(model, "text", settings) for model in ("cadd", "mdlm") for settings in ({}, {"weighting": "elbo", **LARGER})],
    ("cdm", "text", {}),
    ("cdm", "text", {"weighting": "elbo", **LARGER}),
    ("cadd", "given", {"mse": 0.5, "accumulate": 2}),
    ("cadd", "labels", {"drop_label": 0.4}),
    ("cadd", "bayes", {"mse": 0.5}),
    *[
        ("cadd", "text", {name: value})
        for name, value in {
            "wrong_hints": 0.0, "lr": 1e-3, "warmup": 0, "final_lr": 0.5, "weight_decay": 2.0, "clip": 0.02, "ema": 0.2,
            "seed": 3, "steps": 4, "batch_size": 3,
        }.items()
    ],
]  # fmt: skip


def tokens(index: int) -> torch.Tensor:
    return torch.randint(11, (5, 12), generator=rng(100 + index))


def labelled(index: int) -> Batch:
    return Batch(torch.randint(17, (5, 16), generator=rng(index)), torch.arange(5) % 3)


def given(index: int) -> Batch:
    """Make a batch whose first tokens are given: as many as the row says, and some are the mask itself."""
    x_0, free = tokens(index), torch.arange(12) >= torch.arange(1, 6)[:, None]
    return Batch(torch.where(~free & (x_0 < 3), 11, x_0), free=free)


def network(model: str, data: str) -> torch.nn.Module:
    """Make a network in float64 with all weights random: a new one has no gradient behind its head of zeros."""
    if data == "labels":
        net = images(PatchSize(2, 16, 2, embed=8, patch=2, cond=16), (4, 4, 1), classes=3)
    else:
        net = nano(model, bayes_head=data == "bayes", head_bias=data == "bayes")
    return randomized(net, 0.2, embedding=1.0).double()


def both(model: str, data: str, settings: dict, steps: int = 3) -> list[tuple[dict, dict, list]]:
    """Make steps with the trainer, and with the plain one. Returns the weights, their averages and the measures."""
    batches = {"given": given, "labels": labelled}.get(data, lambda index: Batch(tokens(index)))
    config = TrainConfig(**(COMMON | settings))
    read = lambda index: Batch(*(part if part is None else part[: config.batch_size] for part in batches(index)))
    trained, plain = Trainer(network(model, data), read, config), network(model, data)
    rows = [trained.train_step() for _ in range(steps)]
    averages, plain_rows = plain_steps(plain, read, config, steps)
    return [
        (dict(trained.model.named_parameters()), dict(trained.ema.named_parameters()), rows),
        (dict(plain.named_parameters()), averages, plain_rows),
    ]


@pytest.fixture(autouse=True)
def _exact_attention(monkeypatch):
    """Attend in float64. In float32, rounding gives key biases a gradient, which is zero, and AdamW makes it large."""
    precise = lambda q, k, v, causal: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    monkeypatch.setattr(dit, "attend", precise)


def close(a: dict, b: dict, tolerance: float = 1e-6) -> bool:
    assert a.keys() == b.keys()
    return all(torch.allclose(a[name], b[name].to(a[name]), rtol=tolerance, atol=tolerance) for name in a)


@pytest.mark.parametrize("model, data, settings", CASES, ids=str)
def test_three_steps_are_the_plain_steps(model, data, settings):
    """Compare weights, averages and measures, in float64 up to the loss's float32 weights.

    Power: a setting is checked only if it changes the weights or the averages, so that a step without it must fail.
    """
    ours, plain = both(model, data, settings)
    assert close(ours[0], plain[0]) and close(ours[1], plain[1])
    assert all(close(row, expected) for row, expected in zip(ours[2], plain[2]))
    if settings:
        _, without = both(model, data, {})
        assert not (close(ours[0], without[0], 1e-5) and close(ours[1], without[1], 1e-5))


def test_a_restored_trainer_goes_on_with_the_plain_steps():
    """Take over the state of two steps and make two more: a fixed point that does not come from the trainer."""
    config, read = TrainConfig(**COMMON, accumulate=2), lambda index: Batch(tokens(index))
    before, after, plain = (Trainer(network("cadd", "text"), read, config) for _ in range(3))
    before.train_step(), before.train_step()
    after.load_state_dict(before.state_dict())
    after.train_step(), after.train_step()
    averages, _ = plain_steps(plain.model, read, config, 4)
    assert close(dict(after.ema.named_parameters()), averages)


@pytest.mark.parametrize("data", ["text", "given", "labels"])
def test_evaluation_is_of_the_averages_without_wrong_hints(data):
    """Compare the CE with the plain CE, and the bound with `nelbo_parts`. The weights themselves are NaN."""
    batches = {"text": lambda index: Batch(tokens(index)), "given": given, "labels": labelled}[data]
    config = TrainConfig(**COMMON, mse=0.5, wrong_hints=0.9, drop_latent=0.9, drop_label=0.9, seed=4)
    fit, held_out = Trainer(network("cadd", data), batches, config), [batches(index) for index in (50, 51)]
    fit.train_step()
    with torch.no_grad():
        for weight in fit.model.parameters():
            weight.fill_(math.nan)
    quiet, sums, bounds = dataclasses.replace(config, wrong_hints=0, drop_latent=0, drop_label=0), [], []
    for index, (x_0, label, free) in enumerate(held_out):
        gen = seeded(config.seed + 1, index)
        u = stratified_times(5, gen)
        sums.append(plain_loss(fit.ema, held_out[index], u, quiet, gen)[1:3])
        denoiser = fit.ema if label is None else lambda x, z, t, label=label: fit.ema(x, z, t, label)
        chain = (fit.ema.table(), fit.ema.schedule, fit.ema.mask_id)
        bounds.append(nelbo_parts(denoiser, x_0, *chain, free=free, generator=gen))
    ce, masked = (float(sum(column)) for column in zip(*sums))
    tokens_scored = sum(int(torch.ones_like(x_0).sum() if free is None else free.sum()) for x_0, _, free in held_out)
    discrete, continuous = (float(sum(part.sum() for part in parts)) / tokens_scored for parts in zip(*bounds))
    assert fit.evaluate(held_out) == pytest.approx({
        "val_ce": ce / masked, "val_bound": discrete + continuous,
        "val_bound_discrete": discrete, "val_bound_continuous": continuous,
    })  # fmt: skip


def test_where_nothing_is_masked_the_error_is_zero():
    """Evaluate one free token, which half of the seeds leave unmasked: a mean over nothing is 0."""
    one, errors = Batch(tokens(1)[:1], free=torch.arange(12)[None] == 4), []
    for seed in range(8):
        fit = Trainer(network("cadd", "text"), lambda index: one, TrainConfig(**COMMON, seed=seed))
        errors.append(fit.evaluate([one])["val_ce"])
    assert 0 < errors.count(0.0) < 8 and min(errors) == 0


@pytest.mark.parametrize("masked", [0, 1, 4])
def test_what_is_logged_is_a_mean_over_the_masked(masked, monkeypatch):
    fit = Trainer(network("cadd", "text"), lambda index: Batch(tokens(index)), TrainConfig(**COMMON))
    sums = {"ce": torch.tensor(6.0), "mse": torch.tensor(3.0), "masked": torch.tensor(masked)}
    monkeypatch.setattr(fit, "backward", lambda: sums)
    logged, count = fit.train_step(), max(1, masked)
    assert (logged["ce"], logged["mse"]) == (6 / count, 3 / count)


def test_every_setting_is_among_the_cases():
    named = {name for _, _, settings in CASES for name in settings}
    assert named | {"dtype", "compile", "shard"} == {field.name for field in dataclasses.fields(TrainConfig)}
