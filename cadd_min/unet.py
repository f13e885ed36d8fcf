"""The image backbone: a U-Net of residual blocks with attention. The time sets the scale and shift after a norm.

Ho et al. 2020 (DDPM) with the time conditioning of Nichol & Dhariwal 2021. Only the ends differ: a pixel comes in as
the embeddings of its colours' values, side by side, and leaves as equally many features for the head. In memory
(B, H, W, C * embed) is PyTorch's channels-last layout, in which convolutions are fastest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadd_min.dit import TimeEmbedding, attend, check_size
from cadd_min.utils.errors import InputError


class ResidualBlock(nn.Module):
    """Map x (B, in, H, W) and c (B, cond) to (B, out, H, W). The last convolution starts at zero: the skip alone."""

    def __init__(self, inputs: int, outputs: int, size: UNetSize):
        super().__init__()
        self.norm_in, self.norm_out = norm(inputs), norm(outputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.ada = nn.Linear(size.cond, 2 * outputs)
        self.dropout = nn.Dropout(size.dropout)
        self.conv_out = zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map x (B, in, H, W) under the conditioning c (B, cond) to (B, out, H, W)."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = self.ada(c)[:, :, None, None].chunk(2, 1)
        h = self.norm_out(h) * (1 + scale) + shift
        return self.skip(x) + self.conv_out(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Attention of every pixel to every pixel: (B, channels, H, W) to the same shape."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        if channels % heads:
            raise InputError(f"the channels of a level that attends must be a multiple of its {heads} heads")
        self.norm, self.heads = norm(channels), heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, channels, H, W) to the same shape."""
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1))  # (B, 3, heads, head_dim, H W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        return x + self.out(attend(q, k, v).transpose(-1, -2).reshape(x.shape))


class Stage(nn.Module):
    """A residual block, and attention on the levels that attend."""

    def __init__(self, inputs: int, outputs: int, size: UNetSize, attends: bool):
        super().__init__()
        self.block = ResidualBlock(inputs, outputs, size)
        self.attention = Attention(outputs, size.heads) if attends else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map x (B, in, H, W) under the conditioning c (B, cond) to (B, out, H, W)."""
        return self.attention(self.block(x, c))


class UNet(nn.Module):
    """Map inputs (B, H W C, embed), times (B,) and labels (B,) or None to features of that shape, for any H and W."""

    def __init__(self, size: UNetSize, shape: tuple[int, ...], classes: int = 0):
        super().__init__()
        colours = shape[2] * size.embed
        self.shape = (*shape[:2], colours)
        self.time = TimeEmbedding(size.cond, classes)
        self.enter = nn.Conv2d(colours, size.channels, 3, padding=1)
        widths = [size.channels * mult for mult in size.mults]
        channels, skips = size.channels, [size.channels]

        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            if level > 0:
                self.down.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)
            for _ in range(size.blocks):
                self.down.append(Stage(channels, width, size, level in size.attention))
                channels = width
                skips.append(channels)
        self.middle = Stage(channels, channels, size, True)
        self.after = ResidualBlock(channels, channels, size)
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(size.blocks + 1):
                self.up.append(Stage(channels + skips.pop(), width, size, level in size.attention))
                channels = width
            if level > 0:
                self.up.append(nn.Conv2d(channels, channels, 3, padding=1))
        self.norm = norm(channels)
        self.leave = nn.Conv2d(channels, colours, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the features of x, (B, H W C, embed) both, at times t (B,)."""
        c = self.time(t, label)
        h = self.enter(x.view(len(x), *self.shape).permute(0, 3, 1, 2))
        skips = [h]
        for layer in self.down:
            h = layer(h, c) if isinstance(layer, Stage) else layer(h)
            skips.append(h)
        h = self.after(self.middle(h, c), c)
        for layer in self.up:
            if isinstance(layer, Stage):
                h = layer(torch.cat([h, skips.pop()], 1), c)
            else:  # back to the size of the level above, which may be odd
                h = layer(F.interpolate(h, size=skips[-1].shape[-2:], mode="nearest"))
        return self.leave(F.silu(self.norm(h))).permute(0, 2, 3, 1).reshape(x.shape)


def norm(channels: int) -> nn.GroupNorm:
    """Make a group norm over 32 groups, or the most below 32 that divide the channels."""
    return nn.GroupNorm(next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0), channels)


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Set the weights of a layer to zero, and return the layer."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


@dataclass(frozen=True)
class UNetSize:
    """The size of a U-Net. Level i has 1 / 2^i of the resolution, and channels * mults[i] channels."""

    embed: int  # width of the embedding of one value of one colour, and of its features for the head
    channels: int
    mults: tuple[int, ...]
    blocks: int  # residual blocks a level
    attention: tuple[int, ...]  # the levels that attend
    heads: int = 1
    dropout: float = 0.0
    cond: int = 512  # width of the time conditioning

    def __post_init__(self) -> None:
        check_size(self)
        if not self.mults or not 0 <= self.dropout < 1:
            raise InputError(
                f"a U-Net needs one level at least and dropout in [0, 1), not {self.mults}, {self.dropout}"
            )

    def build(self, shape: tuple[int, ...], classes: int = 0) -> nn.Module:
        """Make the backbone for images of this shape, (H, W, C)."""
        return UNet(self, shape, classes)


UNET_PRESETS = {
    "nano": UNetSize(embed=16, channels=16, mults=(1, 2), blocks=1, attention=(1,), cond=32),  # tests
    "tiny": UNetSize(embed=32, channels=32, mults=(1, 2), blocks=1, attention=(1,), heads=2, cond=128),  # 8x8 digits
    # Ho et al. 2020, appendix B: 4 levels, 2 blocks, attention at 16x16, dropout 0.1
    "cifar10": UNetSize(embed=64, channels=128, mults=(1, 2, 2, 2), blocks=2, attention=(1,), dropout=0.1),
    # Nichol & Dhariwal 2021: channels, blocks and heads as for ImageNet 64x64, multipliers as for 32x32 images
    "imagenet32": UNetSize(embed=64, channels=192, mults=(1, 2, 2, 2), blocks=3, attention=(1, 2), heads=4, cond=768),
}
