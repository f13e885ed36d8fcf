"""The transformer backbone: bidirectional, rotary positions, adaLN on t (DiT, Peebles & Xie 2023).

The inputs are the tokens of a text, or the patches of an image. A causal backbone, where position i sees the inputs up
to i, is for the autoregressive baseline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadd_min.utils.errors import InputError


class TimeEmbedding(nn.Module):
    """Map t (B,) and label (B,) to c (B, cond): sines of t at many frequencies, an MLP, and an embedding of the class.

    Labels are 0 to classes - 1. The label `classes`, or no label, means any class.
    """

    frequency: Tensor

    def __init__(self, cond: int, classes: int = 0, frequencies: int = 128):
        super().__init__()
        self.classes = classes
        self.register_buffer(
            "frequency", 1000 * torch.exp(-math.log(10000) * torch.arange(frequencies) / frequencies), persistent=False
        )
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, cond), nn.SiLU(), nn.Linear(cond, cond))
        if classes:
            self.label = nn.Embedding(classes + 1, cond)

    def forward(self, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return c (B, cond) of t (B,) and label (B,)."""
        angle = t[:, None].float() * self.frequency
        c = self.mlp(torch.cat([angle.cos(), angle.sin()], -1))
        if self.classes:
            c = c + self.label(torch.full_like(t, self.classes, dtype=torch.int64) if label is None else label)
        return F.silu(c)


class Rotary(nn.Module):
    """Rotate queries or keys (B, heads, L, head_dim) by position (Su et al. 2021), so that attention sees distances."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, length: int):
        super().__init__()
        self.frequency = 10000 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.arange(length)[:, None] * self.frequency  # (L, head_dim / 2)
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], -1), persistent=False)

    def forward(self, q: Tensor) -> Tensor:
        """Rotate q (B, heads, L, head_dim)."""
        length = q.shape[-2]
        return q * self.cos[:length].to(q.dtype) + q.roll(q.shape[-1] // 2, -1) * self.sin[:length].to(q.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Compute scaled dot-product attention, (B, heads, L, head_dim) each. causal: to no later position.

    A CPU computes in float32: the backward of short sequences in bfloat16 takes three times as long there.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal).to(v.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply LayerNorm without parameters to x (B, L, W), then the shift and scale of the time (B, 1, W)."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the time. See `open_gates` for where the gates start."""

    def __init__(self, size: Size | PatchSize, causal: bool):
        super().__init__()
        width = size.width
        self.heads, self.causal = size.heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.ada = nn.Linear(size.cond, 6 * width)

    def forward(self, x: Tensor, c: Tensor, rotary: Rotary) -> Tensor:
        """Map x (B, L, W) under the conditioning c (B, cond) to (B, L, W)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.ada(c)[:, None].chunk(6, -1)  # (B, 1, W) each
        qkv = self.qkv(modulate(x, shift_a, scale_a))  # (B, L, 3 W)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, head_dim) each
        a = attend(rotary(q), rotary(k), v, self.causal)
        x = x + gate_a * self.out(a.transpose(1, 2).flatten(2))  # (B, L, W)
        return x + gate_m * self.mlp(modulate(x, shift_m, scale_m))

    @torch.no_grad()
    def open_gates(self, gate: float) -> None:
        """Set the modulation to a constant: nothing depends on t, and the gates are `gate`.

        At 0 a block starts as the identity (adaLN-Zero). At 1 the head sees mixtures of the neighbours from the first
        step: alphabets are then learned a little faster (docs/speedrun.md).
        """
        nn.init.zeros_(self.ada.weight)
        nn.init.zeros_(self.ada.bias)
        self.ada.bias.view(6, -1)[2::3] = gate  # gate_a and gate_m

    @torch.no_grad()
    def look_nearby(self, frequency: Tensor, peak: float = 6.0, bands: int = 8) -> None:
        """Set the biases so that head 0, 1, 2, 3, ... starts by attending around offset -1, 1, -2, 2, ...

        The heads of a causal block start at 0, -1, -2, ...: its input at i is token i - 1, so 0 is the token before.
        The queries get a bias c, the keys the same bias turned back by `offset` steps of the rotation. Their logit is
        sum_f c_f^2 cos((i + offset - j) frequency_f) / sqrt(head_dim), with its maximum `peak` at j = i + offset. The
        network can unlearn the bias. Without the bias it stays at the unigram law until it discovers its neighbours.
        """
        self.qkv.bias.zero_()
        half = len(frequency)
        query, key, _ = self.qkv.bias.view(3, self.heads, 2 * half)
        c = torch.zeros(half)
        c[:bands] = math.sqrt(peak * math.sqrt(2 * half) / min(bands, half))
        for head in range(self.heads):
            offset = -head if self.causal else (head // 2 + 1) * (1 if head % 2 else -1)
            query[head, :half] = c
            key[head] = torch.cat([c * (offset * frequency).cos(), -c * (offset * frequency).sin()])


class DiT(nn.Module):
    """Map inputs (B, L, width), times (B,) and labels (B,) or None to features (B, L, width).

    absolute: learn an embedding of each position. Rotary positions are relative: they do not tell the first position
    from the last while all inputs are masks.
    """

    def __init__(
        self, size: Size | PatchSize, length: int, classes: int = 0, causal: bool = False, absolute: bool = False
    ):
        super().__init__()
        if size.width % (2 * size.heads):
            raise InputError(f"width must be a multiple of twice the heads ({size.heads}), not {size.width}")
        self.time = TimeEmbedding(size.cond, classes)
        self.rotary = Rotary(size.width // size.heads, length)
        self.position = nn.Parameter(torch.zeros(length, size.width)) if absolute else None
        blocks = [Block(size, causal) for _ in range(size.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.ada = nn.Linear(size.cond, 2 * size.width)
        self.initialize_weights()
        for block in blocks:
            block.open_gates(size.gate)
            block.look_nearby(self.rotary.frequency)

    def initialize_weights(self) -> None:
        """Start every matrix by Xavier, and the last modulation at zero: at the start t changes nothing."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.ada.weight)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the features (B, L, width) of x (B, L, width) at times t (B,)."""
        c = self.time(t, label).to(x.dtype)
        if self.position is not None:
            x = x + self.position[: x.shape[1]]
        for block in self.blocks:
            x = block(x, c, self.rotary)
        shift, scale = self.ada(c)[:, None].chunk(2, -1)
        return modulate(x, shift, scale)


class PatchDiT(nn.Module):
    """The transformer for images: inputs (B, H W C, embed) to features of the same shape, patch by patch."""

    def __init__(self, size: PatchSize, shape: tuple[int, ...], classes: int):
        super().__init__()
        height, width, colours = shape
        if height % size.patch or width % size.patch:
            raise InputError(f"patches of {size.patch} must tile the images, and these are {height} x {width}")
        self.grid = (height // size.patch, size.patch, width // size.patch, size.patch, colours * size.embed)
        inputs = size.patch**2 * colours * size.embed
        self.enter = nn.Linear(inputs, size.width)
        self.position = nn.Parameter(torch.zeros(self.grid[0] * self.grid[2], size.width))
        self.transformer = DiT(size, self.grid[0] * self.grid[2], classes)
        self.leave = nn.Linear(size.width, inputs)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the features of x, (B, H W C, embed) both, at times t (B,)."""
        patches = x.reshape(len(x), *self.grid).transpose(2, 3).flatten(3).flatten(1, 2)  # (B, patches, inputs)
        h = self.leave(self.transformer(self.enter(patches) + self.position, t, label))
        rows, p, columns, _, entries = self.grid
        return h.view(len(x), rows, columns, p, p, entries).transpose(2, 3).reshape(x.shape)


# ------------------------------------------------------------------------------------------------ sizes

LARGEST = 2**16  # width, heads, ...
DEEPEST = 1000  # layers


def check_size(size: Any) -> None:
    """Raise InputError where a number of a Size, PatchSize or UNetSize is out of range for any network."""
    for name, value in vars(size).items():
        least = 0 if name in ("attention", "dropout", "gate") else 1
        most = DEEPEST if name in ("layers", "blocks") else LARGEST
        for number in value if isinstance(value, tuple) else (value,):
            if not least <= number <= most:
                raise InputError(f"{name} must be from {least} to {most}, not {number}")


@dataclass(frozen=True)
class Size:
    """The size of a transformer for text."""

    layers: int
    width: int
    heads: int
    cond: int = 128  # width of the time conditioning
    gate: float = 0.0  # where the gates of the blocks start

    def __post_init__(self) -> None:
        check_size(self)

    @property
    def embed(self) -> int:
        """The width of a token's embedding, and of its features for the head."""
        return self.width

    def build(
        self, shape: tuple[int, ...], classes: int = 0, causal: bool = False, absolute: bool = False
    ) -> nn.Module:
        """Make the backbone for inputs of this shape, (L,)."""
        return DiT(self, shape[0], classes, causal, absolute)


@dataclass(frozen=True)
class PatchSize:
    """The size of a transformer for images."""

    layers: int
    width: int
    heads: int
    embed: int  # width of the embedding of one value of one colour
    patch: int
    cond: int = 128
    gate: float = 0.0

    def __post_init__(self) -> None:
        check_size(self)

    def build(self, shape: tuple[int, ...], classes: int = 0) -> nn.Module:
        """Make the backbone for images of this shape, (H, W, C)."""
        return PatchDiT(self, shape, classes)


PRESETS = {
    "nano": Size(layers=2, width=64, heads=2, cond=64, gate=1.0),  # tests and benchmarks/markov.py
    "tiny": Size(layers=3, width=128, heads=4, gate=1.0),
    "small": Size(layers=12, width=768, heads=12),  # the paper's
}
PATCH_PRESETS = {
    "tiny": PatchSize(layers=4, width=128, heads=4, embed=32, patch=1),  # 8x8 digits
    "cifar10": PatchSize(layers=12, width=512, heads=8, embed=64, patch=2, cond=256),
}
