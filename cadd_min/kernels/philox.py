"""Random words, a function of seed, step, position and quad: Philox4x32-10 (Salmon et al., SC 2011) in PyTorch.

The kernels of csrc/ draw from the same function. So a seed gives the same random words on every backend, with any
number of threads. Four numbers name a draw: the seed of a run, the offset (its step), a token's position among the
K B L of a batch, and the quad drawn there. A quad is four words of 32 bits. Here each word is an int64 tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOKEN_QUAD, HAT_QUAD = 0xFFFFFFFF, 0xFFFFFFFE  # the last two quads of a position hold its uniforms
LOW = 0xFFFFFFFF
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def step_seeds(seed: Tensor, count: int) -> Tensor:
    """Return the seeds of `count` steps, (count, 2): the same seed (2,) with the offsets 0, 1, 2, ..."""
    return torch.stack([seed[0].expand(count), torch.arange(count, device=seed.device)], 1)


def philox(key: Tensor, counter: Words) -> Words:
    """Mix a counter of four 32-bit words with a 64-bit key in ten rounds; all int64, elementwise."""
    x, y, z, w = counter
    k_0, k_1 = key & LOW, (key >> 32) & LOW
    for _ in range(10):
        a, b = 0xD2511F53 * x, 0xCD9E8D57 * z  # int64 wraps around, which leaves all 64 bits right
        x, y, z, w = ((b >> 32) & LOW) ^ y ^ k_0, b & LOW, ((a >> 32) & LOW) ^ w ^ k_1, a & LOW
        k_0, k_1 = (k_0 + 0x9E3779B9) & LOW, (k_1 + 0xBB67AE85) & LOW
    return x, y, z, w


def words(seed: Tensor, position: Tensor, quad: Tensor | int) -> Words:
    """Draw the words of `quad` at `position`, broadcast. seed (2,) int64 holds the seed and the offset."""
    position, quads = torch.broadcast_tensors(position, torch.as_tensor(quad, device=position.device))
    return philox(seed[0], (quads, position & LOW, position >> 32, (seed[1] & LOW).expand_as(position)))


def uniform(high: Tensor, low: Tensor) -> Tensor:
    """Make float64 uniforms in [0, 1) from the upper 53 bits of two words."""
    return ((high << 21) | (low >> 11)).double() * 2.0**-53


def choices(seed: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the two uniforms of a token at `position`: whether the token changes, and to what."""
    x, y, z, w = words(seed, position, TOKEN_QUAD)
    return uniform(x, y), uniform(z, w)


def hat_choice(seed: Tensor, position: Tensor) -> Tensor:
    """Draw the uniform of z0_hat = w[v], v ~ p, at `position`."""
    x, y, _, _ = words(seed, position, HAT_QUAD)
    return uniform(x, y)


def normals(seed: Tensor, position: Tensor, dim: int) -> Tensor:
    """Draw standard normals at positions (...) by Box and Muller (1958). Returns (..., dim) float32.

    Element e is normal e // n of the four normals of quad e % n, n = ceil(dim / 4): neighbours are in different quads,
    which suits vector units.
    """
    quads = torch.arange((dim + 3) // 4, device=position.device)
    x, y, z, w = words(seed, position[..., None], quads)
    pairs = []
    for a, b in ((x, y), (z, w)):
        radius = (-2 * ((a >> 1).float() * 2.0**-31 + 2.0**-33).log()).sqrt()
        angle = b.double() * (2 * math.pi * 2.0**-32)
        pairs += [radius * angle.cos().float(), radius * angle.sin().float()]
    return torch.cat(pairs, -1)[..., :dim]
