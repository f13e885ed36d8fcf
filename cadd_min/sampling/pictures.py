"""What there is to see of images: a grid, the path from noise to image, the forward process, the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadd_min import ops
from cadd_min.baselines.dispatch import draw
from cadd_min.data.images import pillow
from cadd_min.data.pixels import Pixels
from cadd_min.latent import log_likelihood
from cadd_min.model import Guided, Model
from cadd_min.orders import Sampling
from cadd_min.sampler import Step
from cadd_min.utils.errors import InputError, reason
from cadd_min.utils.files import atomic_write

MASKED = (70, 90, 150)  # a blue that no grey image has
RESET = "\x1b[0m"


def shown(tokens: Tensor, pixels: Pixels) -> np.ndarray:
    """(N, L) -> (N, H, W, 3) uint8, blue where a value is masked."""
    images = np.broadcast_to(pixels.decode(tokens), (len(tokens), *pixels.shape[:2], 3))
    masked = (tokens == pixels.mask_id).view(-1, *pixels.shape).cpu().numpy()
    return np.where(masked, np.array(MASKED, np.uint8), images)


def grid(images: np.ndarray, columns: int | None = None, scale: int | None = None, gap: int = 2) -> np.ndarray:
    """(N, H, W, 1 or 3) uint8 -> one picture of all, (rows (H scale + gap) + gap, ..., 3), as square as it gets.

    scale: how large a pixel is drawn (default: small images at about 48 pixels).
    """
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    scale = scale or max(1, 48 // height)
    rows = math.ceil(count / columns)
    picture = np.full((rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (gap + (n * (size * scale + gap)) for n, size in zip(divmod(i, columns), (height, width)))
        picture[top : top + height * scale, left : left + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return picture


def save(path: Path, *frames: np.ndarray, option: str = "--out", seconds: float = 4.0) -> Path:
    """Write one picture (H, W, 3), or of several a GIF that lasts so long; whole or not at all."""
    Image = pillow()
    pictures = [Image.fromarray(frame) for frame in frames]
    more: dict[str, Any] = {}
    if len(frames) > 1:
        durations = [max(20, int(1000 * seconds / len(frames)))] * (len(frames) - 1) + [1500]  # and look at the end
        more = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    try:
        with atomic_write(path) as part:
            pictures[0].save(part, path.suffix[1:], **more)
    except (OSError, ValueError) as error:
        raise InputError(f"{option} {path} cannot be written: {reason(error)}") from None
    return path


class Film:
    """A sampler callback that keeps, for a GIF, what is still masked, and what the latent believes beside it."""

    def __init__(self, pixels: Pixels, steps: int, images: int = 16, most: int = 80):
        self.pixels, self.images = pixels, images
        self.kept = set(np.linspace(0, steps - 1, min(steps, most)).round().astype(int))
        self.frames: list[np.ndarray] = []

    def __call__(self, step: Step) -> None:
        if step.number not in self.kept:
            return
        sides = [grid(shown(tokens[: self.images], self.pixels)) for tokens in (step.x, step.belief())]
        self.frames.append(np.concatenate(sides, 1))


def frame(step: Step, pixels: Pixels) -> str:
    """The first image for a terminal: left what is masked, right what is believed."""
    left, right = (shown(tokens[:1], pixels)[0] for tokens in (step.x, step.belief()))
    gap = np.zeros((len(left), 2, 3), np.uint8)
    return "what is masked | z0_hat\n" + blocks(np.concatenate([left, gap, right], 1))


def blocks(image: np.ndarray) -> str:
    """(H, W, 3) as text for a terminal with 24-bit colours: a character, the upper half block, is two pixels."""
    image = np.pad(image, ((0, len(image) % 2), (0, 0), (0, 0)))
    lines = []
    for upper, lower in zip(image[::2], image[1::2]):
        cells = (f"\x1b[38;2;{a};{b};{c}m\x1b[48;2;{d};{e};{f}m▀" for (a, b, c), (d, e, f) in zip(upper, lower))
        lines.append("".join(cells) + RESET)
    return "\n".join(lines)


def strip(model: Model, x_0: Tensor, pixels: Pixels, times: int = 9, seed: int = 0) -> np.ndarray:
    """The forward process on one image (1, L), from t = 0 to 1: above what is masked, below what the latents still say.

    Below, a masked value is E[value | z_t] under the table alone, which is all that the latent knows by itself.
    """
    x_0, t = x_0.expand(times, -1), torch.linspace(0, 1, times, device=x_0.device)
    table = model.table().detach()
    x_t, z_t = ops.forward_noising(
        x_0, x_0, table, t, model.schedule, model.mask_id, torch.tensor([seed, 0]).to(t.device)
    )
    upper = shown(x_t, pixels)
    if table.shape[1] == 0:
        return grid(upper, columns=times)
    p = log_likelihood(z_t, t.clamp(min=1e-6), table[: pixels.levels], model.schedule).softmax(-1)
    told = (p @ torch.arange(pixels.levels, device=p.device, dtype=p.dtype)).round().long()
    lower = shown(torch.where(x_t == model.mask_id, told, x_t), pixels)
    return grid(np.concatenate([upper, lower]), columns=times)


def preview(model: Model, pixels: Pixels, x_0: Tensor, out: Path | None, step: int) -> str:
    """Write a grid of samples of a model in training, and at first the forward process on the image x_0 (1, L).

    out: None draws them all the same, and writes nothing.
    """
    if out is not None and not (out / "forward.png").exists():
        save(out / "forward.png", strip(model, x_0, pixels))
    count, classes = 36, model.config.classes
    label = torch.arange(count, device=x_0.device) % classes if classes else None
    denoiser = None if label is None else Guided(model, label)
    x = draw(model, count, Sampling(64, "soft"), denoiser=denoiser, generator=torch.Generator().manual_seed(0))
    return "" if out is None else f"samples in {save(out / f'samples-{step:06d}.png', grid(pixels.decode(x)))}"
