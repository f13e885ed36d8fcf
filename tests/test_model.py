"""The denoiser is its parts in order; its settings are checked; guidance is a straight line through two predictions."""

import dataclasses
import math

import pytest
import torch

from cadd_min.latent import evidence_norm, ordered_rows
from cadd_min.model import LARGEST, MODELS, Guided, ModelConfig
from cadd_min.utils.errors import InputError
from tests.toys import NANO, PATCHES, UNET, images, nano, randomized, rng


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", [{}, {"latent_dim": 5}, {"bayes_head": True, "head_bias": True}], ids=str)
def test_logits_are_made_of_the_parts(model, options):
    """Write out the logits: the fused input times the root of the width, backbone, head, Bayes' term, and bias."""
    net = randomized(nano(model, **options), 0.3)
    x, t = torch.randint(12, (2, 12), generator=rng(0)), torch.tensor([0.3, 0.9])
    z, w = torch.randn(2, 12, net.latent.dim, generator=rng(1)), net.table()
    masked = x == 11
    fused = net.latent.fuse(net.embedding.weight[x], z, masked, t)
    expected = net.backbone(math.sqrt(32) * fused, t) @ net.head.weight.T
    if options.get("bayes_head") and net.latent.dim:
        signal, noise = net.schedule.signal(t)[:, None, None], net.schedule.noise(t)[:, None, None]
        expected = expected + signal / noise**2 * z @ w[:11].T
    if options.get("head_bias"):
        expected = expected + net.head.bias
    torch.testing.assert_close(net(x, z, t), expected, rtol=1e-4, atol=1e-4)
    rows = torch.tensor([3, 0, 23])
    torch.testing.assert_close(net.logits_at(x, z, t, rows), expected.flatten(0, 1)[rows], rtol=1e-4, atol=1e-4)
    assert net.device == w.device and net.mask_id == 11
    assert len(net.blocks()) == 2 and all(block in net.backbone.blocks for block in net.blocks())


@torch.no_grad()
@pytest.mark.parametrize("model", ["cadd", "mdlm", "ar"])
def test_a_row_of_its_own_for_each_pair_of_neighbours(model):
    """Compare with loops over positions, where a mask stands beyond both ends, and count the rows.

    Power: each row of the table is drawn at random, so that two rows that are exchanged give another sum.
    """
    net = randomized(nano(model, vocab_size=4, neighbours=True), 0.3)
    places = [(-1, 0), (-2, -1)] if model == "ar" else [(-1, 1), (-2, -1), (1, 2)]
    assert net.neighbours.table.weight.shape == (25 * len(places), 32)
    table = net.neighbours.table.weight.view(len(places), 5, 5, 32)
    x = torch.randint(5, (3, 12), generator=rng(0))
    token = lambda row, i: row[i] if 0 <= i < 12 else 4
    pairs = lambda row, n: [table[k, token(row, n + i), token(row, n + j)] for k, (i, j) in enumerate(places)]
    expected = torch.stack([torch.stack([sum(pairs(row, n)) for n in range(12)]) for row in x])
    torch.testing.assert_close(net.neighbours(x), expected)
    t, z = torch.tensor([0.2, 0.5, 0.9]), torch.randn(3, 12, net.latent.dim, generator=rng(1))
    fused = net.latent.fuse(net.embedding.weight[x], z, x == 4, t)
    logits = net.backbone(math.sqrt(32) * (fused + expected), t) @ net.head.weight.T
    torch.testing.assert_close(net(x, z, t), logits, rtol=1e-4, atol=1e-4)


def test_neighbours_start_at_nothing():
    assert nano().neighbours is None and not nano(neighbours=True).neighbours.table.weight.any()


@torch.no_grad()
def test_bayes_term_is_held_where_there_is_no_noise():
    """Check that at t = 0 the term is signal / 1e-4 z_t, and not infinite."""
    net = nano(bayes_head=True)
    z = torch.randn(1, 12, 32, generator=rng(0))
    logits = net(torch.full((1, 12), 11), z, torch.zeros(1))
    torch.testing.assert_close(logits, 1e4 * z @ net.table()[:11].T, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("model", MODELS)
def test_a_new_model_has_its_latent_and_starts_with_equal_logits(model):
    net = nano(model, vocab_size=500, latent_dim=7, evidence=0.3, hint_unit=0.5)
    assert net.latent.dim == (7 if model in ("cadd", "cdm") else 0)
    assert net.latent.norm == evidence_norm(500, net.schedule, 0.3, net.latent.dim) and net.latent.unit == 0.5
    assert nano(model, latent_norm=1.5).latent.norm == 1.5
    assert (net.head.weight == 0).all() and net.head.bias is None
    assert (nano(model, head_bias=True).head.bias == 0).all()
    lengths = net.embedding.weight.norm(dim=1)
    assert net.embedding.weight.shape == (501, 32) and float(lengths.detach().mean()) == pytest.approx(1, abs=0.03)
    assert nano("cadd").latent.dim == 32  # as wide as the embedding


def test_a_text_model_passes_its_settings_on():
    net = nano(fusion="reweight", hint="raw", latent_table="fixed")
    assert (net.latent.fusion, net.latent.hint, net.latent.kind) == ("reweight", "raw", "fixed")
    for model in MODELS:
        assert nano(model, classes=3).backbone.time.label.weight.shape == (4, 32)


def test_a_model_of_images_starts_with_a_scale():
    net = images(PATCHES, (4, 4, 2))
    torch.testing.assert_close(net.embedding.weight[:-1].detach(), ordered_rows(17, 6))
    assert not torch.equal(net.embedding.weight[-1], net.embedding.weight[0])


@torch.no_grad()
def test_guidance_is_the_line_through_two_predictions():
    """Check logits = any + guidance (given - any) for two latents of two sequences, at all and at some positions."""
    net, labels = randomized(images(PATCHES, (4, 4, 1), classes=3), 0.3), torch.tensor([0, 2])
    x, t = torch.randint(18, (4, 16), generator=rng(0)), torch.tensor([0.3, 0.9, 0.3, 0.9])
    z, rows = torch.randn(4, 16, 6, generator=rng(1)), torch.tensor([1, 40])
    given, anything = net(x, z, t, torch.tensor([0, 2, 0, 2])), net(x, z, t)
    assert not torch.allclose(given, anything)
    torch.testing.assert_close(net(x, z, t, torch.full((4,), 3)), anything)  # the label `classes` means any class
    for guidance in (0.0, 0.5, 1.0, 2.0):
        guided, expected = Guided(net, labels, guidance), anything + guidance * (given - anything)
        torch.testing.assert_close(guided(x, z, t), expected)
        torch.testing.assert_close(guided.logits_at(x, z, t, rows), expected.flatten(0, 1)[rows])
    torch.testing.assert_close(Guided(net, labels)(x, z, t), given)
    for guidance, passes in ((0.0, 1), (1.0, 1), (2.0, 2)):
        asked = []
        with torch.nn.modules.module.register_module_forward_pre_hook(lambda m, _, asked=asked: asked.append(m)):
            Guided(net, labels, guidance)(x, z, t)
        assert asked.count(net) == passes
    Guided(net, labels, LARGEST)
    for wrong in (-0.1, math.inf, math.nan):
        with pytest.raises(InputError, match="--guidance must be 0 or more, and not beyond float32, not"):
            Guided(net, labels, wrong)


TEXT = {"vocab_size": 11, "length": 12, "size": NANO}
PICTURE = {"vocab_size": 17, "length": 16, "size": UNET, "image": (4, 4, 1), "latent_table": "ordered"}
SHAPE = "a model of images has their height, width and colours and a backbone for images, and 0 classes or more, not"


@pytest.mark.parametrize(
    "options, message",
    [
        (TEXT | {"model": "x"}, "model must be one of"),
        *[(PICTURE | {"model": name}, f"model {name} is for text, not for images") for name in ("ar", "udm", "sedd")],
        (TEXT | {"latent_table": "x"}, "latent_table must be one of"),
        (TEXT | {"fusion": "x"}, "fusion must be one of"),
        (TEXT | {"hint": "x"}, "hint must be one of"),
        (TEXT | {"discrete": "x"}, "discrete schedule must be one of"),
        (TEXT | {"continuous": "x"}, "continuous schedule must be one of"),
        *[(TEXT | {"evidence": v}, f"evidence must be greater than 0, not {v}") for v in (0.0, math.inf, math.nan)],
        *[
            (TEXT | {"latent_norm": v}, f"latent_norm and latent_dim must be 0 or more, not {v}, 0")
            for v in (-1.0, math.inf, math.nan)
        ],
        (TEXT | {"latent_dim": -1}, "latent_norm and latent_dim must be 0 or more, not 0.0, -1"),
        (TEXT | {"latent_table": "free", "latent_dim": 8}, "latent dim 8: a free table has the width 32"),
        (TEXT | {"latent_table": "free", "bayes_head": True}, "bayes_head needs rows of one length"),
        (PICTURE | {"latent_dim": 1, "bayes_head": True}, "bayes_head needs rows of one length"),
        (TEXT | {"size": UNET}, SHAPE),
        (TEXT | {"size": UNET}, ".*, not None, UNetSize, 0$"),
        (PICTURE | {"size": NANO}, SHAPE),
        (PICTURE | {"image": (4, 0, 1), "length": 0}, SHAPE),
        (TEXT | {"classes": -1}, SHAPE),
        (PICTURE | {"length": 17}, r"images of \(4, 4, 1\) have 16 values, not the length 17"),
        (TEXT | {"vocab_size": 1}, "a model needs 2 tokens and length 1 at least, not 1, 12"),
        (PICTURE | {"rows": True}, "rows and neighbours are of text, and this model is of images"),
        (PICTURE | {"neighbours": True}, "rows and neighbours are of text, and this model is of images"),
        (TEXT | {"vocab_size": 128, "neighbours": True}, "neighbours are for alphabets of at most 127 tokens, not 128"),
        (TEXT | {"length": 0}, "a model needs 2 tokens and length 1 at least, not 11, 0"),
    ],
)
def test_settings_that_cannot_be_are_named(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        ModelConfig(**options)


def test_settings_at_the_ends_of_their_ranges_are_settings():
    for options in (
        {"vocab_size": 2, "length": 1},
        {"vocab_size": 127, "neighbours": True},
        {"latent_dim": 1, "bayes_head": True},
        {"latent_table": "free", "latent_dim": 32},
    ):
        assert ModelConfig(**TEXT | options).image is None
    for options in ({"classes": 1}, {"latent_dim": 2, "bayes_head": True}, {"image": (1, 16, 1)}, {"size": PATCHES}):
        assert ModelConfig(**PICTURE | options).image


@pytest.mark.parametrize(
    "model, discrete, continuous",
    [*((name, "linear", "capped") for name in ("cadd", "mdlm", "ar")), ("cdm", "all-at-once", "linear")],
)
def test_auto_is_capped_and_for_a_cdm_linear(model, discrete, continuous):
    config = ModelConfig(**TEXT, model=model)
    schedule = config.schedule()
    assert (schedule.discrete, schedule.continuous) == (discrete, continuous)
    chosen = dataclasses.replace(config, discrete="cosine", continuous="flow").schedule()
    assert (chosen.discrete, chosen.continuous) == ("all-at-once" if model == "cdm" else "cosine", "flow")
