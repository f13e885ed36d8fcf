"""Measure what other work on the machine does to this program, by how long OpenMP's threads spin at a barrier.

    python -m benchmarks.contention                              a step of training and of sampling, five rounds
    python -m benchmarks.contention --spins 300000 10000 200     other numbers of turns
    python -m benchmarks.contention --jobs train --rounds 9

Each figure is a process of its own. In a round each setting runs once on the quiet machine, and once beside busy loops.
A thread that waits turns GOMP_SPINCOUNT times before it sleeps: libgomp's own number is 300,000, and "passive" is
OMP_WAIT_POLICY=PASSIVE. This project sets 1,000 where neither variable is set (cadd_min/__init__.py). The tests are not
here: each runs with one thread, which waits for no other.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.sampling import profile
from cadd_min.dit import PRESETS
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.objective import Batch
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.utils.cli import run
from cadd_min.utils.errors import InputError

VOCAB, BATCH, LENGTH = 4096, 16, 128  # those of make train
BUSY = "while True: pass"


def train(steps: int = 60) -> float:
    """Measure the milliseconds of a training step."""
    torch.manual_seed(0)
    data = torch.randint(VOCAB, (BATCH, LENGTH))
    model = Denoiser(ModelConfig(VOCAB, LENGTH, PRESETS["tiny"]))
    trainer = Trainer(model, lambda index: Batch(data), TrainConfig(batch_size=BATCH))
    for _ in range(5):
        trainer.train_step()
    start = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    return 1e3 * (time.perf_counter() - start) / steps


def sample(steps: int = 64) -> float:
    """Measure the milliseconds of a sampling step."""
    torch.manual_seed(0)
    model = Denoiser(ModelConfig(VOCAB, LENGTH, PRESETS["tiny"])).eval()
    profile(model, (1, LENGTH), 8, plain=False)
    return statistics.median(profile(model, (1, LENGTH), steps, plain=False)[0] for _ in range(5))


JOBS: dict[str, Callable[[], float]] = {"train": train, "sample": sample}


def measured(job: str, spin: str) -> float:
    """Run a job in a process of its own with this many turns, and return its figure. "passive" is no turn at all."""
    waiting = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {name: value for name, value in os.environ.items() if name not in waiting}
    env |= {"OMP_WAIT_POLICY": "PASSIVE"} if spin == "passive" else {"GOMP_SPINCOUNT": spin}
    child = [sys.executable, "-m", "benchmarks.contention", "--measure", job]
    return float(subprocess.run(child, env=env, check=True, capture_output=True, text=True).stdout)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep `count` processes busy meanwhile."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def report(job: str, quiet: dict[str, list[float]], beside: dict[str, list[float]]) -> None:
    """Print a job's table: medians and ranges of both, and of the rounds' own ratios."""
    print(f"| a step of {job}, ms: turns | quiet | beside busy loops | beside / quiet |\n" + "|---" * 4 + "|")
    for spin in quiet:
        ratios = [b / a for a, b in zip(quiet[spin], beside[spin])]
        cells = (f"{statistics.median(v):.1f} ({min(v):.1f}-{max(v):.1f})" for v in (quiet[spin], beside[spin], ratios))
        print(f"| {spin} | " + " | ".join(cells) + " |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument(
        "--spins", nargs="+", default=["300000", "1000", "passive"], help="numbers of turns, or passive"
    )
    parser.add_argument("--busy", type=int, default=2, help="busy loops beside")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", choices=JOBS, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.measure:
        print(JOBS[args.measure]())
        return
    if not all(spin == "passive" or spin.isdigit() for spin in args.spins) or min(args.rounds, args.busy) < 1:
        raise InputError("--spins must be numbers or passive, and --rounds and --busy at least 1")
    for job in args.jobs:
        quiet: dict[str, list[float]] = {spin: [] for spin in args.spins}
        beside: dict[str, list[float]] = {spin: [] for spin in args.spins}
        for _ in range(args.rounds):
            for spin in args.spins:
                quiet[spin].append(measured(job, spin))
            with busy(args.busy):
                for spin in args.spins:
                    beside[spin].append(measured(job, spin))
        report(job, quiet, beside)


if __name__ == "__main__":
    run(main)
