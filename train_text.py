"""Train CADD, the masked model (mdlm), the continuous model (cdm) or a baseline on text.

    python train_text.py                                   US presidents' messages, on a laptop, in minutes
    python train_text.py --dataset my.txt --model mdlm     your text; the masked model
    python train_text.py --dataset names.txt --lines --length 24 --tokenizer chars    each line a sequence of its own
    python train_text.py --dataset owt --preset small --length 1024 --vocab-size 50257 --batch-size 32
    python train_text.py --resume                          continue the newest run

Writes checkpoint.pt (everything), metrics.jsonl and loss.png into a new folder in runs/, or into --out.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from cadd_min.data import corpus, tokenizer
from cadd_min.data.batches import text_batches
from cadd_min.data.token_folder import TokenFolder, is_folder, prepare
from cadd_min.dit import PRESETS
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.sampling.text import preview
from cadd_min.training import start
from cadd_min.training.counts import fast_start, start_at_counts
from cadd_min.utils.cli import expanded, from_args, integer, run
from cadd_min.utils.errors import choose

HELD_OUT = 4096  # tokens in each of the four evaluation batches: the bound has all (B, L, V) probabilities in memory


def build_parser() -> argparse.ArgumentParser:
    parser = start.build_parser(__doc__)
    parser.add_argument("--dataset", type=expanded, default="sotu", help=f"{', '.join(corpus.NAMES)}, or a path")
    parser.add_argument("--tokenizer", help="gpt2 or chars (default: the dataset's own)")
    parser.add_argument("--vocab-size", type=integer, default=8192, help="tokens of the gpt2 tokenizer, 257 to 50257")
    parser.add_argument("--preset", default="tiny", help=f"size of the network: {', '.join(PRESETS)}")
    parser.add_argument("--length", type=integer, help="tokens in a sequence (default: 128, or the dataset's own)")
    parser.add_argument("--lines", action="store_true", help="a sequence is one line: ended by EOT, padded with EOT")
    return parser


def shape_data(args: argparse.Namespace) -> None:
    """Set --lines and --length where the data set decides them: moses and sudoku are data sets of lines."""
    own = corpus.LINES.get(args.dataset, 0)
    args.lines = args.lines or own > 0
    if args.length is None:
        args.length = own or 128


def open_tokens(args: argparse.Namespace) -> TokenFolder:
    """Open the data set as tokens: a folder of tokens, or a corpus that is tokenised now unless the cache has it."""
    if is_folder(args.dataset):
        return TokenFolder(Path(args.dataset))
    source = corpus.open_corpus(args.dataset, args.cache, args.lines)
    name = choose("--tokenizer", args.tokenizer or source.tokenizer, tokenizer.TOKENIZERS)
    codec = tokenizer.chars(corpus.alphabet(source)) if name == "chars" else tokenizer.gpt2(args.vocab_size)
    tokens = prepare(source, codec, args.cache)
    print("\n".join(filter(None, (source.note, tokens.documents()))))
    return tokens


def main() -> None:
    args, resumed = start.parse_args(build_parser(), "train_text.py")
    shape_data(args)
    shape = start.network(args, PRESETS, resumed)
    config = from_args(
        ModelConfig, args, vocab_size=args.vocab_size, length=args.length, rows=args.lines, size=shape["size"]
    )
    tokens = open_tokens(args)
    codec, training_tokens = tokens.tokenizer(), tokens.split("train", whole=args.lines)
    config = dataclasses.replace(config, vocab_size=codec.vocab_size, **shape)  # only gpt2 has that of --vocab-size
    config = config if resumed else fast_start(config)
    counted = config.head_bias and not resumed
    name, eot_id = f"--dataset {args.dataset}", codec.eot_id if args.lines else None
    data = text_batches(training_tokens, args.length, args.batch_size, args.seed, name, eot_id)
    eval_batch_size, name = max(1, HELD_OUT // args.length), f"the held-out part of {name}"
    held_out = text_batches(tokens.split("val", whole=args.lines), args.length, eval_batch_size, 0, name, eot_id)
    for note in filter(None, (data.note, held_out.note)):
        print(note)
    words = f"{len(training_tokens):,} training tokens of {codec.vocab_size:,}"
    words += f" in {data.per_epoch:,} lines" if args.lines else ""
    start.train(
        args,
        resumed,
        lambda: start_at_counts(Denoiser(config), data) if counted else Denoiser(config),
        data,
        [held_out(i) for i in range(4)],
        codec,
        lambda trainer, _: trainer.averaged(preview, codec),
        start.Source(words, tokens.digest()),
    )


if __name__ == "__main__":
    run(main)
