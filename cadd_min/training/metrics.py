"""What a run leaves to look at: metrics.jsonl, a loss curve, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends rows to out/metrics.jsonl. A resumed run first drops the rows of steps that it will do again."""

    def __init__(self, out: Path, step: int):
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= step] if self.path.exists() and step else []
        part = self.path.with_suffix(".tmp")
        try:
            part.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)
        self._file = self.path.open("a")
        self._board = _tensorboard(out)

    def write(self, step: int, **values: Any) -> None:
        """One row, on disk at once; a value that is not finite has no place in it."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files and draw the curve, as far as there is room for it."""
        with contextlib.suppress(OSError):
            self._file.close()
            if self._board is not None:
                self._board.close()
            loss_curve(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, up to one that is none: a crash may have cut short the last."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            if type(row["step"]) is not int or not all(map(math.isfinite, row.values())):
                break
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            break
        rows.append(row)
    return rows


def loss_curve(path: Path) -> Path | None:
    """Draw loss.png beside a metrics.jsonl; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(path)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    panels = (
        ("nats per masked token", ("ce", "val_ce")),
        ("nats per token", ("val_bound", "val_bound_discrete", "val_bound_continuous")),
        ("mean length of the latents", ("latent_norm",)),
    )
    for axis, (unit, names) in zip(axes, panels):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points), label=name, lw=1, marker="." if len(points) < 30 else None)
        axis.set(xlabel="step", ylabel=unit)
        if axis.lines:
            axis.legend(frameon=False)
    picture = path.with_name("loss.png")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    usual = threading.excepthook
    # its own thread meets a full disk, too, and has nobody to tell: fit.py says it
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else usual(args)
    return SummaryWriter(str(out))
