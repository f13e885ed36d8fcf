"""The text backbone: a bidirectional transformer, rotary positions, adaLN-Zero on t (DiT, Peebles & Xie 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadd_min.errors import InputError


@dataclass(frozen=True)
class Size:
    """What makes a backbone small or large."""

    layers: int
    width: int
    heads: int
    cond: int = 128  # width of the time conditioning


PRESETS = {
    "nano": Size(layers=2, width=64, heads=2, cond=64),  # tests and benchmarks/markov.py
    "tiny": Size(layers=3, width=128, heads=4),
    "small": Size(layers=12, width=768, heads=12),
    "medium": Size(layers=24, width=1024, heads=16),
}


class TimeEmbedding(nn.Module):
    """t (B,) -> c (B, cond): sines of t at many frequencies, then an MLP."""

    frequency: Tensor

    def __init__(self, cond: int, frequencies: int = 128):
        super().__init__()
        self.register_buffer(
            "frequency", 1000 * torch.exp(-math.log(10000) * torch.arange(frequencies) / frequencies), persistent=False
        )
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, cond), nn.SiLU(), nn.Linear(cond, cond), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        angle = t[:, None].float() * self.frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1))


class Rotary(nn.Module):
    """Rotate queries and keys by their position (Su et al. 2021), so that attention sees distances."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, length: int):
        super().__init__()
        self.frequency = 10000 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.arange(length)[:, None] * self.frequency  # (L, head_dim / 2)
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], -1), persistent=False)

    def forward(self, q: Tensor) -> Tensor:
        length = q.shape[-2]
        return q * self.cos[:length].to(q.dtype) + q.roll(q.shape[-1] // 2, -1) * self.sin[:length].to(q.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention, (B, heads, L, head_dim) each. On a CPU in float32: a short sequence's backward in
    bfloat16 takes three times as long there."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(v.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then the shift and scale that the time asks for: (B, L, W), (B, 1, W)."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the time. The gates start at zero: a block starts as identity."""

    def __init__(self, size: Size):
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.ada = nn.Linear(size.cond, 6 * width)

    def forward(self, x: Tensor, c: Tensor, rotary: Rotary) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.ada(c)[:, None].chunk(6, -1)
        qkv = self.qkv(modulate(x, shift_a, scale_a))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, L, head_dim)
        a = attend(rotary(q), rotary(k), v)
        x = x + gate_a * self.out(a.transpose(1, 2).flatten(2))
        return x + gate_m * self.mlp(modulate(x, shift_m, scale_m))

    @torch.no_grad()
    def look_nearby(self, frequency: Tensor, peak: float = 6.0, bands: int = 8) -> None:
        """Set the biases so that head 0, 1, 2, 3, ... starts by attending around offset -1, 1, -2, 2, ...

        A bias c of the queries and the same bias turned back by `offset` steps of the rotation for the keys give the
        logit sum_f c_f^2 cos((i + offset - j) frequency_f), largest, `peak`, at j = i + offset. The network can unlearn
        it; without it, it stays at the unigram law until it finds by itself that neighbours matter.
        """
        self.qkv.bias.zero_()
        half = len(frequency)
        query, key, _ = self.qkv.bias.view(3, self.heads, 2 * half)
        c = torch.zeros(half)
        c[:bands] = math.sqrt(peak * math.sqrt(2 * half) / min(bands, half))
        for head in range(self.heads):
            offset = (head // 2 + 1) * (1 if head % 2 else -1)
            query[head, :half] = c
            key[head] = torch.cat([c * (offset * frequency).cos(), -c * (offset * frequency).sin()])


class DiT(nn.Module):
    """(B, L, width) inputs and times (B,) -> (B, L, width) features for the head."""

    def __init__(self, size: Size, length: int):
        super().__init__()
        if size.width % (2 * size.heads):
            raise InputError(f"width must be a multiple of twice the heads ({size.heads}), not {size.width}")
        self.time = TimeEmbedding(size.cond)
        self.rotary = Rotary(size.width // size.heads, length)
        blocks = [Block(size) for _ in range(size.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.ada = nn.Linear(size.cond, 2 * size.width)
        self.initialize_weights()
        for block in blocks:
            block.look_nearby(self.rotary.frequency)

    def initialize_weights(self) -> None:
        """Xavier for every matrix; zero for the modulation, so that at the start t changes nothing (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.ada.weight)
        for block in self.blocks:
            nn.init.zeros_(block.get_parameter("ada.weight"))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time(t).to(x.dtype)
        for block in self.blocks:
            x = block(x, c, self.rotary)
        shift, scale = self.ada(c)[:, None].chunk(2, -1)
        return modulate(x, shift, scale)
