"""A trained model as a folder that others can read: weights as safetensors, all else as JSON. Here or at the hub.

model.safetensors    float32, named as in Denoiser.state_dict()
config.json          format, version, the ModelConfig, what it was trained on and in, and for how many steps
codec.json           the tokenizer's spec, or the pixels': tokens to text or images

export.py writes the folder of a run, load.py opens it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cadd_min.checkpoints import file
from cadd_min.data.codec import Codec
from cadd_min.model import Denoiser
from cadd_min.utils.device import DTYPES
from cadd_min.utils.errors import InputError, reason
from cadd_min.utils.files import atomic_write, new_or_empty, read_json, write_json
from cadd_min.utils.huggingface import INSTALL, hub_folder

FORMAT, VERSION = "cadd_min", 1
WEIGHTS, CONFIG, CODEC = "model.safetensors", "config.json", "codec.json"
FILES = (WEIGHTS, CONFIG, CODEC)
SETTINGS = ("dtype", "dataset")  # of the training's settings: what sampling and measuring go by
WRAPPERS = ("_orig_mod", "module")  # the names that torch.compile and DistributedDataParallel put before a weight's


def save_pretrained(
    model: nn.Module,
    codec: Codec,
    folder: Path | str,
    *,
    settings: dict[str, Any] | None = None,
    step: int | None = None,
) -> None:
    """Write a model to `folder`, which must be new or empty. Nothing is left there on failure.

    model: a Denoiser, compiled and distributed or not. settings: of its training, "dtype" and "dataset"; step: for how
    many steps it was trained. Raises InputError.
    """
    folder = new_or_empty(folder)
    for wrapper in WRAPPERS[::-1]:
        model = getattr(model, wrapper, model)
    if not isinstance(model, Denoiser):
        raise InputError(f"model must be a Denoiser, not a {type(model).__name__}")
    config: dict[str, Any] = {"format": FORMAT, "version": VERSION, "model_config": file.model_dict(model.config)}
    config["settings"] = {name: value for name, value in (settings or {}).items() if name in SETTINGS}
    config["step"] = step
    try:
        with atomic_write(folder) as part:
            part.mkdir()
            write_weights(model.state_dict(), part / WEIGHTS)
            write_json(part / CONFIG, config, indent=2)
            write_json(part / CODEC, codec.spec(), indent=2)
    except OSError as error:
        raise InputError(f"could not save {folder} ({reason(error)}); nothing was changed") from None


def write_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors to a new safetensors file in float32, under their names without wrappers. Raises InputError."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise InputError(f"to write weights that others can read needs safetensors: {INSTALL}") from None
    if path.exists():
        raise InputError(f"{path} exists: name a new file")
    clean = {plain(name): value.detach().cpu().float().contiguous() for name, value in state.items()}
    try:
        with atomic_write(path) as part:
            save_file(clean, part, metadata={"format": "pt", "writer": FORMAT, "version": str(VERSION)})
    except (OSError, SafetensorError) as error:
        raise InputError(f"could not save {path} ({error}); nothing was changed") from None


def plain(name: str) -> str:
    """Strip what torch.compile and DistributedDataParallel put into a weight's name."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file. Raises InputError."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"{path} needs safetensors: {INSTALL}") from None
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        raise InputError(f"{path} is not a safetensors file, or it is damaged") from None


def read(source: Path | str, revision: str | None = None, **download: Any) -> dict[str, Any]:
    """Read a folder, here or at the hub, into a content laid out as a checkpoint's. Raises InputError.

    download: options of huggingface_hub.snapshot_download, like token and cache_dir.
    """
    folder = hub_folder(source, FILES, revision, **download)
    for name in FILES:
        if not (folder / name).is_file():
            raise InputError(f"{source} is not a folder for others: it has no {name}")
    config, codec = read_json(folder / CONFIG), read_json(folder / CODEC)
    if config.get("format") != FORMAT:
        raise InputError(f"{folder / CONFIG} is not of this project")
    if config.get("version") != VERSION:
        raise InputError(f"{folder / CONFIG} has version {config.get('version')}, expected {VERSION}")
    settings = config.get("settings")
    if not isinstance(settings, dict) or settings.get("dtype", "float32") not in [*DTYPES]:
        raise InputError(f"{folder / CONFIG}: settings must be an object, and its dtype one of {', '.join(DTYPES)}")
    content = {
        "model_config": config.get("model_config", {}),
        "settings": settings,
        "tokenizer": codec,
        "trainer": {"ema": read_weights(folder / WEIGHTS), "step": config.get("step") or "unknown"},
    }
    return file.with_new_names(content)
