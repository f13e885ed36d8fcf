"""The held-out text of a model: sequences like those that it was trained on, pieces of a stream or lines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cadd_min.checkpoints.file import check_data
from cadd_min.data import corpus
from cadd_min.data.batches import text_batches
from cadd_min.data.pairs import holds_pairs
from cadd_min.data.token_folder import TokenFolder, is_folder, prepare
from cadd_min.data.tokenizer import Tokenizer
from cadd_min.model import Model
from cadd_min.utils.errors import InputError


def data_folder(
    content: dict[str, Any], tokenizer: Tokenizer, args: argparse.Namespace, lines: bool = False
) -> TokenFolder:
    """Open the tokens of a checkpoint's data set, or of --dataset under the checkpoint's tokenizer.

    lines: of a model of lines. Raises InputError where the checkpoint's data set has changed since, unless --anyway
    accepts that.
    """
    own = content["settings"].get("dataset")
    name = args.dataset or own
    if not name:
        raise InputError("--dataset must be given: the checkpoint does not say what it was trained on")
    if holds_pairs(Path(name)):
        raise InputError(f"--dataset must be given, a text: {name} holds prompts and responses")
    if is_folder(name):
        tokens = TokenFolder(Path(name))
        if tokens.header["tokenizer"] != tokenizer.spec():
            raise InputError(f"--dataset {name} was made by another tokenizer than the checkpoint's")
    else:
        tokens = prepare(corpus.open_corpus(name, args.cache, lines), tokenizer, args.cache)
    if name == own:
        check_data(content, tokens.digest(), f"the data set {name}", args.anyway)
    return tokens


def cut(
    model: Model, tokenizer: Tokenizer, content: dict[str, Any], args: argparse.Namespace, count: int, why: str = ""
) -> Tensor:
    """Cut `count` sequences like those of a model, (count, L), out of its held-out text, or out of --dataset.

    No two overlap, and they are the same at every call. Lines that are too long are counted on stderr. Raises
    InputError where there are fewer, with the reason `why` that so many are needed.
    """
    rows, length = model.config.rows, model.config.length
    tokens = data_folder(content, tokenizer, args, rows).split("val", whole=rows)
    batches = text_batches(tokens, length, count, 0, "the held-out text", padding(model, tokenizer))
    if batches.per_epoch < count:
        what = f"lines of at most {length - 1} tokens" if rows else f"pieces of {length} tokens"
        raise InputError(f"--num: the held-out text has {batches.per_epoch} {what}, and {count} are needed{why}")
    if batches.note:
        print(f"note: {batches.note}", file=sys.stderr)
    return batches(0).x_0


def padding(model: Model, tokenizer: Tokenizer) -> int | None:
    """Return the token that pads a model's sequences: EOT where they are lines, else None."""
    return tokenizer.eot_id if model.config.rows else None


def written(x_0: Tensor, pad: int | None) -> Tensor:
    """Mark the positions of sequences (N, L) up to their first `pad`, which ends a line. Without a `pad` mark all."""
    ends = torch.zeros_like(x_0, dtype=torch.bool) if pad is None else x_0 == pad
    return ends.cumsum(1) - ends.long() == 0
