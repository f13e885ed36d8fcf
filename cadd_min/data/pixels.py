"""Images to tokens and back. Each value of each colour is one token, in the order of memory (H, W, C)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cadd_min.utils.errors import InputError


@dataclass(frozen=True)
class Pixels:
    """The codec of images of one shape (H, W, C), whose values come in `levels` levels from black to white.

    It is to images what a tokenizer is to text. Checkpoints carry its `spec`.
    """

    shape: tuple[int, int, int]
    levels: int = 256
    kind: ClassVar[str] = "pixels"

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 256:
            raise InputError(f"an image needs 2 to 256 levels, not {self.levels}")

    @property
    def vocab_size(self) -> int:
        """Return the number of values of a pixel."""
        return self.levels

    @property
    def mask_id(self) -> int:
        """Return the id of the mask, which follows the values."""
        return self.levels

    @property
    def length(self) -> int:
        """Return the number of tokens in an image, H W C."""
        return math.prod(self.shape)

    def spec(self) -> dict[str, Any]:
        """Return the plain values from which `from_spec` rebuilds the codec."""
        return {"kind": self.kind, "shape": list(self.shape), "levels": self.levels}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Pixels:
        """Rebuild the codec from its `spec`. Raises InputError where the spec is damaged."""
        shape, levels = spec.get("shape"), spec.get("levels")
        if not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)):
            raise InputError(f"images must have a height, a width and colours, not {shape!r}")
        if type(levels) is not int or shape[2] not in (1, 3):
            raise InputError(f"images must have 1 or 3 colours and a number of levels, not {shape[2]} and {levels!r}")
        return cls((shape[0], shape[1], shape[2]), levels)

    def encode(self, images: np.ndarray) -> Tensor:
        """Round images (N, H, W, C) uint8 to the nearest levels: tokens (N, L) int64.

        Raises InputError for images of another shape.
        """
        if images.shape[1:] != self.shape:
            raise InputError(f"images must be of the shape {self.shape}, not {images.shape[1:]}")
        values = torch.from_numpy(np.array(images)).flatten(1).long()
        return values if self.levels == 256 else (values * (self.levels - 1) + 127) // 255

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Turn tokens (N, L) into images (N, H, W, C) uint8, from 0 (black) to 255 (white). A mask becomes black."""
        values = (tokens * 255 + (self.levels - 1) // 2) // (self.levels - 1)
        values = torch.where(tokens == self.mask_id, 0, values)
        return values.to(torch.uint8).view(-1, *self.shape).cpu().numpy()
