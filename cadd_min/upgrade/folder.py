"""An upgraded model as a folder in the Hugging Face library's own format, with cadd.json beside it; and any other.

python -m cadd_min.upgrade.folder runs/my-run my-model        of a run of finetune.py, LoRA added in

The library opens such a folder too, as the masked model that it is without its latent.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from cadd_min.checkpoints import file as checkpoint
from cadd_min.checkpoints.file import UPGRADED
from cadd_min.checkpoints.folder import free, read_json
from cadd_min.data.hf_tokenizer import HFTokenizer
from cadd_min.upgrade import families
from cadd_min.upgrade.wrapper import UpgradeConfig, Upgraded, merged, upgrade
from cadd_min.utils.cli import Parser, from_dict, run, whole
from cadd_min.utils.errors import InputError

FORMAT, VERSION = "cadd_min upgrade", 1
FOUND = ("base", "vocab_size", "mask_id", "masked_lm")  # what is seen again when the folder is opened


def save(model: Upgraded, tokenizer: HFTokenizer, folder: Path | str) -> None:
    """Write `folder`, which must be new or empty: it is whole or was not there. The model is not one afterwards.

    Raises InputError.
    """
    folder = free(folder)
    config = {name: value for name, value in dataclasses.asdict(model.config).items() if name not in FOUND}
    config |= {"format": FORMAT, "version": VERSION, "lora": 0, "anneal": 0}
    part = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        network = merged(model)
        network.config.mask_token_id = model.mask_id
        network.save_pretrained(part)
        tokenizer.library.save_pretrained(part)
        (part / UPGRADED).write_text(json.dumps(config, indent=2), encoding="utf-8")
        os.replace(part, folder)  # an empty folder may be replaced
    except Exception as error:  # OSError; safetensors has an exception of its own, tokenizers raises plain ones
        why = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"could not save {folder} ({why}); nothing was changed") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def settings(name: str) -> dict[str, Any]:
    """What an upgraded model's folder, here or at the hub, says of itself: fields of UpgradeConfig. Of others nothing.

    Raises InputError where it is damaged.
    """
    if name == families.SMOLLM2:
        return {}
    file = families.fetch(name) / UPGRADED
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
    """The model of a folder or of the hub: an upgraded one, or, without its cadd.json, a masked one as it is.

    length: of its sequences, if not that which it was tuned on. Raises InputError.
    """
    source = families.open_source(name, mask_token)
    how = settings(name) or {"model": "mdlm", "length": 256}
    tuned_on = how.pop("length")
    return upgrade(source, tuned_on if length is None else length, **how), source.tokenizer


def add_source_options(parser: Any) -> None:
    """A model that is not of a checkpoint, and how its prompts are put."""
    parser.add_argument(
        "--from", dest="source", help="instead of --ckpt: a model of the Hugging Face hub, or its folder"
    )
    parser.add_argument(
        "--length", type=whole, help="with --from: tokens in a sample (default: as it was tuned, or 256)"
    )
    parser.add_argument("--mask-token", help="with --from: the mask's text, if the model does not say it")
    parser.add_argument("--chat", action="store_true", help="prompts go through the tokenizer's chat template")


def open_model(args: argparse.Namespace, device: torch.device) -> tuple[Any, Any, dict[str, Any], Path]:
    """The model of --from or --ckpt, its tokenizer or what stands for it, what else is known, and where it is."""
    if args.source:
        model, words = open_upgraded(args.source, args.length, args.mask_token)
        return model.eval().to(device), words, {"settings": {}, "trainer": {"step": "unknown"}}, Path(args.source)
    for name in ("length", "mask_token"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} goes with --from, and --ckpt has its own")
    return *checkpoint.load_denoiser(args.ckpt, device), checkpoint.find(args.ckpt)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("ckpt", type=Path, help="a checkpoint of finetune.py, its folder, or a folder of runs")
    parser.add_argument("folder", type=Path, help="a new folder")
    args = parser.parse_args()
    free(args.folder)
    model, tokenizer, content = checkpoint.load_denoiser(args.ckpt)
    if not (isinstance(model, Upgraded) and isinstance(tokenizer, HFTokenizer)):
        raise InputError(f"{args.ckpt} is no upgraded model: python -m cadd_min.checkpoints.folder writes its folder")
    save(model, tokenizer, args.folder)
    print(f"written: {args.folder}, {model.config.model} at step {content['trainer']['step']}")


if __name__ == "__main__":
    run(main)
