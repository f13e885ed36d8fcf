"""An upgraded model as a folder in the Hugging Face library's own format, with cadd.json beside it.

The library opens the folder too, as the masked model without its latent. In this project a folder without cadd.json
opens as a masked model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cadd_min.data.hf_tokenizer import HFTokenizer
from cadd_min.upgrade import families
from cadd_min.upgrade.wrapper import UpgradeConfig, Upgraded, merged, upgrade
from cadd_min.utils.cli import from_dict
from cadd_min.utils.errors import InputError, reason
from cadd_min.utils.files import atomic_write, new_or_empty, read_json, write_json
from cadd_min.utils.huggingface import hub_folder

FORMAT, VERSION = "cadd_min upgrade", 1
UPGRADED = "cadd.json"
# Fields of UpgradeConfig that the library's files already hold, and the one that is no more after LoRA is merged.
FOUND = ("base", "vocab_size", "mask_id", "masked_lm", "unused", "mask_shift")


def save(model: Upgraded, tokenizer: HFTokenizer, folder: Path | str) -> None:
    """Write a model to `folder`, which must be new or empty. Nothing is left there on failure.

    This merges LoRA into `model`: do not use `model` afterwards. Raises InputError.
    """
    folder = new_or_empty(folder)
    config = {name: value for name, value in dataclasses.asdict(model.config).items() if name not in FOUND}
    config |= {"format": FORMAT, "version": VERSION, "lora": 0, "anneal": 0}
    try:
        with atomic_write(folder) as part:
            network = merged(model)
            network.config.mask_token_id = model.mask_id
            network.save_pretrained(part)
            tokenizer.library.save_pretrained(part)
            write_json(part / UPGRADED, config, indent=2)
    except Exception as error:  # OSError; safetensors has an exception of its own, tokenizers raises plain ones
        raise InputError(f"could not save {folder} ({reason(error)}); nothing was changed") from None


def settings(name: str) -> dict[str, Any]:
    """Read the fields of UpgradeConfig from an upgraded model's folder, here or at the hub. Empty for other models.

    Raises InputError where cadd.json is damaged.
    """
    if name == families.SMOLLM2:
        return {}
    file = hub_folder(name, families.FILES) / UPGRADED
    if not file.exists():
        return {}
    values = read_json(file)
    if (values.pop("format", None), values.pop("version", None)) != (FORMAT, VERSION):
        raise InputError(f"{file} is not of this version of the project")
    config = from_dict(
        UpgradeConfig, values | {"base": "", "vocab_size": 1, "mask_id": 0, "masked_lm": False}, str(file)
    )
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in FOUND}


def open_upgraded(name: str, length: int | None = None, mask_token: str | None = None) -> tuple[Upgraded, HFTokenizer]:
    """Open an upgraded model from a folder or from the hub. A model without cadd.json opens as a masked model.

    length: tokens in a sequence; None: as in tuning, or 256 without cadd.json. mask_token: see `families.open_source`.
    Raises InputError.
    """
    source = families.open_source(name, mask_token)
    options = settings(name) or {"model": "mdlm", "length": 256}
    tuned_length = options.pop("length")
    return upgrade(source, tuned_length if length is None else length, **options), source.tokenizer
