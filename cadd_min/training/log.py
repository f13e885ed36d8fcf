"""What a run leaves behind: metrics.jsonl, a loss curve, TensorBoard where it is installed, and run.json.

run.json says what made the run: every setting, and for each start the versions, the machine and the commit.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from cadd_min.utils.errors import ornament
from cadd_min.utils.files import atomic_write, write_json
from cadd_min.utils.plots import no_notebook, pyplot

ROOT = Path(__file__).parents[2]  # of a source checkout
RUN = "run.json"
PACKAGES = ("cadd_min", "torch", "numpy", "tiktoken", "transformers", "tokenizers", "peft", "safetensors")


class MetricsLog:
    """Append rows to out/metrics.jsonl. A resumed run first drops the rows of the steps that it will do again."""

    def __init__(self, out: Path, step: int):
        self.path = out / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= step] if self.path.exists() and step else []
        with atomic_write(self.path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("a")
        self._board = _tensorboard(out)

    def write(self, step: int, **values: Any) -> None:
        """Append a row, and flush it. Values that are not finite are left out."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        board, self._board = self._board, None
        if board is not None:
            with ornament("TensorBoard"):
                for name, value in values.items():
                    board.add_scalar(name, value, step)
                self._board = board  # it did not fail

    def close(self) -> None:
        """Close the files and draw the loss curve, as far as the disk has room for them."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board is not None:
            with ornament("TensorBoard"):
                self._board.close()
        with ornament("loss.png"):
            loss_curve(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl up to the first line that is not a row: a crash may have cut short the last."""
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
    """Draw loss.png beside a metrics.jsonl. Returns None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    plt = pyplot()
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


def record(out: Path, settings: dict[str, Any], start: dict[str, Any]) -> None:
    """Write run.json: the settings as they are now, and `start` behind the starts before it."""
    path = out / RUN
    try:
        starts = [*json.loads(path.read_text())["starts"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        starts = []
    write_json(path, {**settings, "starts": [*starts, start | _here(start)]}, indent=1)


def _here(start: dict[str, Any]) -> dict[str, Any]:
    device = str(start.get("device"))
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "commit": commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Name the commit of these sources, with a + where they have changed since. None outside of a git checkout."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _tensorboard(out: Path) -> Any:
    """Return TensorBoard's writer, or None where TensorBoard is not installed or fails."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    with ornament("TensorBoard"):
        return _writer(out)
    return None


def _writer(out: Path) -> Any:
    with no_notebook():  # TensorBoard's writer imports matplotlib
        from torch.utils.tensorboard import SummaryWriter

    usual = threading.excepthook
    # The writer's thread meets a full disk as well. The loop reports the full disk, so the thread stays silent.
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else usual(args)
    return SummaryWriter(str(out))
