"""One look for all figures: SVG without a background, readable on a light and on a dark page.

INK is the colour of text and axes. A browser that prefers a dark page draws it lighter, by a style sheet in the file.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cadd_min.utils.errors import InputError, reason
from cadd_min.utils.files import atomic_write

DOCS = Path(__file__).parents[2] / "docs"
INK, FAINT = "#57606a", "#8b949e"
CADD, MDLM, CDM, STRONG = "#2f7de1", "#c4661f", "#1a936f", "#9a55c9"
ON_DARK = {INK: "#c9d1d9", CADD: "#58a6ff", MDLM: "#f0883e", CDM: "#3fb98f", STRONG: "#bc8cff"}

plt.rcParams.update({
    "svg.hashsalt": "cadd_min",  # the same figure has the same bytes
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
})  # fmt: skip


def panels(
    sentence: str, columns: int, height: float = 2.6, width: float = 9.0, **options: object
) -> tuple[Figure, list[Axes]]:
    """Make a figure with one row of axes. `sentence` stands above it and says what to see."""
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False, **options)
    headline(figure, sentence)
    return figure, list(axes[0])


def headline(figure: Figure, sentence: str) -> None:
    """Write a sentence above a figure, at its left edge."""
    figure.suptitle(sentence, x=0.005, ha="left", fontsize=10, fontweight="bold")


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as SVG, whole or not at all. Returns the path. Raises InputError where it cannot be written."""
    try:
        with atomic_write(path) as part:
            figure.savefig(part, format="svg", transparent=True, metadata={"Date": None})
            part.write_text(with_dark_colours(part.read_text()))
    except OSError as error:
        raise InputError(f"--out {path} cannot be written: {reason(error)}") from None
    finally:
        plt.close(figure)
    return path


def with_dark_colours(svg: str) -> str:
    """Add the style sheet that draws the colours of ON_DARK for a page that is dark."""
    rules = [
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in ON_DARK.items()
        for kind in ("fill", "stroke")
    ]
    sheet = "<style>@media (prefers-color-scheme: dark){" + "".join(rules) + "}</style>"
    head, tag, rest = svg.partition("<defs>")
    return head + sheet + tag + rest
