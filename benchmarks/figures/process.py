"""The forward and the reverse process on a sentence and a digit, row by row, from docs/tables/process.json."""

from __future__ import annotations

import json
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.figures.style import CADD, DOCS, FAINT, INK, MDLM, headline
from benchmarks.figures.tables import text_of

MASK_RGB, LEVELS = (0.27, 0.35, 0.59), 16  # a blue that no grey image has; the largest value of a digit's pixel
TITLES = (
    "time, clocks",
    "characters; beneath a mask what its latent alone says, bold where right",
    "pixels",
    "latents",
)
SAYS = 0.02  # a latent whose most probable token is less probable says nothing
BOLD = {False: "normal", True: "bold"}
WIDTHS = [1.3, 9, 0.7, 0.7]
MARGINS = {"left": 0.01, "right": 0.99, "top": 0.84, "bottom": 0.02}


def forward() -> Figure:
    """Draw the forward process: tokens are masked one by one, and their latents drown in noise."""
    return process(
        "forward",
        "Forward: a character is masked at once, its latent (blue, beneath) drowns in noise step by step.",
    )


def reverse() -> Figure:
    """Draw the reverse process: latents settle first, then their tokens are drawn."""
    return process(
        "reverse",
        "Reverse: characters are drawn in random order, while the latents move from noise to what the network expects.",
    )


def process(which: str, sentence: str) -> Figure:
    """Draw one row for each stored time: the clocks, the sentence, the digit, and what the digit's latents say."""
    stored = json.loads(text_of(DOCS / "tables" / "process.json"))
    text, digits = stored["text"][which], stored["digits"][which]
    figure = plt.figure(figsize=(9.6, 0.56 * len(text) + 0.9))
    headline(figure, sentence)
    grid = figure.add_gridspec(len(text), 4, width_ratios=WIDTHS, wspace=0.06, hspace=0.18, **MARGINS)
    for row, (words, digit) in enumerate(zip(text, digits)):
        panels = [figure.add_subplot(grid[row, column]) for column in range(4)]
        label(panels[0], words)
        characters(panels[1], words, truth=text[0 if which == "forward" else -1])
        for axes, values in zip(panels[2:], digit["cells"]):
            picture(axes, values)
        for axes, title, side in zip(panels, TITLES, ("left", "left", "center", "center")):
            axes.axis("off")
            if row == 0:
                axes.set_title(title, loc=side)
    return figure


def label(axes: Axes, frame: dict[str, Any]) -> None:
    """Write the time and both clocks."""
    axes.text(0, 0.72, f"t = {frame['t']:.2f}", fontweight="bold", va="center")
    axes.text(
        0, 0.2, rf"$\alpha$ {frame['alpha']:.2f}   $\bar\gamma$ {frame['gamma_bar']:.2f}", va="center", fontsize=8
    )


def characters(axes: Axes, frame: dict[str, Any], truth: dict[str, Any]) -> None:
    """Write a sentence: characters that are unmasked, bars where masked, and beneath a bar what its latent says."""
    axes.set(xlim=(0, len(frame["cells"])), ylim=(0, 1))
    fresh = frame.get("fresh", [False] * len(frame["cells"]))
    for place, ((token, latent, p), new) in enumerate(zip(frame["cells"], fresh)):
        style = {"x": place + 0.5, "ha": "center", "va": "center", "family": "monospace", "fontsize": 11}
        if token is None:
            right = latent == truth["cells"][place][0] and p >= SAYS
            axes.add_patch(Rectangle((place + 0.1, 0.55), 0.8, 0.36, color=FAINT, alpha=0.35, linewidth=0))
            axes.text(y=0.2, s=glyph(latent, p), color=CADD, alpha=1 if right else 0.5, weight=BOLD[right], **style)
        else:
            axes.text(y=0.72, s=token, color=MDLM if new else INK, weight=BOLD[new], **style)


def glyph(token: str, p: float) -> str:
    """Return one sign for what a latent says: a dot where it says nothing, marks for an end of line or of text."""
    return "·" if p < SAYS else {"\n": "↵", "<|endoftext|>": "¶"}.get(token, token)


def picture(axes: Axes, values: list[int | None]) -> None:
    """Draw the values of a digit's pixels, masked ones in blue."""
    side = int(len(values) ** 0.5)
    image = np.array([MASK_RGB if value is None else (value / LEVELS,) * 3 for value in values])
    axes.imshow(image.reshape(side, side, 3), interpolation="nearest")
