"""Every tensor is made on the device of the input: what a GPU needs is checked without a GPU.

The default device is "meta" here, whose tensors have no values, and the models and the data are on the CPU. A tensor
that is made without a word of its device cannot be combined with them.
"""

import pytest
import torch

from cadd_min.baselines.dispatch import bound, draw, training_loss
from cadd_min.loss import stratified_times
from cadd_min.model import BASELINES, MODELS, Guided
from cadd_min.objective import Batch, Objective
from cadd_min.orders import HITTING, ORDERS, Sampling
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.unet import UNetSize
from tests.toys import batch, images, nano, rng

CORE = ("cadd", "mdlm", "cdm")
PLANS = [{"order": order, "block": 4, "remask": 0.2} for order in ORDERS]
PLANS += [{"remask": 0.3, "top_p": 0.7}, {"time_grid": "cosine", "temperature": 0.0}]
CHAINS = [(model, {"zhat": zhat, "num_latents": 2}) for model in CORE for zhat in ("hard", "soft", "sample")]
CHAINS += [(model, plan) for model in (*CORE, "sedd") for plan in PLANS]
CHAINS += [(model, {"time_grid": HITTING}) for model in ("cadd", "mdlm", "sedd")]
CHAINS += [(model, {"top_p": 0.7}) for model in BASELINES]


def on_meta(f, *args, **options):
    with torch.device("meta"):
        return f(*args, **options)


def test_a_tensor_without_a_device_is_caught():
    """Power: combine a tensor of the default device with a tensor of the CPU."""
    with pytest.raises(RuntimeError, match="device"):
        on_meta(lambda x: x + torch.arange(3), torch.zeros(3))


@pytest.mark.parametrize("model", MODELS)
def test_losses_and_bounds(model):
    net, data, gen = nano(model), batch(0), rng(0)
    u = stratified_times(8, rng(1))
    objective = Objective(mse=1.0, weighting="elbo", wrong_hints=0.5, drop_latent=0.5)
    loss = on_meta(training_loss(model), net, data, u, objective, gen)
    on_meta(loss.total.backward)
    assert all(part.device.type == "cpu" for part in loss)
    for steps in (3, None):
        assert all(part.isfinite().all() for part in on_meta(bound, net, data, steps=steps, generator=gen))
    if model in CORE:
        free = torch.rand(8, 12, generator=rng(2)) < 0.5
        assert on_meta(bound, net, Batch(data.x_0, free=free), generator=gen).discrete.isfinite().all()


@pytest.mark.parametrize("model, settings", CHAINS, ids=str)
def test_chains(model, settings):
    chosen, steps, prompt = Sampling(steps=3, **settings), [], torch.full((3, 12), 11)
    prompt[:, 2:4] = 5
    x = on_meta(draw, nano(model), 3, chosen, prompt=prompt, generator=rng(0), callback=steps.append)
    assert (x < 11).all() and all(step.belief().shape == x.shape for step in steps)
    assert on_meta(draw, nano(model), 1, chosen, generator=rng(0)).shape == (1, 12)  # one alone


def test_images_with_classes():
    size = UNetSize(embed=4, channels=8, mults=(1, 2), blocks=1, attention=(4,), heads=1, dropout=0.0, cond=8)
    net, labels = images(size, classes=3), torch.tensor([0, 2])
    x_0 = torch.randint(17, (2, 64), generator=rng(0))
    u = stratified_times(2, rng(1))
    loss = on_meta(training_loss("cadd"), net, Batch(x_0, labels), u, Objective(drop_label=0.5), rng(2))
    assert loss.total.isfinite()
    for guidance in (0.0, 1.0, 2.0):
        guided = Guided(net, labels, guidance)
        assert on_meta(draw, net, 2, Sampling(steps=2), denoiser=guided, generator=rng(0)).shape == (2, 64)


@pytest.mark.parametrize("model", ["cadd", "udm"])
def test_a_training_step_and_an_evaluation(model):
    fit = Trainer(nano(model), batch, TrainConfig(batch_size=8, dtype="float32", drop_latent=0.1))
    assert on_meta(fit.train_step)["grad_norm"].isfinite()
    assert on_meta(fit.evaluate, [batch(1)])["val_bound"] > 0
