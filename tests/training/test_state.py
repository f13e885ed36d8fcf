"""The trainer's state and settings: what is saved, what is refused, and what a step asks of the data."""

import copy
import dataclasses
import math
import re
import threading

import pytest
import torch

from cadd_min.baselines import sedd
from cadd_min.loss import stratified_times
from cadd_min.training.distributed import World, can_shard, world
from cadd_min.training.trainer import TrainConfig, Trainer, check_settings, learning_rate
from cadd_min.utils.device import DTYPES, seeded
from cadd_min.utils.errors import InputError
from tests.toys import batch, nano, trainer
from tests.training.plain import plain_loss


@pytest.mark.parametrize("best", ["float32", "bfloat16"])
def test_auto_is_the_best_dtype_of_the_device(best, monkeypatch):
    monkeypatch.setattr("cadd_min.training.trainer.best_dtype", lambda device: best if device.type == "cpu" else None)
    assert trainer(dtype="auto").dtype == best and trainer(dtype="float32").dtype == "float32"


def test_a_trainer_asks_for_its_own_models_loss():
    """Compare with the baseline's loss, and refuse what a cdm refuses."""
    fit, u = trainer("sedd"), stratified_times(8, seeded(0, 0))
    (total, *_), own = fit.training_loss(fit.model, batch(0), u, fit.config, seeded(0, 1)), sedd.training_loss
    assert torch.equal(total, own(fit.model, batch(0), u, fit.config, seeded(0, 1)).total)
    with pytest.raises(InputError, match="gives the CE of a cdm no weight"):
        trainer("cdm", weighting="elbo")


@pytest.mark.skipif(not can_shard(torch.device("cpu")), reason="shard on a CPU needs torch 2.7")
@pytest.mark.parametrize("shard", [True, False])
def test_a_world_of_one_process_makes_the_steps_of_no_world(shard, monkeypatch):
    """Start one process as torchrun does: two steps, the state, and two more after it is taken over, are the same.

    The weights of a sharded run are DTensors, and its checkpoint holds plain tensors.
    """
    started = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free port
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    settings = {"batch_size": 8, "dtype": "float32", "accumulate": 3, "drop_latent": 0.2, "clip": 0.5}
    plain = Trainer(nano(), batch, TrainConfig(**settings))
    with world("cpu") as alone:
        before, after = (Trainer(nano(), batch, TrainConfig(**settings, shard=shard), alone) for _ in range(2))
        assert all(hasattr(p, "full_tensor") == shard for p in (*before.model.parameters(), *before.ema.parameters()))
        before.train_step(), before.train_step()
        after.load_state_dict(before.state_dict())
        norms = [after.train_step()["grad_norm"] for _ in range(2)]
        states, error = after.state_dict(), after.evaluate([batch(9)])["val_bound"]
    expected = [plain.train_step()["grad_norm"] for _ in range(4)][2:]
    torch.testing.assert_close(norms, expected)
    whole = plain.state_dict()
    for part in ("model", "ema"):
        assert all(type(v) is torch.Tensor for v in states[part].values())
        torch.testing.assert_close(dict(states[part]), dict(whole[part]))
    torch.testing.assert_close(states["optimizer"]["state"], whole["optimizer"]["state"])
    assert error == pytest.approx(plain.evaluate([batch(9)])["val_bound"], rel=1e-4)


def test_the_state_is_all_that_a_step_depends_on():
    """Check the names and values of the state after two steps, and that it is taken over in full."""
    fit = trainer(accumulate=3, steps=9)
    fit.train_step(), fit.train_step()
    fit.skipped = torch.tensor(4.0)
    state = fit.state_dict()
    assert set(state) == {"model", "ema", "optimizer", "step", "seen", "skipped"}
    assert (state["step"], state["seen"], state["skipped"]) == (2, 2 * 3 * 8, 4)
    other = trainer(accumulate=3, steps=9, weight_decay=0.5, options={"seed": 7})
    other.load_state_dict(copy.deepcopy(state))
    assert (other.step, other.sequences, int(other.skipped)) == (2, 48, 4)
    for part in ("model", "ema"):
        assert state[part].keys() == getattr(other, part).state_dict().keys()
        assert all(torch.equal(value, state[part][name]) for name, value in getattr(other, part).state_dict().items())
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.5, 0.0]  # the settings' own
    moments = other.optimizer.state_dict()["state"]
    assert moments.keys() == state["optimizer"]["state"].keys()
    for n, values in state["optimizer"]["state"].items():
        assert all(torch.equal(moments[n][key], value) for key, value in values.items()) and values["step"] == 2
    other.train_step()
    assert state["optimizer"]["state"][0]["step"] == 2  # the caller's tensors stay as they are


@pytest.mark.parametrize("name", ["step", "seen", "skipped"])
def test_numbers_that_cannot_be_are_refused(name):
    fit = trainer(steps=9)
    state = fit.state_dict()
    fit.load_state_dict(state | {name: 2**63 - 1})
    for wrong in (-1, 2**63, 1.0, True, None):
        with pytest.raises(ValueError, match=f"^{name} is {wrong!r}$"):
            fit.load_state_dict(state | {name: wrong})


@pytest.mark.parametrize("damage", ["shape", "missing", "more"])
def test_moments_of_another_optimiser_are_refused(damage):
    fit = trainer(steps=9)
    fit.train_step()
    state = copy.deepcopy(fit.state_dict())
    moments = state["optimizer"]["state"][1]
    if damage == "shape":
        moments["exp_avg"] = torch.zeros(3, 5)
    elif damage == "missing":
        del moments["exp_avg_sq"]
    else:
        moments["max_exp_avg_sq"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^the optimiser's moments of parameter 1 have the shapes \{'step'"):
        fit.load_state_dict(state)


def test_a_frozen_weight_is_no_copy_and_tied_weights_have_both_names():
    """Check that a frozen weight is its own average, that a tied one is saved by two names, and neither is trained."""
    net = nano()
    net.head.weight.requires_grad_(False)
    net.tied = net.embedding
    fit = Trainer(net, batch, TrainConfig(batch_size=8, dtype="float32"))
    assert fit.ema.head.weight is net.head.weight and fit.ema.embedding.weight is not net.embedding.weight
    torch.nn.init.normal_(net.head.weight)
    before = net.head.weight.clone()
    fit.train_step()
    assert torch.equal(net.head.weight, before) and torch.equal(fit.ema.head.weight, before)
    state = fit.state_dict()
    for part in ("model", "ema"):
        assert torch.equal(state[part]["tied.weight"], state[part]["embedding.weight"])
        assert torch.equal(state[part]["head.weight"], before)
    trained = [p for group in fit.optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in trained}) == len(trained) == len(list(net.parameters())) - 1


def test_one_tensor_that_is_gathered_is_gathered_once(monkeypatch):
    """Count the tensors that `unsharded` is asked for: tied and frozen ones must not travel twice."""
    import cadd_min.training.trainer as module

    net, asked = nano(), []
    net.head.weight.requires_grad_(False)
    net.tied = net.embedding
    fit = Trainer(net, batch, TrainConfig(batch_size=8, dtype="float32"), World(torch.device("cpu")))
    unsharded = module.unsharded
    monkeypatch.setattr(module, "unsharded", lambda value, keep=None: asked.append((value, keep)) or unsharded(value))
    fit.state_dict()
    assert [keep for _, keep in asked] == [True, True, True]  # the only process is the first
    model, ema, _ = (set(value) for value, _ in asked)
    assert "embedding.weight" in model and "tied.weight" not in model and "head.weight" in model
    assert "embedding.weight" in ema and "tied.weight" not in ema and "head.weight" not in ema


@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_micro_batch_is_read_once_and_ahead(accumulate):
    """Check the indices that the data is asked for: in order, none twice, one ahead, by another thread."""
    asked = []

    def data(index):
        asked.append((index, threading.current_thread() is threading.main_thread()))
        return batch(index)

    fit = trainer(data=data, accumulate=accumulate, steps=9)
    for _ in range(3):
        fit.train_step()
    fit._reader.shutdown(wait=True)
    assert asked == [(index, False) for index in range(3 * accumulate + 1)]
    fit._reader = type(fit._reader)(1)
    fit.sequences = 10 * 8 * accumulate  # as after a resume: what was read ahead is of no use
    fit.train_step()
    fit._reader.shutdown(wait=True)
    assert [index for index, _ in asked[3 * accumulate + 1 :]] == list(range(10 * accumulate, 11 * accumulate + 1))


def test_a_model_hears_of_each_step():
    fit, heard = trainer(steps=9), []
    for name, model in (("model", fit.model), ("ema", fit.ema)):
        model.at_step = lambda step, name=name: heard.append((name, step))
    fit.train_step(), fit.train_step()
    assert heard == [("model", 0), ("ema", 0), ("model", 1), ("ema", 1)]


def test_a_process_takes_its_micro_batches_by_turns():
    """Check the second of two processes, without the first: what it reads, and its gradient, by the plain loss."""
    asked = []
    data = lambda index: asked.append(index) or batch(index)
    fit = trainer(data=data, accumulate=4, steps=9)
    fit.world = World(torch.device("cpu"), rank=1, size=2)
    fit.backward()
    u = stratified_times(32, seeded(0, 0, use=1)).view(4, 8)
    losses = [plain_loss(fit.model, batch(i), u[i], fit.config, seeded(0, i))[0] for i in (1, 3)]
    expected = torch.autograd.grad(sum(losses) / 2, [*fit.model.parameters()], materialize_grads=True)
    for weight, gradient in zip(fit.model.parameters(), expected):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)
    fit.sequences = 4 * 8
    fit.backward()
    fit._reader.shutdown(wait=True)
    assert asked == [1, 3, 5, 7, 9]


def test_settings_that_do_not_fit_are_named():
    config = TrainConfig(accumulate=3)
    check_settings(config, "cdm", 3)
    message = "accumulate 3: must be a multiple of the 2 processes that share it"
    with pytest.raises(InputError, match=f"^{message}$"):
        check_settings(config, "cadd", 2)
    elbo = dataclasses.replace(config, weighting="elbo")
    for model, mse in (("cadd", 0.0), ("cdm", 0.5)):
        check_settings(dataclasses.replace(elbo, mse=mse), model, 3)
    with pytest.raises(InputError, match=r"^weighting elbo gives the CE of a cdm no weight at all: set mse to 1, or"):
        check_settings(elbo, "cdm", 1)


RANGES = {  # the least and the largest value that is allowed, and values beyond; None: no end
    "steps": (1, None, [0]), "batch_size": (1, None, [0]), "accumulate": (0, None, [-1]),
    "ema": (0.0, 1.0, [-0.1, 1.1, math.nan]), "final_lr": (0.0, 1.0, [-0.1, 1.1, math.nan]),
    "warmup": (0, None, [-1, math.inf, math.nan]), "weight_decay": (0.0, None, [-0.1, math.inf, math.nan]),
    "seed": (0, None, [-1]), "lr": (1e-9, None, [0.0, -1.0, math.inf, math.nan]),
    "clip": (1e-9, None, [0.0, math.inf, math.nan]), "mse": (0.0, None, [-0.1, math.inf, math.nan]),
    "wrong_hints": (0.0, 1.0, [-0.1, 1.1, math.nan]), "drop_latent": (0.0, 1.0, [-0.1, 1.1, math.nan]),
    "drop_label": (0.0, 1.0, [-0.1, 1.1, math.nan]),
}  # fmt: skip


@pytest.mark.parametrize("name", RANGES)
def test_settings_have_ranges(name):
    least, most, wrong = RANGES[name]
    for value in (least, 1 if most is None else most):
        assert getattr(TrainConfig(**{name: value}), name) == value
    kinds = {0: "0 or more", 1: "at least 1", 1e-9: "greater than 0"}
    said = "between 0 and 1" if most else "at least 0" if name == "accumulate" else kinds[least]
    for value in wrong:
        with pytest.raises(InputError, match=f"^{name} must be {said}, not {re.escape(str(value))}$"):
            TrainConfig(**{name: value})


def test_names_of_settings_are_listed():
    with pytest.raises(InputError, match=f"^dtype must be one of auto, {', '.join(DTYPES)}, not 'int8'$"):
        TrainConfig(dtype="int8")
    with pytest.raises(InputError, match=r"^weighting must be one of uniform, elbo, not 'x'$"):
        TrainConfig(weighting="x")


def test_the_rate_goes_to_its_end_and_stays_there():
    """Check the rate before, in and after the run: a run of warm-up alone divides by no zero."""
    config = TrainConfig(steps=12, warmup=4, lr=1.0, final_lr=0.2)
    rates = [learning_rate(step, config) for step in (0, 3, 4, 8, 12, 50)]
    assert rates == pytest.approx([0.25, 1.0, 1.0, 0.6, 0.2, 0.2])
    assert learning_rate(4, dataclasses.replace(config, steps=4)) == 1.0
    assert learning_rate(5, dataclasses.replace(config, steps=5)) == pytest.approx(0.2)
