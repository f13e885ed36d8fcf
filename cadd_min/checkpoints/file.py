"""A run's checkpoint, one file that holds everything: weights, EMA, optimiser, step, settings, tokenizer.

The file is torch.save's zip archive, whose comment is the SHA-256 of all bytes before it. A file that is cut short or
has a wrong bit is recognised. In a run's folder the previous checkpoint is then used instead.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cadd_min.data.pixels import Pixels
from cadd_min.utils.cli import fits
from cadd_min.utils.device import launched
from cadd_min.utils.errors import InputError, reason, shown
from cadd_min.utils.files import atomic_write

FORMAT, VERSION = "cadd_min", 3
FILE, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
PARTS = ("model_config", "tokenizer", "settings", "trainer")  # what a model's checkpoint is made of
DIGEST = 32  # bytes of SHA-256


class Hashing:
    """A file for torch.save that computes the SHA-256 of what is written, and keeps the reason of a failure.

    torch reports a full disk without its reason.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.sha, self.reason = file, hashlib.sha256(), ""

    def write(self, data: Any) -> int:
        """Write and hash. Raises OSError, and keeps its reason."""
        self.sha.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.reason = error.strerror or ""
            raise

    def flush(self) -> None:
        self.file.flush()


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path`, whole or not at all. A run's FILE that was there before is kept as PREVIOUS.

    Raises InputError, and leaves the file before it untouched.
    """
    hashing = None
    try:
        with atomic_write(path) as part:
            with part.open("wb") as file:
                hashing = Hashing(file)
                torch.save({"format": FORMAT, "version": VERSION, **content}, hashing)  # type: ignore[arg-type]
                file.seek(-2, os.SEEK_END)  # an archive ends with the length of its comment
                file.write(DIGEST.to_bytes(2, "little") + hashing.sha.digest())
                file.flush()
                os.fsync(file.fileno())  # a full disk may say so only now, when the old file is still in place
            if path.name == FILE and path.exists() and _digest_matches(path):  # a damaged file must not replace a good
                os.replace(path, path.with_name(PREVIOUS))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        why = (hashing.reason if hashing else "") or reason(error)
        raise InputError(f"could not save {path} ({why}); the checkpoint before it is untouched") from None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors and plain values only: nothing in it is ever executed.

    path: the file, its folder, or a folder of runs. If a run's FILE is damaged or missing you get a warning, and the
    previous one is loaded. (It is missing where a run died between two renames.) Raises InputError.
    """
    path = find(path)
    previous = path.with_name(PREVIOUS)
    try:
        return _load(path)
    except InputError as error:
        if path.name != FILE or not previous.exists() or path.is_dir():
            raise
        content = _load(previous)
        trainer = content.get("trainer")
        step = trainer.get("step") if isinstance(trainer, dict) else "unknown"
        print(f"warning: {error}; using the one before it, {previous}, of step {step}", file=sys.stderr)
        return content


def _load(path: Path) -> dict[str, Any]:
    try:  # the checksum first: a damaged archive can make torch.load fail in any way, or not at all
        # mapped into memory, the file is there once for all processes
        options: dict[str, Any] = {"map_location": "cpu", "weights_only": True, "mmap": launched()}
        content = torch.load(path, **options) if _digest_matches(path) else None
    except Exception:
        content = None
    if content is None:
        raise InputError(f"{path} is not a checkpoint, or it is damaged (its checksum is missing or another)")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this project")
    if content.get("version") != VERSION:
        raise InputError(f"{path} has checkpoint version {shown(repr(content.get('version')))}, expected {VERSION}")
    return with_new_names(content)


def with_new_names(content: dict[str, Any]) -> dict[str, Any]:
    """Return a content in which the schedule that was called "gone" has the name that it has today."""
    for part in ("model_config", "settings"):
        values = content.get(part)
        if isinstance(values, dict) and values.get("discrete") == "gone":
            values["discrete"] = "all-at-once"
    return content


def _digest_matches(path: Path) -> bool:
    sha, left = hashlib.sha256(), path.stat().st_size - DIGEST - 2
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            sha.update(block)
            left -= len(block)
        sha.update(bytes(2))  # while the file was hashed, its comment had the length 0
        return file.read() == DIGEST.to_bytes(2, "little") + sha.digest()


def find(path: Path) -> Path:
    """Return the path of a checkpoint: `path` itself, a run folder's FILE, or that of the newest run in a folder.

    Raises InputError where there is no checkpoint.
    """
    if path.is_dir():
        runs = [path] if holds_run(path) else sorted(filter(holds_run, path.glob("*/")), key=_saved)
        if not runs:
            raise InputError(f"there is no checkpoint in {path}: train one first (make train)")
        return runs[-1] / FILE
    if not path.exists() and not (path.name == FILE and holds_run(path.parent)):
        raise InputError(f"there is no checkpoint at {path}: train one first (make train)")
    return path


def check_data(content: dict[str, Any], digest: str, name: str, anyway: bool) -> None:
    """Raise InputError unless the data with this digest is what the checkpoint was trained on.

    name: of the data, for the message; anyway: accept other data. A checkpoint without a digest accepts all data.
    """
    trained_on = content.get("data")
    if trained_on not in (None, digest) and not anyway:
        raise InputError(
            f"{name} has changed since the run was trained on it: what is held out now may have been trained on then "
            "(--anyway: go on with it)"
        )


def holds_run(folder: Path) -> bool:
    """Tell whether a folder has a checkpoint, or at least the previous one."""
    return (folder / FILE).exists() or (folder / PREVIOUS).exists()


def _saved(folder: Path) -> float:
    return max(os.path.getmtime(folder / name) for name in (FILE, PREVIOUS) if (folder / name).exists())


def model_dict(config: Any) -> dict[str, Any]:
    """Return a model's configuration, a ModelConfig or an UpgradeConfig, as plain values."""
    values = dataclasses.asdict(config)
    if "size" in values:
        values["size"]["kind"] = type(config.size).__name__
    return values


def check_outline(content: dict[str, Any], where: Path) -> None:
    """Raise InputError where a part of a model's checkpoint is missing or malformed, its shape and weights apart."""
    for name in PARTS:
        if not isinstance(content.get(name), dict):
            raise InputError(f"{where} is not a whole checkpoint: {name} is missing or malformed")
    step, settings = content["trainer"].get("step"), content["settings"]
    if not (step == "unknown" or (fits(step, int) and step >= 0)):
        raise InputError(f"{where} is not a whole checkpoint: its step is {shown(repr(step))}")
    for name in ("dataset", "archive", "dtype", "script"):
        if not isinstance(settings.get(name, ""), str | None):
            raise InputError(f"{where} is damaged: its setting {name} is {shown(repr(settings[name]))}")


def trained_by(content: dict[str, Any]) -> str:
    """Name the script that trained a checkpoint."""
    image = content["tokenizer"].get("kind") == Pixels.kind
    return content["settings"].get("script", "train_image.py" if image else "train_text.py")


def check_shapes(state: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise InputError that names the first tensor of `state` which is missing, misshapen or left over."""
    for name, shape in shapes.items():
        tensor = state.get(name)
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{name} is missing")
        if tensor.shape != shape:
            raise InputError(f"{name} has the shape {tuple(tensor.shape)}, expected {shape}")
    for name in sorted(state.keys() - shapes.keys())[:1]:
        raise InputError(f"{name} has no place in it")


def check_state(module: torch.nn.Module, state: dict[str, Any], where: Path) -> None:
    """Raise InputError unless `state` has the module's names and shapes."""
    try:
        check_shapes(state, {name: tuple(own.shape) for name, own in module.state_dict().items()})
    except InputError as misfit:
        raise InputError(
            f"{where} holds the weights of a model of another shape than these settings ask for: {misfit}"
        ) from None
