"""The image backbones: the shapes they take, what each output depends on, what they learn; and guidance."""

import pytest
import torch

from cadd_min.dit import PATCH_PRESETS, PatchSize
from cadd_min.model import Guided, ModelConfig
from cadd_min.objective import Batch
from cadd_min.sampler import sample
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.unet import UNET_PRESETS, UNetSize
from cadd_min.utils.errors import InputError
from tests.toys import images, rng

NANO = UNET_PRESETS["nano"]
PATCHES = PatchSize(layers=2, width=32, heads=2, embed=16, patch=2, cond=32)
DEEP = UNetSize(embed=8, channels=16, mults=(1, 2, 2, 2), blocks=2, attention=(1, 3), heads=2, cond=32)


@pytest.mark.parametrize("shape", [(8, 8, 1), (7, 9, 3), (28, 28, 1), (5, 1, 3), (1, 1, 1), (32, 32, 3)])
@pytest.mark.parametrize("size", [NANO, DEEP])
def test_the_unet_takes_any_size(shape, size):
    """Check odd, flat and single-pixel images, which no stride of 2 divides."""
    net, length = size.build(shape), shape[0] * shape[1] * shape[2]
    x = torch.randn(2, length, size.embed, generator=rng(0))
    y = net(x, torch.tensor([0.1, 0.9]))
    assert y.shape == x.shape and y.isfinite().all()


@pytest.mark.parametrize("size", [NANO, PATCHES])
def test_every_value_can_see_every_value(size):
    """Check that a change of one input value changes every output, in each colour, once the weights are random."""
    net = size.build((8, 8, 3))
    torch.manual_seed(1)
    for parameter in net.parameters():  # blocks start as the identity
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, t = torch.randn(1, 192, size.embed, generator=rng(0)), torch.tensor([0.5])
    moved = x.clone()
    moved[0, 100] += 1
    assert (net(x, t) != net(moved, t)).any(-1).all()


def test_patches_are_squares():
    """Check that a value of one patch changes that patch and no other: the untrained blocks mix no tokens."""
    net = PATCHES.build((6, 4, 1))
    x = torch.zeros(1, 24, 16)
    x[0, 4 * 2 + 1] = 1  # row 2, column 1: the patch of rows 2, 3 and columns 0, 1
    moved = net(x, torch.tensor([0.5])) != net(torch.zeros_like(x), torch.tensor([0.5]))
    assert moved.any(-1).view(6, 4).nonzero().tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]
    with pytest.raises(InputError, match="patches of 2 must tile"):
        PATCHES.build((7, 8, 1))


def test_convolutions_run_channels_last():
    """Check the memory format at the first layer: (B, H, W, C embed) is channels last already and is not copied."""
    net = NANO.build((8, 8, 3))
    tensors = []
    net.enter.register_forward_hook(lambda module, inputs, output: tensors.extend([inputs[0], output]))
    net(torch.randn(4, 192, 16), torch.rand(4))
    assert len(tensors) == 2
    for tensor in tensors:
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_presets_are_of_the_literatures_size():
    """Compare parameters with the 35.7M of Ho et al. 2020 for CIFAR-10. Here the scale by time comes on top."""
    with torch.device("meta"):
        sizes = {
            name: images(UNET_PRESETS[name], (32, 32, 3), 256, latent_norm=1.0) for name in ("cifar10", "imagenet32")
        }
        patches = images(PATCH_PRESETS["cifar10"], (32, 32, 3), 256, latent_norm=1.0)
    count = {name: sum(p.numel() for p in net.parameters()) for name, net in (*sizes.items(), ("patches", patches))}
    assert 35e6 < count["cifar10"] < 60e6 and 35e6 < count["patches"] < 60e6 and 100e6 < count["imagenet32"] < 130e6


@pytest.mark.parametrize("size", [NANO, PATCHES])
def test_overfits_one_batch(size):
    """Check that training on eight images of noise brings the CE far below log 17 = 2.83: only memory can do that."""
    x_0 = torch.randint(17, (8, 64), generator=rng(0))
    config = TrainConfig(steps=300, lr=5e-3, warmup=10, batch_size=8, wrong_hints=0, dtype="float32")
    trainer = Trainer(images(size, latent_dim=2), lambda index: Batch(x_0), config)
    first = trainer.train_step()["ce"]
    last = [trainer.train_step()["ce"] for _ in range(299)][-20:]
    assert first > 2.5 and sum(last) / 20 < 1.0


def test_guidance_0_is_unconditional_and_1_conditional():
    """Compare guidance 0, 1 and 3 with the two networks' logits, at all positions and at some rows."""
    net = images(NANO, classes=3)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng(5))
    x, z, t = torch.full((4, 64), 17), torch.randn(4, 64, 16, generator=rng(1)), torch.full((4,), 0.5)
    label = torch.tensor([0, 1, 2, 0])
    without, with_label = net(x, z, t), net(x, z, t, label)
    assert (without != with_label).any()
    assert torch.equal(Guided(net, label, 0)(x, z, t), without)
    assert torch.equal(Guided(net, label, 1)(x, z, t), with_label)
    torch.testing.assert_close(Guided(net, label, 3)(x, z, t), without + 3 * (with_label - without))
    rows = torch.tensor([3, 70, 255])
    torch.testing.assert_close(
        Guided(net, label, 3).logits_at(x, z, t, rows), Guided(net, label, 3)(x, z, t).flatten(0, 1)[rows]
    )
    assert torch.equal(net(x, z, t, torch.full((4,), 3)), without)  # label 3 of classes 0 to 2 is "any class"


def test_guided_samples_know_their_class_with_several_latents():
    """Train on two classes of constant images, and check that each sample is of the class asked for, with K = 2."""
    x_0 = torch.tensor([[2] * 64, [14] * 64] * 8)
    label = torch.tensor([0, 1] * 8)
    config = TrainConfig(steps=250, lr=5e-3, warmup=10, batch_size=16, ema=0.9, wrong_hints=0, dtype="float32")
    trainer = Trainer(images(NANO, classes=2, latent_dim=2), lambda index: Batch(x_0, label), config)
    for _ in range(config.steps):
        trainer.train_step()
    net, labels = trainer.ema, torch.tensor([1, 0, 0, 1])
    for guidance in (1.0, 2.0):
        x = sample(
            Guided(net, labels, guidance), (4, 64), net.table(), net.schedule, net.mask_id,
            steps=8, num_latents=2, zhat="soft", generator=rng(0),
        )  # fmt: skip
        assert (x == torch.tensor([14, 2, 2, 14])[:, None]).double().mean() > 0.95


def test_labels_are_dropped_at_their_rate():
    """Check that drop_label = 1 trains only the row of "any class", and drop_label = 0 only the rows of classes."""
    x_0, label = torch.randint(17, (8, 64), generator=rng(0)), torch.zeros(8, dtype=torch.int64)
    for share, moved in ((1.0, False), (0.0, True)):
        net = images(NANO, classes=2)
        torch.nn.init.normal_(net.head.weight)  # a new head is zero, and passes no gradient to what is below it
        trainer = Trainer(
            net, lambda index: Batch(x_0, label), TrainConfig(drop_label=share, weight_decay=0, dtype="float32")
        )
        before = net.backbone.time.label.weight.detach().clone()
        trainer.train_step(), trainer.train_step()
        assert bool((net.backbone.time.label.weight != before)[0].any()) == moved
        assert bool((net.backbone.time.label.weight != before)[2].any()) != moved


def test_shape_errors_are_named():
    with pytest.raises(InputError, match=r"have 64 values, not the length 63"):
        ModelConfig(17, 63, NANO, (8, 8, 1))
    with pytest.raises(InputError, match="multiple of its 3 heads"):
        UNetSize(embed=8, channels=16, mults=(1, 2), blocks=1, attention=(1,), heads=3).build((8, 8, 1))
