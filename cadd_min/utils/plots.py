"""Matplotlib for pictures in files."""

from __future__ import annotations

import os
from typing import Any


def pyplot() -> Any:
    """Return the module matplotlib.pyplot, which draws to files. Raises ImportError where it is not installed.

    A notebook's MPLBACKEND names a module that only the notebook has. Matplotlib checks the name when it is imported.
    """
    notebook = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    finally:
        if notebook is not None:
            os.environ["MPLBACKEND"] = notebook
    return plt
