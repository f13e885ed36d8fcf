"""One file that holds everything: weights, EMA, optimiser, step, settings, tokenizer. Written whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from cadd_min.errors import InputError
from cadd_min.model import SIZES, Denoiser, ModelConfig
from cadd_min.options import from_dict
from cadd_min.pixels import Pixels
from cadd_min.tokenizer import Tokenizer, from_spec
from cadd_min.trainer import Trainer

FORMAT, VERSION = "cadd_min", 2
FILE, WEIGHTS = "checkpoint.pt", "model.safetensors"
HUB = "hf:"  # hf:owner/name is a model of the Hugging Face hub


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` atomically: whatever fails, the previous file stays as it was."""
    part = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"could not save {path} ({reason}); the checkpoint before it is untouched") from None
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors and plain values only: nothing in it is ever executed."""
    path = find(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile):
        raise InputError(f"{path} is not a checkpoint, or it is damaged") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this project")
    if content.get("version") != VERSION:
        raise InputError(f"{path} has checkpoint version {content.get('version')}, expected {VERSION}")
    return content


def find(path: Path) -> Path:
    """The checkpoint at `path`, a file or a run's folder; of a folder of runs, the newest.

    Of a folder for others (see pretrained.py), here or at the hub, its file of weights.
    """
    if str(path).startswith(HUB) or ((path / WEIGHTS).exists() and not (path / FILE).exists()):
        return path / WEIGHTS
    if path.is_dir():
        found = [path / FILE] if (path / FILE).exists() else sorted(path.glob(f"*/{FILE}"), key=os.path.getmtime)
        if not found:
            raise InputError(f"there is no checkpoint in {path}: train one first (make train)")
        return found[-1]
    if not path.exists():
        raise InputError(f"there is no checkpoint at {path}: train one first (make train)")
    return path


def model_dict(config: ModelConfig) -> dict[str, Any]:
    """The model's configuration as plain values."""
    values = dataclasses.asdict(config)
    values["size"]["kind"] = type(config.size).__name__
    return values


def kind(content: dict[str, Any]) -> str:
    """ "text" or "image": what this checkpoint's model draws."""
    return "image" if content["tokenizer"]["kind"] == Pixels.kind else "text"


def tuples(values: dict[str, Any]) -> dict[str, Any]:
    """The same values, lists as tuples: JSON has lists only, and a configuration none."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def build_model(content: dict[str, Any], where: Path) -> Denoiser:
    """A denoiser of the checkpoint's shape, without its weights."""
    config = tuples(content["model_config"])
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


def load_state(module: torch.nn.Module, state: dict[str, Any], where: Path) -> None:
    """load_state_dict, with a sentence where the shapes differ."""
    try:
        check_shapes(state, {name: tuple(own.shape) for name, own in module.state_dict().items()})
    except InputError as misfit:
        raise InputError(
            f"{where} holds the weights of a model of another shape than these settings ask for: {misfit}"
        ) from None
    module.load_state_dict(state)


def load_trainer(trainer: Trainer, content: dict[str, Any], where: Path) -> None:
    """Put a trainer where the checkpoint left it."""
    try:
        state = content["trainer"]
        load_state(trainer.model, state["model"], where)
        trainer.load_state_dict(state)
    except (KeyError, ValueError) as error:
        raise error if isinstance(error, InputError) else InputError(f"{where} is not a whole checkpoint") from None


def denoiser_of(content: dict[str, Any], where: Path) -> tuple[Denoiser, Tokenizer | Pixels]:
    """The model in what was read from `where`, with its EMA weights, and its tokenizer or what stands for it."""
    try:
        model = build_model(content, where)
        load_state(model, content["trainer"]["ema"], where)
        spec = content["tokenizer"]
        tokenizer = Pixels.from_spec(spec) if kind(content) == "image" else from_spec(spec)
    except (KeyError, TypeError, AttributeError) as missing:
        raise InputError(f"{where} is not a whole checkpoint: {missing} is missing or malformed") from None
    if tokenizer.vocab_size != model.config.vocab_size:
        raise InputError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}"
        )
    return model.eval(), tokenizer


def load_denoiser(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[Denoiser, Tokenizer | Pixels, dict[str, Any]]:
    """The trained model (EMA weights), what decodes its samples to text or images, and all else in the checkpoint."""
    from cadd_min import pretrained  # which reads folders, with what is here

    where = find(path)
    content = pretrained.read(path) if where == path / WEIGHTS else load(path)
    model, tokenizer = denoiser_of(content, where)
    return model.to(device), tokenizer, content
