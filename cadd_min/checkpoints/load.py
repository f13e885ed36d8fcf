"""The door that opens every kind of model: checkpoints, folders for others, upgraded models, the hub.

No other file knows all kinds. Each returns a `Model` and the codec of its tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cadd_min.checkpoints import file, folder
from cadd_min.checkpoints.folder import CODEC, WEIGHTS
from cadd_min.data import codec as codecs
from cadd_min.data.codec import Codec
from cadd_min.model import SIZES, Denoiser, Model, ModelConfig
from cadd_min.upgrade.folder import UPGRADED, open_upgraded
from cadd_min.upgrade.wrapper import UpgradeConfig, build
from cadd_min.utils.cli import from_dict
from cadd_min.utils.errors import InputError, first_line, sentence, shown
from cadd_min.utils.huggingface import HUB

UNKNOWN: dict[str, Any] = {"settings": {}, "trainer": {"step": "unknown"}}  # of a model that was trained elsewhere


def find(path: Path) -> Path:
    """Return the file that tells one model from another: a checkpoint, or the weights or cadd.json of a folder."""
    if path.name in (WEIGHTS, UPGRADED):
        return path
    if (path / UPGRADED).exists():  # whose weights may be in several files
        return path / UPGRADED
    if str(path).startswith(HUB) or ((path / WEIGHTS).exists() and not (path / file.FILE).exists()):
        return path / WEIGHTS
    return file.find(path)


def weights_digest(model: Model) -> str:
    """Return a hash of a model's weights, by name, type and content."""
    content = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        content.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        content.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return content.hexdigest()


def is_ours(path: Path) -> bool:
    """Tell whether a path holds a model of this project: a checkpoint, a folder of runs, or a folder for others."""
    return path.is_file() or (path / CODEC).exists() or any(map(file.holds_run, [path, *path.glob("*/")]))


def load_denoiser(path: Path, device: torch.device | str = "cpu") -> tuple[Model, Codec, dict[str, Any]]:
    """Load a trained model, with the averaged weights (EMA), its codec, and all else that is known of it.

    path: whatever --ckpt takes, or what `find` returned. Raises InputError.
    """
    where = find(path)
    if where.name == UPGRADED:
        model, tokenizer = open_upgraded(str(where.parent))
        return model.eval().to(device), tokenizer, UNKNOWN | {"tokenizer": tokenizer.spec()}
    content = read(where)
    trained, codec = denoiser_of(content, where)
    return trained.to(device), codec, content


def read(where: Path) -> dict[str, Any]:
    """Read a checkpoint, or a folder for others, which `find` has returned. Raises InputError."""
    return folder.read(where.parent) if where.name == WEIGHTS else file.load(where)


def open_model(
    ckpt: Path, device: torch.device, source: str | None, length: int | None, mask_token: str | None
) -> tuple[Model, Codec, dict[str, Any], Path]:
    """Open the model of --ckpt, or of --from (`source`), a model that others trained.

    length, mask_token: see `open_upgraded`. Returns the model, its codec, all else that is known, and where it is.
    Raises InputError.
    """
    if source:
        model, tokenizer = open_upgraded(source, length, mask_token)
        return model.eval().to(device), tokenizer, UNKNOWN, Path(source)
    for name, value in (("length", length), ("mask-token", mask_token)):
        if value is not None:
            raise InputError(f"--{name} goes with --from, and --ckpt has its own")
    where = find(ckpt)  # once: another run may become the newest meanwhile
    return *load_denoiser(where, device), where


def from_pretrained(source: Path | str, revision: str | None = None) -> tuple[Model, Codec]:
    """Open a folder that `folder.save_pretrained` wrote, here or at the Hugging Face hub.

    source: a folder, or owner/name of the hub; revision: a branch, tag or commit there. Raises InputError.
    """
    return denoiser_of(folder.read(source, revision), Path(source))


def denoiser_of(content: dict[str, Any], where: Path) -> tuple[Model, Codec]:
    """Make the model in a content that was read from `where`, with its EMA weights, and its codec.

    Raises InputError.
    """
    file.check_outline(content, where)

    with blaming(where):
        model = build_model(content, where)
        file.check_state(model, content["trainer"]["ema"], where)
        model.load_state_dict(content["trainer"]["ema"])
        codec = codecs.from_spec(content["tokenizer"])
    if codec.vocab_size != model.config.vocab_size:
        raise InputError(f"{where}: the tokenizer has {codec.vocab_size} tokens, the model {model.config.vocab_size}")
    return model.eval(), codec


def build_model(content: dict[str, Any], where: Path) -> Model:
    """Make a model of the checkpoint's shape, without its weights. Raises InputError."""
    config = any_config(content, where)
    return build(config) if isinstance(config, UpgradeConfig) else Denoiser(config)


def build_shape(content: dict[str, Any], where: Path) -> Model:
    """Make a model of the checkpoint's shape on the meta device, which takes no memory. Raises InputError."""
    with torch.device("meta"):
        return build_model(content, where)


def any_config(content: dict[str, Any], where: Path) -> ModelConfig | UpgradeConfig:
    """Return the shape of the model in a content that was read from `where`. Raises InputError."""
    if "base" in content["model_config"]:
        return from_dict(UpgradeConfig, tuples(content["model_config"]), str(where))
    return model_config(content, where)


def model_config(content: dict[str, Any], where: Path) -> ModelConfig:
    """Return the shape of the Denoiser in a content that was read from `where`. Raises InputError."""
    config = tuples(content["model_config"])
    size = tuples(config["size"])
    config["size"] = from_dict(SIZES[size.pop("kind", "Size")], size, str(where))
    return from_dict(ModelConfig, config, str(where))


def tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Return the same values with tuples for lists: JSON has only lists, a configuration has none."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


@contextlib.contextmanager
def blaming(where: Path) -> Iterator[None]:
    """Turn whatever exception is raised inside into an InputError that names the file `where`."""
    try:
        yield
    except Exception as error:
        if sentence(error):
            raise
        why = f"{first_line(error)} is missing" if isinstance(error, KeyError) else first_line(error)
        raise InputError(f"{where} is not a whole checkpoint: {shown(why)}") from None
