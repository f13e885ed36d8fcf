"""What made a run: run.json in its folder has every setting, and a line for each start: versions, machine, commit."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

FILE = "run.json"
PACKAGES = ("cadd_min", "torch", "numpy", "tiktoken", "transformers", "tokenizers", "peft", "safetensors")


def record(out: Path, settings: dict[str, Any], start: dict[str, Any]) -> None:
    """Write run.json: the settings as they now are, and `start` after the starts before it."""
    path = out / FILE
    try:
        starts = [*json.loads(path.read_text())["starts"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        starts = []
    part = path.with_suffix(".tmp")
    try:
        part.write_text(json.dumps({**settings, "starts": [*starts, start | _here(start)]}, indent=1) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _here(start: dict[str, Any]) -> dict[str, Any]:
    device = str(start.get("device"))
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "commit": _commit(),
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


def _commit() -> str | None:
    """The commit of these sources, with a + if they were changed since; None outside of a git checkout."""

    def git(*args: str) -> str:
        root = Path(__file__).parents[2]
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
