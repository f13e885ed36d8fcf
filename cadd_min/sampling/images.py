"""What sample.py does with a model of images: classes, guidance, inpainting, and where the pictures go."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadd_min.data.image_files import read_image
from cadd_min.data.pixels import Pixels
from cadd_min.model import Guided, Model
from cadd_min.sampler import Step
from cadd_min.sampling.generate import Watch, together
from cadd_min.sampling.pictures import Film, frame, grid, save
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import check_writable


class ImageTask:
    """What sample.py does with a model of images. Raises InputError for options that do not fit the model.

    class_names: the names of the model's classes by their numbers, where they are known.
    """

    zhat, num = "soft", 64  # "hard" loses variety in images: docs/images.md

    def __init__(self, model: Model, pixels: Pixels, args: argparse.Namespace, class_names: Sequence[str] = ()):
        self.model, self.pixels, self.args, self.class_names = model, pixels, args, class_names
        if args.prompt is not None:
            raise InputError(f"--prompt is for models of text, and --ckpt {args.ckpt} is one of images: use --inpaint")
        for name in ("out", "gif"):
            path, ending = getattr(args, name), ".png" if name == "out" else ".gif"
            if path is not None and path.suffix.lower() != ending:
                raise InputError(f"--{name} must be a file that ends in {ending}, not {path}")
        if args.gif is not None:
            check_writable(args.gif, "--gif")
        self.film: Film | None = None
        self._check_classes()
        self.inpainted = self._inpainted()

    def _check_classes(self) -> None:
        args, classes = self.args, self.model.config.classes
        for name in ("classes", "guidance"):
            if getattr(args, name) is not None and not classes:
                raise InputError(
                    f"--{name} needs a model of classes, and --ckpt {args.ckpt} was trained without labels"
                )
        for label in args.classes or ():
            if not 0 <= label < classes:
                raise InputError(f"--classes must be from 0 to {classes - 1}, not {label}")

    def _inpainted(self) -> Tensor | None:
        """Return the tokens (L,) of the image to paint in, mask_id where the mask is white, or None."""
        if (self.args.inpaint is None) != (self.args.mask is None):
            raise InputError("--inpaint and --mask go together: an image, and where to paint in it")
        if self.args.inpaint is None:
            return None
        image, mask = (_open(name, getattr(self.args, name), self.pixels) for name in ("inpaint", "mask"))
        white = torch.from_numpy(mask.max(-1, keepdims=True) >= 128).expand(self.pixels.shape).flatten()  # (L,)
        return torch.where(white, self.pixels.mask_id, self.pixels.encode(image[None])[0])

    def denoiser(self, count: int) -> Any:
        """Return the model, or for a model of classes its guided denoiser, which draws the classes in turn."""
        if not self.model.config.classes:
            return self.model
        classes = torch.tensor(self.args.classes or range(self.model.config.classes))
        label = classes[torch.arange(count) % len(classes)].to(self.model.device)  # (count,)
        return Guided(self.model, label, 1.0 if self.args.guidance is None else self.args.guidance)

    def prompt(self, count: int) -> Tensor | None:
        """Return the image to paint in for all samples (count, L), or None without --inpaint."""
        return None if self.inpainted is None else self.inpainted.expand(count, -1)

    def callback(self, steps: int) -> Callable[[Step], None] | None:
        """Return a callback that serves --watch and --gif, or None without either."""
        watch = Watch(self.pixels.mask_id, steps, lambda step: frame(step, self.pixels)) if self.args.watch else None
        self.film = Film(self.pixels, steps) if self.args.gif else None
        return together(watch, self.film)

    def show(self, x: Tensor, zhat: str = "") -> None:
        """Write the grid of the samples (B, L), and the GIF of their path where --gif is given.

        zhat: the estimate of z_0 where there are several. The grid's name then ends in it.
        """
        columns = len(self.args.classes) if self.args.classes and len(self.args.classes) > 1 else None
        out = self.args.out or Path("samples.png")
        out = out.with_stem(f"{out.stem}-{zhat}") if zhat else out
        print(f"samples in {save(out, grid(self.pixels.decode(x), columns))}")
        if self.film is not None:
            print(f"their path in {save(self.args.gif, *self.film.frames(), option='--gif')}")

    def settings(self) -> str:
        """Return the classes and the guidance, which follow the sampler's settings. Empty without classes."""
        if not self.model.config.classes:
            return ""
        guidance = 1.0 if self.args.guidance is None else self.args.guidance
        drawn = self.args.classes or (range(len(self.class_names)) if self.class_names else ())
        which = ", ".join(f"{n} {self.class_names[n]}" if self.class_names else str(n) for n in drawn)
        return f", classes {which or 'all'}, guidance {guidance}"


def _open(option: str, path: Path, pixels: Pixels) -> np.ndarray:
    """Read the image of --option as (H, W, C) uint8 of the model's shape. Colours are converted, sizes are not.

    Raises InputError for a file that cannot be read, and for another size.
    """
    try:
        image = read_image(path.read_bytes(), f"--{option} {path}")
    except OSError as error:
        raise InputError(f"--{option} {path} cannot be read: {error.strerror}") from None
    height, width, colours = pixels.shape
    if image.shape[:2] != (height, width):
        raise InputError(
            f"--{option} must be {height} x {width} pixels, not {image.shape[0]} x {image.shape[1]} ({path})"
        )
    if colours == 1 and image.shape[2] == 3:
        image = image.mean(-1, keepdims=True).round().astype(np.uint8)
    return np.broadcast_to(image, pixels.shape)
