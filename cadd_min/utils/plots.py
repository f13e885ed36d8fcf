"""Matplotlib for pictures in files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def no_notebook() -> Iterator[None]:
    """Hide the MPLBACKEND of a notebook from matplotlib: it names a module that only the notebook has."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def pyplot() -> Any:
    """Return the module matplotlib.pyplot, which draws to files. Raises ImportError where it is not installed."""
    with no_notebook():
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        return plt
