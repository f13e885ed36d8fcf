"""Pictures of samples: a grid, a GIF of the path from noise to image, the forward process, the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadd_min import ops
from cadd_min.baselines.dispatch import draw
from cadd_min.data.image_files import pillow
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
    """Draw tokens (N, L) as images (N, H, W, 3) uint8. A masked value has its colour of MASKED, a blue."""
    images = np.broadcast_to(pixels.decode(tokens), (len(tokens), *pixels.shape[:2], 3))
    masked = (tokens == pixels.mask_id).view(-1, *pixels.shape).cpu().numpy()
    return np.where(masked, np.array(MASKED, np.uint8), images)


def grid(images: np.ndarray, columns: int | None = None, scale: int | None = None, gap: int = 2) -> np.ndarray:
    """Draw images (N, H, W, 1 or 3) uint8 as one picture (rows (H scale + gap) + gap, columns (...) + gap, 3) uint8.

    columns: by default so many that the picture is about square; scale: the size of a drawn pixel, by default such that
    small images are about 48 pixels high.
    """
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    scale = scale or max(1, 48 // height)
    rows = math.ceil(count / columns)
    picture = np.full((rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (gap + n * (size * scale + gap) for n, size in zip(divmod(i, columns), (height, width)))
        picture[top : top + height * scale, left : left + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return picture


def save(path: Path, *frames: np.ndarray, option: str = "--out", seconds: float = 4.0) -> Path:
    """Write one picture (H, W, 3) uint8, or several as a GIF of about `seconds`. Returns the path.

    On failure nothing is left there. Raises InputError that names `option` where the file cannot be written.
    """
    Image = pillow()
    pictures = [Image.fromarray(frame) for frame in frames]
    animation: dict[str, Any] = {}
    if len(frames) > 1:
        durations = [max(20, int(1000 * seconds / len(frames)))] * (len(frames) - 1) + [1500]  # ms; the last one stays
        animation = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    try:
        with atomic_write(path) as part:
            pictures[0].save(part, path.suffix[1:], **animation)
    except (OSError, ValueError) as error:
        raise InputError(f"{option} {path} cannot be written: {reason(error)}") from None
    return path


class Film:
    """A sampler callback that keeps frames for a GIF: left the sample with its masks, right what z0_hat believes.

    images: the number of samples in a frame; most: the largest number of frames, spread evenly over the steps.
    """

    def __init__(self, pixels: Pixels, steps: int, images: int = 16, most: int = 80):
        self.pixels, self.images = pixels, images
        self.kept = set(np.linspace(0, steps - 1, min(steps, most)).round().astype(int))
        self.drawn: list[np.ndarray] = []
        self.last: Step | None = None

    def __call__(self, step: Step) -> None:
        self.last = step
        if step.number in self.kept:
            self.drawn.append(self.frame(step))

    def frame(self, step: Step) -> np.ndarray:
        """Draw one step, (H, W, 3) uint8."""
        sides = [grid(shown(tokens[: self.images], self.pixels)) for tokens in (step.x, step.belief())]
        return np.concatenate(sides, 1)

    def frames(self) -> list[np.ndarray]:
        """Return the kept frames, and the last step's. A chain ends early where nothing is masked."""
        assert self.last is not None
        return self.drawn if self.last.number in self.kept else [*self.drawn, self.frame(self.last)]


def frame(step: Step, pixels: Pixels) -> str:
    """Draw the first image for a terminal: left with its masks, right what z0_hat believes."""
    left, right = (shown(tokens[:1], pixels)[0] for tokens in (step.x, step.belief()))
    gap = np.zeros((len(left), 2, 3), np.uint8)
    return "what is masked | z0_hat\n" + blocks(np.concatenate([left, gap, right], 1))


def blocks(image: np.ndarray) -> str:
    """Draw an image (H, W, 3) as text for a terminal with 24-bit colours.

    One character, the upper half block, shows two pixels: its own colour above, its background's below.
    """
    image = np.pad(image, ((0, len(image) % 2), (0, 0), (0, 0)))
    lines = []
    for upper, lower in zip(image[::2], image[1::2]):
        cells = (f"\x1b[38;2;{a};{b};{c}m\x1b[48;2;{d};{e};{f}m▀" for (a, b, c), (d, e, f) in zip(upper, lower))
        lines.append("".join(cells) + RESET)
    return "\n".join(lines)


def strip(model: Model, x_0: Tensor, pixels: Pixels, times: int = 9, seed: int = 0) -> np.ndarray:
    """Draw the forward process on one image (1, L), at `times` times from t = 0 to 1.

    The upper row shows the masks, the lower row what the latents still tell. There a masked value is E[value | z_t]
    under the table alone, without the network and the neighbours. A model without latents has the upper row only.
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
    expected = (p @ torch.arange(pixels.levels, device=p.device, dtype=p.dtype)).round().long()
    lower = shown(torch.where(x_t == model.mask_id, expected, x_t), pixels)
    return grid(np.concatenate([upper, lower]), columns=times)


def preview(model: Model, pixels: Pixels, x_0: Tensor, out: Path | None, step: int) -> str:
    """Draw 36 samples of a model in training and write their grid to the folder `out`. Returns a line that names it.

    The first call also writes the forward process on the image x_0 (1, L). With out = None the samples are drawn, as
    in every process of a run, but not written.
    """
    if out is not None and not (out / "forward.png").exists():
        save(out / "forward.png", strip(model, x_0, pixels))
    count, classes = 36, model.config.classes
    label = torch.arange(count, device=x_0.device) % classes if classes else None
    denoiser = None if label is None else Guided(model, label)
    x = draw(model, count, Sampling(64, "soft"), denoiser=denoiser, generator=torch.Generator().manual_seed(0))
    return "" if out is None else f"samples in {save(out / f'samples-{step:06d}.png', grid(pixels.decode(x)))}"
