"""A GIF of a text being written: each token has its place from the first frame, so nothing moves (sample.py --gif)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cadd_min.data.image_files import pillow
from cadd_min.data.tokenizer import Tokenizer
from cadd_min.model import Model
from cadd_min.sampler import Step
from cadd_min.sampling import pictures
from cadd_min.sampling.page import pieces
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import check_writable

WIDTH, LINE, MARGIN, SIZE, SMALL = 760, 46, 18, 19, 12  # pixels: of the picture, of a line and its margin, of letters
PAPER, INK, BAR, BELIEF, FRESH = (255, 255, 255), (31, 35, 40), (213, 219, 225), (90, 140, 200), (190, 80, 10)
MOST = 160  # tokens that are shown


def check_gif(path: Path) -> None:
    """Raise InputError before sampling where `path` cannot become a GIF."""
    if path.suffix.lower() != ".gif":
        raise InputError(f"--gif must be a file that ends in .gif, not {path}")
    pillow()
    check_writable(path, "--gif")


class TextFilm:
    """A sampler callback that keeps the first sample's steps for a GIF: masks as bars, fresh tokens in colour.

    Beneath a bar stands the token that z0_hat believes in, or without latents the most probable token.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, steps: int, most: int = 80):
        self.model, self.tokenizer = model, tokenizer
        self.kept = set(np.linspace(0, steps - 1, min(steps, most)).round().astype(int).tolist())
        self.states: list[tuple[Tensor, Tensor]] = []  # x and what is believed, (L,) each
        self.x: Tensor | None = None

    def __call__(self, step: Step) -> None:
        self.x = step.x[0]
        if step.number in self.kept:
            self.states.append((self.x[:MOST].cpu(), step.belief()[0, :MOST].cpu()))

    def save(self, path: Path) -> str:
        """Write the GIF. Returns its path, and what was left out, in words."""
        assert self.x is not None
        shown = f" (the first {MOST} of {len(self.x)} tokens)" if len(self.x) > MOST else ""
        return f"{pictures.save(path, *self.frames(), option='--gif', seconds=6)}{shown}"

    def frames(self) -> list[np.ndarray]:
        """Draw all states that were kept, (H, W, 3) uint8 each."""
        assert self.x is not None
        words = [" " if text.isspace() else text for text in pieces(self.x[:MOST].tolist(), self.tokenizer)]
        font, small = (load_font(size) for size in (SIZE, SMALL))
        places, height = layout(words, font)
        frames, before = [], None
        ended = self.x[:MOST].cpu()  # a chain ends early where nothing is masked, maybe between two kept steps
        for x, belief in [*self.states, (ended, ended)]:
            frames.append(self.draw(x, belief, before, words, places, height, (font, small)))
            before = x
        return frames

    def draw(
        self, x: Tensor, belief: Tensor, before: Tensor | None, words: list[str], places: Any, height: int, fonts: Any
    ) -> np.ndarray:
        """Draw one state as (H, W, 3) uint8."""
        from PIL import Image, ImageDraw

        picture = Image.new("RGB", (WIDTH, height), PAPER)
        canvas, (font, small) = ImageDraw.Draw(picture), fonts
        for n, (word, (left, top, width)) in enumerate(zip(words, places)):
            if x[n] != self.model.mask_id:
                fresh = before is None or before[n] == self.model.mask_id
                canvas.text((left, top), word, FRESH if fresh else INK, font)
                continue
            canvas.rounded_rectangle((left + 1, top + 5, left + max(width, 5) - 2, top + 19), 3, BAR)
            guess = self.tokenizer.decode([int(belief[n])]).strip()
            while guess and small.getlength(guess) > width + 4:
                guess = guess[:-1]
            canvas.text((left + width / 2, top + 22), guess, BELIEF, small, anchor="ma")
        return np.asarray(picture)


def load_font(size: int) -> Any:
    """Return Pillow's own font."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def layout(words: list[str], font: Any) -> tuple[list[tuple[float, int, float]], int]:
    """Place words in lines. Returns (left, top, width) of each in pixels, and the picture's height."""
    left, top, places = float(MARGIN), MARGIN, []
    for word in words:
        width = font.getlength(word)
        if left + width > WIDTH - MARGIN:
            left, top = float(MARGIN), top + LINE
        places.append((left, top, width))
        left += width
    return places, top + LINE
