"""Train a latent table that may grow beside one that is held, in the paper's plain form, and print how each run goes.

    python -m benchmarks.leak                          three seeds, 1,500 steps, minutes on one core
    python -m benchmarks.leak --out docs/tables/leak.md

The source is the Markov chain of benchmarks/sources.py. The table has a row for each kind of table and every 100 steps:

    row norm                  mean length of the table's rows
    CE, nats                  at masked positions, mean of the 50 training steps before
    impossible transitions    in 512 samples of the averaged weights, zhat hard, T = 32

Cells are the mean and the standard deviation over the seeds.
"""

from __future__ import annotations

import platform

import torch

from benchmarks.markov import build
from benchmarks.sources import Source
from benchmarks.specs import spread
from cadd_min.objective import Batch
from cadd_min.sampler import sample
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.utils.cli import Parser, as_path, run
from cadd_min.utils.device import seeded
from cadd_min.utils.files import atomic_write

PLAIN = {"hint": "raw", "continuous": "linear", "latent_norm": 1.0}  # the paper's form, without wrong hints
TABLES = {"free": {"latent_table": "free"}, "held": {"latent_table": "tied"}}
EVERY, MEAN_OF = 100, 50  # steps between two rows, and steps of which the CE is averaged


def train(table: str, steps: int, seed: int) -> list[tuple[float, float, float]]:
    """Train one network. Returns (row norm, CE, share of impossible transitions) after every EVERY steps."""
    source = Source(seed=seed)
    model = build(source, "cadd", PLAIN | TABLES[table], seed)
    config = TrainConfig(steps=steps, batch_size=32, lr=2e-3, dtype="float32", wrong_hints=0.0, seed=seed)
    trainer = Trainer(model.train(), lambda index: Batch(source.draw(32, seeded(seed + 3, index))), config)
    rows, losses = [], []
    for step in range(1, steps + 1):
        losses.append(trainer.train_step()["ce"])
        if step % EVERY == 0:
            ce = float(torch.stack(losses[-MEAN_OF:]).mean())
            rows.append((trainer.latent_norm(), ce, errors(source, trainer, seed)))
    return rows


def errors(source: Source, trainer: Trainer, seed: int) -> float:
    """Return the share of impossible transitions in samples of the averaged weights."""
    net = trainer.ema
    chain = (net, (512, source.length), net.table(), net.schedule, source.mask_id)
    return source.score(sample(*chain, steps=32, zhat="hard", generator=seeded(seed, 1)))["bad"]


def table(runs: dict[str, list[list[tuple[float, float, float]]]]) -> str:
    """Format the runs of each kind of table, a list of seeds, as Markdown."""
    lines = ["| table | step | row norm | CE, nats | impossible transitions |", "|---|---|---|---|---|"]
    for name, seeds in runs.items():
        for number, at_step in enumerate(zip(*seeds), 1):
            norm, ce, bad = (spread(list(values), digits) for values, digits in zip(zip(*at_step), (2, 3, 3)))
            lines.append(f"| {name} | {number * EVERY} | {norm} | {ce} | {bad} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=as_path, help="a file for the table, below the command that made it")
    args = parser.parse_args()
    runs = {name: [train(name, args.steps, seed) for seed in range(args.seeds)] for name in TABLES}
    command = f"    python -m benchmarks.leak --steps {args.steps} --seeds {args.seeds}\n"
    machine = f"{args.seeds} seeds, torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads."
    text = "\n".join(("# The leak", "", command, f"Mean ± standard deviation over {machine}", "", table(runs)))
    print(text)
    if args.out:
        with atomic_write(args.out) as part:
            part.write_text(text)


if __name__ == "__main__":
    run(main)
