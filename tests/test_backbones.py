"""The backbones are what their papers say: each is compared with plain formulas on the same weights."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from cadd_min.dit import DiT, PatchDiT, PatchSize, Size, check_size
from cadd_min.unet import UNet, UNetSize, norm
from cadd_min.utils.errors import InputError
from tests.toys import randomized, rng


def scrambled(net: torch.nn.Module, std: float = 0.3) -> dict[str, torch.Tensor]:
    """Make all weights random, and return them by name."""
    return dict(randomized(net, std).eval().named_parameters())


def linear(w: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def plain_time(w: dict, name: str, t: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
    """Embed t by 128 cosines and sines of frequencies from 1000 down to 0.1, an MLP, and the class."""
    angle = t[:, None] * 1000 * 10000 ** (-torch.arange(128) / 128)
    c = linear(w, f"{name}.mlp.2", F.silu(linear(w, f"{name}.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))))
    if f"{name}.label.weight" in w:
        classes = w[f"{name}.label.weight"]
        c = c + classes[torch.full((len(t),), len(classes) - 1) if label is None else label]
    return F.silu(c)


def rotated(q: torch.Tensor) -> torch.Tensor:
    """Turn (L, d) by position, as d / 2 complex numbers: entry j is real, entry j + d / 2 imaginary."""
    length, dim = q.shape
    turn = torch.arange(length)[:, None] * 10000 ** (-torch.arange(0, dim, 2) / dim)
    turned = torch.complex(*q.chunk(2, 1)) * torch.polar(torch.ones_like(turn), turn)
    return torch.cat([turned.real, turned.imag], 1)


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attend in one head, (L, d) each."""
    logits = q @ k.T / math.sqrt(q.shape[1])
    if causal:
        logits = logits.masked_fill(torch.arange(len(k)) > torch.arange(len(q))[:, None], -math.inf)
    return logits.softmax(1) @ v


def plain_dit(w: dict, name: str, size, x: torch.Tensor, t: torch.Tensor, label=None, causal=False) -> torch.Tensor:
    """Map x (B, L, W) by the DiT of Peebles & Xie 2023 with rotary positions, without its final linear layer."""
    c = plain_time(w, f"{name}time", t, label)[:, None]
    normal = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    for n in range(size.layers):
        block, (shift_a, scale_a, gate_a, shift_m, scale_m, gate_m) = (
            f"{name}blocks.{n}",
            linear(w, f"{name}blocks.{n}.ada", c).chunk(6, -1),
        )
        q, k, v = linear(w, f"{block}.qkv", normal(x) * (1 + scale_a) + shift_a).chunk(3, -1)
        heads = []
        for q_h, k_h, v_h in zip(*(part.chunk(size.heads, -1) for part in (q, k, v))):
            rows = [plain_attention(rotated(a), rotated(b), d, causal) for a, b, d in zip(q_h, k_h, v_h)]
            heads.append(torch.stack(rows))
        x = x + gate_a * linear(w, f"{block}.out", torch.cat(heads, -1))
        h = linear(w, f"{block}.mlp.0", normal(x) * (1 + scale_m) + shift_m)
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + gate_m * linear(w, f"{block}.mlp.2", h)
    shift, scale = linear(w, f"{name}ada", c).chunk(2, -1)
    return normal(x) * (1 + scale) + shift


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("classes", [0, 3])
def test_the_transformer_is_the_plain_one(classes, causal):
    size = Size(layers=2, width=24, heads=3, cond=20)
    net = DiT(size, 9, classes, causal)
    w, t = scrambled(net), torch.tensor([0.0, 0.3, 1.0])
    x = torch.randn(3, 7, 24, generator=rng(0))  # shorter than the longest sequence
    for label in (None, torch.tensor([0, 2, 3])) if classes else (None,):
        torch.testing.assert_close(net(x, t, label), plain_dit(w, "", size, x, t, label, causal), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_patch_transformer_is_the_plain_one():
    """Cut 6 x 9 images of two colours into patches of 3 x 3 by hand, from left to right and from top to bottom."""
    size = PatchSize(layers=1, width=12, heads=2, embed=5, patch=3, cond=16)
    net = PatchDiT(size, (6, 9, 2), classes=3)
    w, t, label = scrambled(net), torch.tensor([0.2, 0.9]), torch.tensor([1, 3])
    x = torch.randn(2, 108, 5, generator=rng(0))
    pixels = x.view(2, 6, 9, 10)
    corners = list(itertools.product(range(0, 6, 3), range(0, 9, 3)))
    patches = torch.stack([pixels[:, i : i + 3, j : j + 3].flatten(1) for i, j in corners], 1)
    assert w["position"].shape == (6, 12)
    h = linear(w, "enter", patches) + w["position"]
    h = linear(w, "leave", plain_dit(w, "transformer.", size, h, t, label))
    expected = torch.empty_like(pixels)
    for n, (i, j) in enumerate(corners):
        expected[:, i : i + 3, j : j + 3] = h[:, n].view(2, 3, 3, 10)
    torch.testing.assert_close(net(x, t, label), expected.view(2, 108, 5), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------ the U-Net


class PlainUNet:
    """The U-Net of Ho et al. 2020, layer by layer. It walks through the weights in the order of their names."""

    def __init__(self, w: dict, size: UNetSize, shape: tuple[int, int, int]):
        self.w, self.size, self.shape = w, size, shape

    def conv(self, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        groups = max(g for g in (1, 2, 4, 8, 16, 32) if x.shape[1] % g == 0)
        return F.group_norm(x, groups, self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps=1e-5)

    def residual(self, name: str, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        scale, shift = linear(self.w, f"{name}.ada", c)[..., None, None].chunk(2, 1)
        h = self.conv(f"{name}.conv_in", F.silu(self.norm(f"{name}.norm_in", x)))
        h = self.conv(f"{name}.conv_out", F.silu(self.norm(f"{name}.norm_out", h) * (1 + scale) + shift))
        return h + (self.conv(f"{name}.skip", x) if f"{name}.skip.weight" in self.w else x)

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.conv(f"{name}.qkv", self.norm(f"{name}.norm", x)).flatten(2).chunk(3, 1)  # (B, channels, H W)
        rows = []
        for image in zip(q, k, v):
            heads = zip(*(part.chunk(self.size.heads, 0) for part in image))
            rows.append(torch.cat([plain_attention(a.T, b.T, d.T, False).T for a, b, d in heads]))
        return x + self.conv(f"{name}.out", torch.stack(rows).view_as(x))

    def stage(self, name: str, x: torch.Tensor, c: torch.Tensor, attends: bool) -> torch.Tensor:
        x = self.residual(f"{name}.block", x, c)
        return self.attention(f"{name}.attention", x) if attends else x

    def __call__(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        size, (height, width, colours), c = self.size, self.shape, plain_time(self.w, "time", t, label)
        h = self.conv("enter", x.view(len(x), height, width, colours * size.embed).permute(0, 3, 1, 2))
        skips, levels, number = [h], range(len(size.mults)), itertools.count()
        for level in levels:
            if level:
                h = self.conv(f"down.{next(number)}", h, stride=2)
                skips.append(h)
            for _ in range(size.blocks):
                h = self.stage(f"down.{next(number)}", h, c, level in size.attention)
                skips.append(h)
        h = self.residual("after", self.stage("middle", h, c, True), c)
        number = itertools.count()
        for level in reversed(levels):
            for _ in range(size.blocks + 1):
                h = self.stage(f"up.{next(number)}", torch.cat([h, skips.pop()], 1), c, level in size.attention)
            if level:
                tall, wide = skips[-1].shape[2:]
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :tall, :wide]
                h = self.conv(f"up.{next(number)}", h)
        assert not skips
        return self.conv("leave", F.silu(self.norm("norm", h))).permute(0, 2, 3, 1).reshape(x.shape)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(4, 4, 1), (8, 6, 2)])
@pytest.mark.parametrize("attention", [(0,), (1,), ()])
def test_the_unet_is_the_plain_one(attention, shape):
    size = UNetSize(embed=4, channels=12, mults=(1, 2), blocks=2, attention=attention, heads=2, dropout=0.5, cond=16)
    net = UNet(size, shape, classes=3)
    w, t, label = scrambled(net, 0.15), torch.tensor([0.2, 0.9]), torch.tensor([1, 3])
    x = torch.randn(2, math.prod(shape), 4, generator=rng(0))
    torch.testing.assert_close(net(x, t, label), PlainUNet(w, size, shape)(x, t, label), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(net.train()(x, t, label), net.eval()(x, t, label))  # dropout, in training alone
    skips = [weight.shape for name, weight in w.items() if name.endswith("skip.weight")]
    assert skips and all(shape[0] != shape[1] for shape in skips)  # where the width stays there is no layer
    for channels, groups in {96: 32, 48: 16, 24: 8, 12: 4, 6: 2, 5: 1}.items():
        assert norm(channels).num_groups == groups


# ------------------------------------------------------------------------------------------------ new networks, sizes


def test_a_new_network_starts_as_its_papers_say():
    """Check Xavier's range and zeros of a new transformer, and that the last layers of a new U-Net are zero."""
    size = Size(layers=2, width=48, heads=2, cond=40)
    torch.manual_seed(0)
    net = DiT(size, 8, classes=2)
    for name, weight in net.named_parameters():
        if name.endswith("ada.weight"):
            assert (weight == 0).all()
        elif weight.dim() == 2 and name != "time.label.weight":
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.95 * bound < weight.abs().max() <= bound and abs(float(weight.detach().mean())) < 0.1 * bound
        elif name.endswith("bias") and "qkv" not in name:
            assert (weight == 0).all()
    for block in DiT(dataclasses.replace(size, gate=0.5), 8).blocks:
        assert block.ada.bias.view(6, -1).unique(dim=1).flatten().tolist() == [0, 0, 0.5, 0, 0, 0.5]
    images = UNet(UNetSize(embed=4, channels=8, mults=(1,), blocks=1, attention=(0,), cond=8), (4, 4, 1))
    zeros = {name for name, weight in images.named_parameters() if (weight == 0).all()}
    last = {name for name, _ in images.named_parameters() if "conv_out" in name or "attention.out" in name}
    assert last <= zeros and len(last) == 18


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": 0}, "layers must be from 1 to 1000, not 0"),
        ({"layers": 1001}, "layers must be from 1 to 1000, not 1001"),
        ({"width": 65_537}, "width must be from 1 to 65536, not 65537"),
        ({"heads": 0}, "heads must be from 1 to 65536, not 0"),
        ({"cond": -1}, "cond must be from 1 to 65536, not -1"),
    ],
)
def test_a_size_out_of_range_is_named(change, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        Size(**({"layers": 1, "width": 8, "heads": 2} | change))


def test_sizes_at_the_ends_of_their_ranges_are_sizes():
    small = {"embed": 1, "channels": 1, "mults": (1,), "blocks": 1, "attention": (0,)}
    for size in (Size(1000, 65536, 1, 1), UNetSize(**small, dropout=0.0), UNetSize(**small | {"blocks": 1000})):
        check_size(size)
    for change, message in (
        ({"blocks": 1001}, "blocks must be from 1 to 1000, not 1001"),
        ({"mults": (1, 0)}, "mults must be from 1 to 65536, not 0"),
        ({"attention": (-1,)}, "attention must be from 0 to 65536, not -1"),
        ({"mults": ()}, r"a U-Net needs one level at least and dropout in \[0, 1\), not \(\), 0.0"),
        ({"dropout": 1.0}, r"a U-Net needs one level at least and dropout in \[0, 1\), not \(1,\), 1.0"),
    ):
        with pytest.raises(InputError, match=f"^{message}$"):
            UNetSize(**small | change)
