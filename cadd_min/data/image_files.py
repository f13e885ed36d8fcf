"""Pictures in PNG and JPEG files, and folders of them."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np

from cadd_min.utils.errors import InputError, described, first_line

ENDINGS = (".png", ".jpg", ".jpeg")
MAY_BE_GREY = ("1", "L", "LA", "La", "P", "PA")  # kinds of image files without colours, or with colours by a palette


def classes(sides: dict[Path, list[Path]]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Number the pictures' folders: labels (N,) int64, and the folders' names. None where a picture is in no class.

    Raises InputError where a class has no picture to train on.
    """
    named = {side: [str(file.parent.relative_to(side)) for file in files] for side, files in sides.items()}
    if any("." in names for names in named.values()):
        return None, ()
    train, *rest = named.values()
    known = sorted(set(train), key=lambda name: by_number(Path(name)))
    for name in sorted({name for names in rest for name in names} - set(known))[:1]:
        raise InputError(f"--dataset: the class {name} has held-out images, and none to train on")
    return np.array([known.index(name) for names in named.values() for name in names]), tuple(known)


def by_number(path: Path) -> list[tuple[str, int]]:
    """Return a key that sorts paths with their numbers as numbers: 2 before 10."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", str(path))]


def stack(files: list[tuple[str, bytes]], path: Path) -> np.ndarray:
    """Decode image files, given as (name, bytes), into (N, H, W, C). Grey among coloured images get three colours.

    Raises InputError where their sizes differ.
    """
    images = [read_image(data, name) for name, data in files]
    colours = max(image.shape[2] for image in images)
    for image, (name, _) in zip(images, files):
        if image.shape[:2] != images[0].shape[:2]:
            sizes = " and ".join("x".join(map(str, shape[:2])) for shape in (images[0].shape, image.shape))
            raise InputError(f"--dataset {path} has images of mixed sizes, {sizes} ({name}): make them all one size")
    return np.stack([np.broadcast_to(image, (*image.shape[:2], colours)) for image in images])


def pillow() -> Any:
    """Return the module PIL.Image. Raises InputError where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError("pictures need their package: pip install pillow") from None
    return Image


def read_image(data: bytes, name: str) -> np.ndarray:
    """Decode an image file as a viewer shows it: (H, W, 3) uint8, or (H, W, 1) where the image is grey.

    Its EXIF orientation is applied, and what is transparent is white. name: of the image, for errors. Raises InputError
    where `data` is no image, or has more than 8 bits a colour.
    """
    Image = pillow()
    from PIL import ImageOps

    try:
        with Image.open(io.BytesIO(data)) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):  # a conversion would clip the values at 255
                raise InputError(f"{name} has more than 8 bits a colour: convert it first")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            rgb = np.asarray(image.convert("RGB"))
            grey = file.mode in MAY_BE_GREY and (rgb == rgb[..., :1]).all()
            return rgb[..., :1] if grey else rgb
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large: {first_line(error)}") from None
    except Exception as error:  # a damaged image may raise anything
        raise InputError(f"{name} is not an image that can be read: {described(error)}") from None
