"""Folders of the Hugging Face hub, downloaded by its own client; and its library, made quiet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cadd_min.utils.errors import InputError, first_line

HUB = "hf:"  # hf:owner/name is a model of the hub
INSTALL = "pip install huggingface_hub safetensors"


def hub_folder(source: Path | str, files: Sequence[str], revision: str | None = None, **download: Any) -> Path:
    """Return a local folder, or the folder into which the hub's client has downloaded "owner/name".

    files: patterns of the only files that are downloaded; download: options of huggingface_hub.snapshot_download, like
    token and cache_dir. Raises InputError.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(f"there is no folder {source}, and the Hugging Face hub needs its client: {INSTALL}") from None
    name = str(source).removeprefix(HUB)
    try:
        found = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*files], **download)
    except (OSError, ValueError) as error:
        raise InputError(
            f"there is no folder {source}, nor can the hub's {name} be downloaded: {first_line(error)}"
        ) from None
    return Path(found)


def quiet() -> None:
    """Silence the library's progress bars, and its hints on settings that this project does not use.

    Whatever goes wrong is still raised.
    """
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as library

    library.set_verbosity_error()
    library.disable_progress_bar()
    hub.set_verbosity_error()
    # torch notes its constructors at the first call on a device. That must not happen while the library loads a model,
    # when a constructor, linspace, is replaced.
    with torch.device("meta"):
        torch.empty(0)
