"""Measure what a sampling step spends in the network and in all else, with the head at all or at masked positions.

    python -m benchmarks.sampling                       preset tiny, vocabulary 4,096, 64 steps, K = 1
    python -m benchmarks.sampling --steps 8 64 512      other numbers of steps
    CADD_BACKEND=torch python -m benchmarks.sampling    without the fused kernels
    python -m benchmarks.sampling --zhat soft --num-latents 4 --shapes 1x128

The project's sampler runs with a denoiser that adds up its own time. The cells are medians of --repeat runs in one
process, after a run that does not count.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from cadd_min import ops
from cadd_min.dit import PRESETS
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.orders import Sampling
from cadd_min.reverse import ZHATS
from cadd_min.sampler import reverse_chain
from cadd_min.utils.cli import run
from cadd_min.utils.device import autocast, best_dtype, default_device, seeded, torch_device
from cadd_min.utils.errors import InputError


def now(device: torch.device) -> float:
    """Wait for the device, and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Timed:
    """A denoiser that adds up the seconds spent in it."""

    def __init__(self, model: Denoiser):
        self.model, self.device, self.seconds = model, model.device, 0.0

    def _timed(self, call: Any, *args: Tensor) -> Tensor:
        start = now(self.device)
        logits = call(*args)
        self.seconds += now(self.device) - start
        return logits

    def plain(self, x_t: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        return self._timed(self.model, x_t, z_t, t)

    def logits_at(self, x_t: Tensor, z_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return self._timed(self.model.logits_at, x_t, z_t, t, rows)

    __call__ = plain


def profile(model: Denoiser, shape: tuple[int, int], steps: int, plain: bool, **options: Any) -> tuple[float, float]:
    """Measure the milliseconds of a step, and of the network in it. plain: run the head at all positions."""
    timed = Timed(model)
    start = now(timed.device)
    chain = (timed.plain if plain else timed, shape, model.table(), model.schedule, model.mask_id)
    reverse_chain(*chain, Sampling(steps, **options), generator=seeded(0, 0))
    return 1e3 * (now(timed.device) - start) / steps, 1e3 * timed.seconds / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=PRESETS, help="size of the network")
    parser.add_argument("--model", default="cadd", choices=("cadd", "mdlm"))
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--shapes", nargs="+", default=["1x128", "8x128", "8x1024"], help="shapes BxL of the samples")
    parser.add_argument("--steps", nargs="+", type=int, default=[64], help="one or more numbers of steps T")
    parser.add_argument("--zhat", default="hard", choices=ZHATS, help="estimate of z_0")
    parser.add_argument("--num-latents", type=int, default=1, help="K")
    parser.add_argument("--repeat", type=int, default=5, help="runs of which the median is taken")
    parser.add_argument("--device", default=default_device())
    args = parser.parse_args()
    if not all(re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape) for shape in args.shapes) or min(args.repeat, *args.steps) < 1:
        raise InputError("--shapes must look like 8x128, and --repeat and --steps be at least 1")
    device = torch_device(args.device)
    dtype = best_dtype(device)
    options = {"zhat": args.zhat, "num_latents": args.num_latents}
    print(f"{ops.backend().name}, torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {dtype}, "
          f"{args.model} {args.preset}, V = {args.vocab_size}, {options}\n")  # fmt: skip
    print("| B x L | T | head at | step, ms | network, ms | all else | tokens/s |\n" + "|---" * 7 + "|")
    for text, steps in itertools.product(args.shapes, args.steps):
        batch, length = map(int, text.split("x"))
        torch.manual_seed(0)
        model = Denoiser(ModelConfig(args.vocab_size, length, PRESETS[args.preset], model=args.model)).to(device).eval()
        nn.init.normal_(model.head.weight, std=0.1)  # a new head is zero: all logits would be equal
        runs: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        with autocast(device, dtype):
            for _ in range(args.repeat + 1):
                for plain, times in runs.items():
                    times.append(profile(model, (batch, length), steps, plain, **options))
        for plain, times in runs.items():
            step, network = (statistics.median(values) for values in zip(*times[1:]))
            where, speed = "all positions" if plain else "masked ones", 1e3 * batch * length / (step * steps)
            cells = (
                f"{batch} x {length}",
                str(steps),
                where,
                f"{step:.2f}",
                f"{network:.2f}",
                f"{1 - network / step:.0%}",
            )
            print("| " + " | ".join((*cells, f"{speed:,.0f}")) + " |")


if __name__ == "__main__":
    run(main)
