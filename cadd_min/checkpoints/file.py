"""One file that holds everything: weights, EMA, optimiser, step, settings, tokenizer. Written whole or not at all.

It is torch.save's zip archive, whose comment is the SHA-256 of all before it: a file that is cut short or has one wrong
bit is found out, and in a run's folder the one saved before it is used instead.
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
from cadd_min.data.tokenizer import Tokenizer, from_spec
from cadd_min.model import SIZES, Denoiser, ModelConfig
from cadd_min.training.trainer import Trainer
from cadd_min.upgrade.wrapper import UpgradeConfig, build
from cadd_min.utils.cli import fits, from_dict
from cadd_min.utils.errors import InputError, first_line, sentence, shown

FORMAT, VERSION = "cadd_min", 3
FILE, PREVIOUS, WEIGHTS = "checkpoint.pt", "checkpoint.previous.pt", "model.safetensors"
UPGRADED = "cadd.json"  # of a folder of cadd_min.upgrade.folder
HUB = "hf:"  # hf:owner/name is a model of the Hugging Face hub
PARTS = ("model_config", "tokenizer", "settings", "trainer")  # what a model's checkpoint is made of
DIGEST = 32  # bytes of SHA-256


class Hashing:
    """A file to write to that knows the SHA-256 of what was written, and why it could not be: torch does not say."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha, self.reason = file, hashlib.sha256(), ""

    def write(self, data: Any) -> int:
        """As a file does. Raises OSError, and remembers why."""
        self.sha.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.reason = error.strerror or ""
            raise

    def flush(self) -> None:
        self.file.flush()


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` atomically: whatever fails, the file before it stays as it was.

    That one is kept under the name PREVIOUS where `path` is a run's FILE.
    """
    part, hashing = path.with_suffix(f".{os.getpid()}.tmp"), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            hashing = Hashing(file)
            torch.save({"format": FORMAT, "version": VERSION, **content}, hashing)  # type: ignore[arg-type]
            file.seek(-2, os.SEEK_END)  # an archive ends with the length of its comment
            file.write(DIGEST.to_bytes(2, "little") + hashing.sha.digest())
            file.flush()
            os.fsync(file.fileno())
        if path.name == FILE and path.exists() and _digest_matches(path):  # a damaged one must not follow a good one
            os.replace(path, path.with_name(PREVIOUS))
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        told = hashing.reason if hashing else ""
        reason = told or getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"could not save {path} ({reason}); the checkpoint before it is untouched") from None
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors and plain values only: nothing in it is ever executed.

    A run's FILE that is damaged, or missing because a run died between two renames, is said aloud and replaced by the
    one before it.
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
        content = torch.load(path, map_location="cpu", weights_only=True) if _digest_matches(path) else None
    except Exception:
        content = None
    if content is None:
        raise InputError(f"{path} is not a checkpoint, or it is damaged (its checksum is missing or another)")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this project")
    if content.get("version") != VERSION:
        raise InputError(f"{path} has checkpoint version {shown(repr(content.get('version')))}, expected {VERSION}")
    return content


def _digest_matches(path: Path) -> bool:
    sha, left = hashlib.sha256(), path.stat().st_size - DIGEST - 2
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            sha.update(block)
            left -= len(block)
        sha.update(bytes(2))  # where the comment's length was none
        return file.read() == DIGEST.to_bytes(2, "little") + sha.digest()


def find(path: Path) -> Path:
    """The checkpoint at `path`, a file or a run's folder; of a folder of runs, the newest.

    Of a folder for others (see pretrained.py), here or at the hub, its file of weights.
    """
    if str(path).startswith(HUB) or ((path / WEIGHTS).exists() and not (path / FILE).exists()):
        return path / WEIGHTS
    if (path / UPGRADED).exists():  # whose weights may be in several files
        return path / UPGRADED
    if path.is_dir():
        found = [path] if holds_run(path) else sorted(filter(holds_run, path.glob("*/")), key=_saved)
        if not found:
            raise InputError(f"there is no checkpoint in {path}: train one first (make train)")
        return found[-1] / FILE
    if not path.exists():
        raise InputError(f"there is no checkpoint at {path}: train one first (make train)")
    return path


def holds_run(folder: Path) -> bool:
    """Whether there is a checkpoint in it, or at least the one before."""
    return (folder / FILE).exists() or (folder / PREVIOUS).exists()


def is_ours(path: Path) -> bool:
    """Whether there is a model of this project: a checkpoint, a folder of runs, or a folder for others."""
    return path.is_file() or (path / "codec.json").exists() or any(map(holds_run, [path, *path.glob("*/")]))


def _saved(folder: Path) -> float:
    return max(os.path.getmtime(folder / name) for name in (FILE, PREVIOUS) if (folder / name).exists())


def model_dict(config: ModelConfig | UpgradeConfig) -> dict[str, Any]:
    """The model's configuration as plain values."""
    values = dataclasses.asdict(config)
    if isinstance(config, ModelConfig):
        values["size"]["kind"] = type(config.size).__name__
    return values


def check_outline(content: dict[str, Any], where: Path) -> None:
    """Raise InputError unless all is there that is read of a model's checkpoint beside its shape and weights."""
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
    """The script that trained it."""
    image = content["tokenizer"].get("kind") == Pixels.kind
    return content["settings"].get("script", "train_image.py" if image else "train_text.py")


def tuples(values: dict[str, Any]) -> dict[str, Any]:
    """The same values, lists as tuples: JSON has lists only, and a configuration none."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def build_model(content: dict[str, Any], where: Path) -> Denoiser:
    """A denoiser of the checkpoint's shape, without its weights; an `Upgraded` has all that a Denoiser has."""
    config = tuples(content["model_config"])
    if "base" in config:
        return build(from_dict(UpgradeConfig, config, str(where)))  # type: ignore[return-value]
    size = tuples(config["size"])
    config["size"] = from_dict(SIZES[size.pop("kind", "Size")], size, str(where))
    return Denoiser(from_dict(ModelConfig, config, str(where)))


def check_shapes(state: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise InputError, which names the first tensor that is missing, misshapen or left over, if there is one."""
    for name, shape in shapes.items():
        found = state.get(name)
        if not isinstance(found, torch.Tensor):
            raise InputError(f"{name} is missing")
        if found.shape != shape:
            raise InputError(f"{name} has the shape {tuple(found.shape)}, expected {shape}")
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


def load_trainer(trainer: Trainer, content: dict[str, Any], where: Path) -> None:
    """Put a trainer where the checkpoint left it."""
    try:
        state = content["trainer"]
        check_state(trainer.model, state["model"], where)
        trainer.load_state_dict(state)
    except Exception as error:  # whatever it is, the cause is in the file
        raise error if sentence(error) else InputError(f"{where} is not a whole checkpoint: {_why(error)}") from None


def denoiser_of(content: dict[str, Any], where: Path) -> tuple[Denoiser, Tokenizer | Pixels]:
    """The model in what was read from `where`, with its EMA weights, and its tokenizer or what stands for it."""
    check_outline(content, where)
    try:
        model = build_model(content, where)
        check_state(model, content["trainer"]["ema"], where)
        model.load_state_dict(content["trainer"]["ema"])
        spec = content["tokenizer"]
        tokenizer = Pixels.from_spec(spec) if spec.get("kind") == Pixels.kind else from_spec(spec)
    except Exception as error:  # whatever it is, the cause is in the file
        raise error if sentence(error) else InputError(f"{where} is not a whole checkpoint: {_why(error)}") from None
    if tokenizer.vocab_size != model.config.vocab_size:
        raise InputError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}"
        )
    return model.eval(), tokenizer


def _why(error: Exception) -> str:
    """The reason in one line; a KeyError says no more than what is missing."""
    first = first_line(error)
    return shown(f"{first} is missing" if isinstance(error, KeyError) else first)


def load_denoiser(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[Denoiser, Tokenizer | Pixels, dict[str, Any]]:
    """The trained model (EMA weights), what decodes its samples to text or images, and all else in the checkpoint."""
    from cadd_min.checkpoints import folder as pretrained
    from cadd_min.upgrade import folder as upgraded  # which read folders, with what is here

    if (path / UPGRADED).exists():
        tuned, words = upgraded.open_upgraded(str(path))
        content = {"settings": {}, "tokenizer": words.spec(), "trainer": {"step": "unknown"}}
        return tuned.eval().to(device), words, content  # type: ignore[return-value]
    where = find(path)
    content = pretrained.read(path) if where == path / WEIGHTS else load(path)
    model, tokenizer = denoiser_of(content, where)
    return model.to(device), tokenizer, content
