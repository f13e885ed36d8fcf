"""What holds of every model and every function that draws: the callback, the generator, the defaults."""

import functools
import inspect
import itertools
import math

import numpy as np
import pytest
import torch

from cadd_min import ops
from cadd_min.baselines import dispatch, sedd, udm
from cadd_min.data.batches import EpochShuffle, ImageBatches, PairBatches, TextBatches
from cadd_min.data.pixels import Pixels
from cadd_min.dit import DiT
from cadd_min.forward import q_sample, q_step
from cadd_min.kernels import philox
from cadd_min.loss import nelbo_parts, stratified_times, time_weights, token_losses
from cadd_min.model import MODELS
from cadd_min.objective import with_wrong_hints
from cadd_min.orders import HITTING, Sampling, cosine_temperature
from cadd_min.posterior import q_posterior_sample
from cadd_min.reverse import ZHATS, reverse_rows, token_probs
from cadd_min.sampler import first_tokens, reverse_chain, sample
from cadd_min.schedule import NoiseSchedule
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.unet import UNet
from cadd_min.utils.errors import InputError
from tests.toys import NANO, PATCHES, UNET, batch, nano, randomized, rng


@pytest.mark.parametrize("model", MODELS)
def test_a_callback_sees_every_step(model):
    """Check a step's number, times, tokens, latents, what is fresh, and the belief, from a prompt with two tokens."""
    net, steps, prompt = randomized(nano(model), 0.1), [], torch.full((3, 12), 11)
    prompt[:, 4:6] = torch.tensor([7, 2])
    settings = Sampling(steps=5, num_latents=1 if model in dispatch.MODULES else 2, temperature=2.0)
    x = dispatch.draw(net, 3, settings, prompt=prompt, generator=rng(0), callback=steps.append)
    before = prompt
    count = 10 if model == "ar" else 5
    assert len(steps) == count and torch.equal(steps[-1].x, x)
    places = [i for i in range(12) if i not in (4, 5)]
    for n, step in enumerate(steps):
        if model == "ar":
            assert (step.number, step.t, step.s) == (places[n], 1 - places[n] / 12, 1 - (places[n] + 1) / 12)
        else:
            assert (step.number, step.t, step.s) == pytest.approx((n, 1 - n / 5, 1 - (n + 1) / 5))
        assert step.z.shape == (settings.num_latents, 3, 12, net.table().shape[1]) and step.z.device == x.device
        if model != "udm":  # whose tokens are noise at first, and change more than once
            assert torch.equal(step.fresh, (before == 11) & (step.x != 11))
        assert step.fresh.dtype == torch.bool and not step.fresh[:, 4:6].any()
        belief = step.belief()
        assert belief.shape == x.shape and (belief[:, 4:6] == prompt[:, 4:6]).all()
        assert ((belief >= 0) & (belief < 11))[:, : places[n] if model == "ar" else 12].all()
        before = step.x
    if model == "udm":
        assert all(torch.equal(b.fresh, b.x != a.x) for a, b in itertools.pairwise(steps))
    assert steps[0].x is not steps[1].x and not torch.equal(steps[0].x, x)  # a copy, not the tensor that changes


def test_ar_draws_each_token_by_the_words_of_its_place():
    """Compare a sample with one that is made token by token: inverse CDF at the place's uniform, at the time's tau."""
    net, seed, tau = randomized(nano("ar"), 0.1), ops.draw_seed(rng(3)), lambda t: 0.5 + t
    x = dispatch.draw(net, 3, Sampling(temperature=tau, top_p=0.9), generator=rng(3))
    expected = torch.zeros(3, 0, dtype=torch.int64)
    for i in range(12):
        inputs = torch.cat([torch.full((3, 1), 11), expected], 1)
        logits = net(inputs, torch.zeros(3, i + 1, 0), torch.zeros(3))[:, -1]
        cdf = token_probs(logits[None], 11, tau(1 - i / 12), 0.9).double().cumsum(-1)
        u = philox.choices(seed, 12 * torch.arange(3) + i)[1]
        expected = torch.cat([expected, (cdf <= (u * cdf[:, -1])[:, None]).sum(1, keepdim=True)], 1)
    assert torch.equal(x, expected)


def draws():
    """List every function that draws, as a function of a generator."""
    x, t, s = torch.randint(5, (3, 40), generator=rng(0)), torch.full((3,), 0.7), torch.full((3,), 0.4)
    z, schedule, masked = torch.randn(3, 40, 4, generator=rng(1), dtype=torch.float64), NoiseSchedule(), x.clone()
    masked[:, ::2] = 5
    return {
        "q_sample": lambda g: q_sample(x, z, t, schedule, 5, generator=g),
        "q_step": lambda g: q_step(masked, z, s, t, schedule, 5, generator=g),
        "q_posterior_sample": lambda g: q_posterior_sample(masked, z, x, 2 * z, s, t, schedule, 5, generator=g),
        "with_wrong_hints": lambda g: (with_wrong_hints(x, 0.5, 5, g),),
        "stratified_times": lambda g: (stratified_times(8, g),),
        "draw_seed": lambda g: (ops.draw_seed(g),),
        "masked_at": lambda g: (sedd.masked_at(x, t, schedule, g),),
        "udm.q_sample": lambda g: (udm.q_sample(x, t, schedule, 5, g),),
    }


@pytest.mark.parametrize("name", draws())
def test_what_is_drawn_depends_on_the_generator_alone(name):
    """Check that one seed draws one result, another seed another, and that torch's own generator is left alone.

    Everything must be on the device of the input: the default device has no values.
    """
    function, before = draws()[name], torch.get_rng_state()
    with torch.device("meta"):
        first, again, other = function(rng(7)), function(rng(7)), function(rng(8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(part.dtype in (torch.float64, torch.int64, torch.bool) for part in first)  # as precise as the input
    torch.manual_seed(3)
    own = function(None) if name != "with_wrong_hints" else function(torch.default_generator)
    torch.manual_seed(3)
    repeated = function(None) if name != "with_wrong_hints" else function(torch.default_generator)
    assert all(torch.equal(a, b) for a, b in zip(own, repeated))


def test_defaults_are_those_of_the_documentation():
    stream, images = np.arange(96), np.arange(96, dtype=np.uint8).reshape(16, 2, 3, 1)
    makers = [
        lambda **seed: TextBatches(stream, 6, 4, **seed),
        lambda **seed: PairBatches(stream.reshape(16, 6), np.zeros(16, int), 4, **seed),
        lambda **seed: ImageBatches(images, None, Pixels((2, 3, 1)), 4, **seed),
    ]
    for make in makers:
        first, chosen, other = (make(**seed)(0).x_0 for seed in ({}, {"seed": 0}, {"seed": 1}))
        assert torch.equal(first, chosen) and not torch.equal(first, other)
    assert inspect.signature(ImageBatches).parameters["flip"].default is False
    assert EpochShuffle(9, 0)(3)[1] == 0  # no shift
    makes = [(size.build, (4, 4, 1)) for size in (PATCHES, UNET)]
    makes += [(NANO.build, (12,)), (functools.partial(DiT, NANO), 12), (functools.partial(UNet, UNET), (4, 4, 1))]
    for make, shape in makes:
        names = [[name for name, _ in make(shape, *classes).named_parameters()] for classes in ((), (0,), (3,))]
        assert names[0] == names[1] and len(names[2]) == len(names[0]) + 1
    assert not any("rotary" in name for name in nano().state_dict())  # made anew from the sizes
    tau = cosine_temperature()  # the paper's
    assert (tau(1.0), tau(0.0)) == (pytest.approx(2.5), pytest.approx(1.0))


def test_sample_is_the_chain_with_these_settings():
    """Compare with `reverse_chain` for other settings and for the defaults: hard, one latent, temperature 1."""
    net = randomized(nano(), 0.1)
    chain = (net, (3, 12), net.table(), net.schedule, 11)
    for given in ({}, {"zhat": "soft", "num_latents": 3, "temperature": 0.3}):
        settings = Sampling(6, **{"zhat": "hard", "num_latents": 1} | given)
        expected = reverse_chain(*chain, settings, generator=rng(0))
        assert torch.equal(sample(*chain, steps=6, **given, generator=rng(0)), expected)
    other = reverse_chain(*chain, Sampling(6, num_latents=2), generator=rng(0))
    assert not torch.equal(sample(*chain, steps=6, generator=rng(0)), other)


@pytest.mark.parametrize("model", MODELS)
def test_one_free_place_is_filled_and_none_is_no_work(model):
    net, prompt = randomized(nano(model), 0.1), torch.randint(11, (1, 12), generator=rng(0))
    assert torch.equal(dispatch.draw(net, 1, Sampling(steps=4), prompt=prompt, generator=rng(1)), prompt)
    gap = prompt.index_fill(1, torch.tensor([7]), 11)
    x = dispatch.draw(net, 1, Sampling(steps=4), prompt=gap, generator=rng(1))
    assert torch.equal(x == gap, gap != 11) and x[0, 7] < 11


def test_a_step_per_token_is_refused_before_any_work():
    for net in (nano("cdm"), nano("sedd", discrete="all-at-once")):
        with pytest.raises(InputError, match="is not for cdm"):
            dispatch.check(net, Sampling(time_grid=HITTING))


def test_a_weighting_that_is_none_is_named():
    with pytest.raises(InputError, match=r"^weighting must be one of"):
        time_weights(torch.ones(2), NoiseSchedule(), "heavy")


def test_a_mask_without_a_row_in_the_table():
    """Check that the last token has its own latent where the mask has no row, and the mask's own where it has."""
    p = torch.eye(4)  # sure of a token at each of four places
    u = (torch.tensor([0.0, 0.9, 0.0, 0.0]), torch.full((4,), 0.5), torch.full((1, 4), 0.5))
    z = torch.zeros(1, 4, 3)
    for rows in (4, 5):
        table = torch.randn(rows, 3, generator=rng(0))
        x, z_s = reverse_rows(p, z, table, torch.tensor([0.5, 1.0, 0.0, 0.0]), 4, "hard", u, z)
        assert x.tolist() == [0, 4, 2, 3] and torch.equal(z_s[0], table[:4])


def test_a_prompt_of_small_numbers_may_have_masks_without_a_row():
    """Check that x_1 is a copy in int64, and that a table (V,) is named."""
    prompt, table = torch.tensor([[1, 4, 0]], dtype=torch.int32), torch.zeros(4, 3)
    x = first_tokens((1, 3), 4, prompt, table)
    assert x.tolist() == prompt.tolist() and x.dtype == torch.int64
    same = first_tokens((1, 3), 4, x, table)
    assert same is not x and torch.equal(same, x)
    with pytest.raises(InputError, match=r"^table must be \(V, D\), not \(4,\)$"):
        first_tokens((1, 3), 4, prompt, table[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_latents_keep_the_dtype_of_the_table(dtype):
    """Check a chain and a bound with latents of each dtype, and logits of another."""
    table, logits = torch.randn(6, 3, generator=rng(0)).to(dtype), torch.randn(2, 7, 5, generator=rng(1))
    shown, steps, schedule = [], [], NoiseSchedule()

    def denoiser(x, z, t):
        shown.extend([z, t])
        return logits.repeat(len(x) // 2, 1, 1)

    for zhat in ZHATS:
        settings = Sampling(4, zhat, 2, remask=0.3)
        reverse_chain(denoiser, (2, 7), table, schedule, 5, settings, generator=rng(2), callback=steps.append)
    assert all((step.belief() <= 5).all() and step.z.dtype == dtype for step in steps)
    x_0 = torch.randint(5, (2, 7), generator=rng(3))
    bound = nelbo_parts(denoiser, x_0, table, schedule, 5, generator=rng(4))
    assert bound.discrete.dtype == dtype and {part.dtype for part in shown} == {dtype}
    rows, head, target = torch.ones(4, 3).to(dtype), torch.ones(5, 3).to(dtype), torch.zeros(4, dtype=torch.int64)
    assert token_losses(rows, head, target)[0].dtype == torch.promote_types(dtype, torch.float32)
    t, z = torch.full((2,), 0.7), table[x_0]
    _, z_s = q_posterior_sample(torch.full_like(x_0, 5), z, x_0, z, t / 2, t, schedule, 5, generator=rng(5))
    assert z_s.dtype == dtype and q_sample(x_0, z, t, schedule, 5, generator=rng(5))[1].dtype == dtype


@pytest.mark.parametrize("model", MODELS)
def test_the_number_of_steps_is_that_of_the_chain(model):
    net, by_token = randomized(nano(model), 0.1), 12
    assert dispatch.steps_of(net, Sampling(steps=7)) == (by_token if model == "ar" else 7)
    assert dispatch.steps_of(net, Sampling(steps=7, time_grid=HITTING)) == by_token


def test_a_trainer_counts_its_weights_and_measures_its_table():
    fit = Trainer(nano(latent_norm=2.5), batch, TrainConfig(batch_size=8, dtype="float32"))
    assert fit.parameters() == sum(math.prod(p.shape) for p in fit.model.parameters())
    assert fit.latent_norm() == pytest.approx(2.5, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 3, None])
@pytest.mark.parametrize("model", MODELS)
def test_a_bound_is_that_of_its_model_and_steps(model, steps):
    """Compare with the model's own bound for the same noise. Power: one step more costs another bound."""
    net, data = randomized(nano(model), 0.1), batch(3)
    chain = (data.x_0,) if model in dispatch.MODULES else (data.x_0, net.table(), net.schedule, net.mask_id)
    own = dispatch.MODULES[model].nelbo_parts if model in dispatch.MODULES else nelbo_parts
    expected = own(net, *chain, steps=steps, generator=rng(4))
    for mine, part in zip(dispatch.bound(net, data, steps=steps, generator=rng(4)), expected, strict=True):
        assert torch.equal(mine, part) and part.shape == (8,)
    other = dispatch.bound(net, data, steps=2, generator=rng(4))
    assert torch.equal(other.discrete, expected.discrete) == (model == "ar")
