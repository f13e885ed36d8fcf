"""A trained model as a folder that others can read: weights as safetensors, all else as JSON. Here or at the hub.

python -m cadd_min.checkpoints.folder runs/text-cadd my-model      from a run's checkpoint, its EMA weights

model.safetensors    float32, named as in Denoiser.state_dict()
config.json          format, version, the ModelConfig, what it was trained on and in, and for how many steps
codec.json           the tokenizer's spec, or the pixels': tokens to text or images
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cadd_min.checkpoints import file as checkpoint
from cadd_min.checkpoints.file import HUB, WEIGHTS
from cadd_min.data.pixels import Pixels
from cadd_min.data.tokenizer import Tokenizer
from cadd_min.model import Denoiser
from cadd_min.utils.cli import Parser, run
from cadd_min.utils.device import DTYPES
from cadd_min.utils.errors import InputError

FORMAT, VERSION = "cadd_min", 1
CONFIG, CODEC = "config.json", "codec.json"
FILES = (WEIGHTS, CONFIG, CODEC)
SETTINGS = ("dtype", "dataset")  # of the training's: what sampling and measuring go by
WRAPPERS = ("_orig_mod", "module")  # the names that torch.compile and DistributedDataParallel put before a weight's
INSTALL = "pip install huggingface_hub safetensors"


def save_pretrained(
    model: nn.Module,
    codec: Tokenizer | Pixels,
    folder: Path | str,
    *,
    settings: dict[str, Any] | None = None,
    step: int | None = None,
) -> None:
    """Write `folder`, which must be new or empty: it is whole or, if anything fails, as it was.

    model: a Denoiser, compiled and distributed or not; its weights are written as they are now. settings: of its
    training, "dtype" and "dataset"; step: how many it was trained for. Raises InputError.
    """
    folder = free(folder)
    for wrapper in WRAPPERS[::-1]:
        model = getattr(model, wrapper, model)
    if not isinstance(model, Denoiser):
        raise InputError(f"model must be a Denoiser, not a {type(model).__name__}")
    config: dict[str, Any] = {"format": FORMAT, "version": VERSION, "model_config": checkpoint.model_dict(model.config)}
    config["settings"] = {name: value for name, value in (settings or {}).items() if name in SETTINGS}
    config["step"] = step
    part = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        part.mkdir(parents=True)
        write_weights(model.state_dict(), part / WEIGHTS)
        for name, content in ((CONFIG, config), (CODEC, codec.spec())):
            with (part / name).open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, folder)  # an empty folder may be replaced
    except OSError as error:
        raise InputError(f"could not save {folder} ({error.strerror}); nothing was changed") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def free(folder: Path | str) -> Path:
    """The same path, if something can be written there. Raises InputError where something is."""
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists: name a new folder, or an empty one")
    return folder


def write_weights(state: dict[str, Tensor], path: Path) -> None:
    """Tensors as a new safetensors file in float32, without the names of wrappers. Raises InputError."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise InputError(f"to write weights that others can read needs safetensors: {INSTALL}") from None
    if path.exists():
        raise InputError(f"{path} exists: name a new file")
    clean = {plain(name): value.detach().cpu().float().contiguous() for name, value in state.items()}
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(clean, part, metadata={"format": "pt", "writer": FORMAT, "version": str(VERSION)})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"could not save {path} ({error}); nothing was changed") from None
    finally:
        part.unlink(missing_ok=True)


def plain(name: str) -> str:
    """A weight's name as it is without torch.compile and without DistributedDataParallel."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises InputError."""
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
    """The content of a folder, here or at the hub, laid out as a checkpoint's. Raises InputError."""
    folder = fetch(source, revision, **download)
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
    return {
        "model_config": config.get("model_config", {}),
        "settings": settings,
        "tokenizer": codec,
        "trainer": {"ema": read_weights(folder / WEIGHTS), "step": config.get("step") or "unknown"},
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not an object in JSON, or it is damaged")
    return content


def fetch(source: Path | str, revision: str | None = None, **download: Any) -> Path:
    """The folder, or where the hub's client keeps the files of "owner/name"; no other file of it is downloaded.

    download: options of huggingface_hub.snapshot_download, like token and cache_dir.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(f"there is no folder {source}, and the Hugging Face hub needs its client: {INSTALL}") from None
    name = str(source).removeprefix(HUB)
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*FILES], **download))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"there is no folder {source}, nor can the hub's {name} be downloaded: {reason}") from None


def from_pretrained(source: Path | str, revision: str | None = None) -> tuple[Denoiser, Tokenizer | Pixels]:
    """The model, and what makes text or images of its tokens, from a folder or from the Hugging Face hub.

    source: a folder, or owner/name of the hub; revision: a branch, tag or commit there. Raises InputError.
    """
    return checkpoint.denoiser_of(read(source, revision), Path(source))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("ckpt", type=Path, help="a checkpoint, its folder, or a folder of runs")
    parser.add_argument("folder", type=Path, help="a new folder")
    args = parser.parse_args()
    free(args.folder)
    model, codec, content = checkpoint.load_denoiser(args.ckpt)
    step = content["trainer"]["step"]
    save_pretrained(model, codec, args.folder, settings=content["settings"], step=step)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"written: {args.folder}, {model.config.model} at step {step}, {parameters:,} parameters")


if __name__ == "__main__":
    run(main)
