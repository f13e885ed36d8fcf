"""Time both fused kernels against eager PyTorch, torch.compile, and the floor that the machine sets.

    python -m benchmarks.kernels                 the tables of docs/performance.md, on the GPU if there is one
    python -m benchmarks.kernels --json FILE     the same, and the results as JSON

The cells are medians in milliseconds, on a GPU of rounds of 20 calls. In brackets is the ratio to the fused kernel in
the same run. The columns are

    fused         the project's kernel, for the reverse step with each z0_hat and with top-p 0.9
    eager         the same in plain PyTorch with torch's own random numbers
    compile       eager under torch.compile
    normal, copy  the floor of the forward noising: to draw its noise, and to copy the bytes that it must move
    multinomial   the usual draw, torch.multinomial of every row
    amax          the floor of the reverse step: to read the logits once
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from cadd_min import ops
from cadd_min.reverse import Decoding, step_coefficients
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.cli import as_path, run
from cadd_min.utils.device import default_device
from cadd_min.utils.errors import InputError

SCHEDULE = NoiseSchedule()
NOISING = [(8, 1024, 768, 50257), (8, 1024, 128, 50257), (8, 128, 128, 4096), (32, 1024, 768, 50257)]  # B, L, D, V
QUEUED = 20  # calls between two readings of the clock on a GPU
REVERSE = [(2048, 50258, 768, 1), (512, 50258, 768, 1), (512, 50258, 768, 4), (1024, 4096, 128, 1)]  # N, V, D, K


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int, queued: int = 1) -> float:
    """Measure the median time of a call. The first round does not count.

    queued: calls of a round on a GPU, of which the time is averaged: the GPU need not wait for Python between them.
    """
    on_gpu, times = device.type == "cuda", []
    for _ in range(repeats + 1):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(queued if on_gpu else 1):
            call()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / (queued if on_gpu else 1))
    return statistics.median(times[1:])


def eager_noising(x_0, table, t, mask_id):
    """Noise x_0 in plain PyTorch, with torch's own generator."""
    masked = torch.rand(x_0.shape, device=x_0.device) >= SCHEDULE.alpha(t)[:, None]
    z_0 = table[x_0]
    signal, noise = SCHEDULE.signal(t)[:, None, None], SCHEDULE.noise(t)[:, None, None]
    z_t = signal * z_0 + noise * torch.randn_like(z_0)
    return x_0.masked_fill(masked, mask_id), torch.where(masked[..., None], z_t, z_0)


def eager_reverse(logits, z_t, table, step):
    """Make the usual step: softmax, a multinomial draw for every row, then choose which rows flip. zhat is hard."""
    p = logits.softmax(-1).mean(0)
    flip = torch.rand(len(p), device=p.device) < step[0]
    x_s = torch.where(flip, torch.multinomial(p, 1)[:, 0], len(table) - 1)
    kept = step[1] * table[p.argmax(-1)] + step[2] * z_t + step[3] * torch.randn_like(z_t)
    return x_s, torch.where(flip[:, None], table[x_s], kept)


def noising(shape: tuple[int, int, int, int], device: torch.device, repeats: int) -> dict[str, float]:
    """Time the forward noising of a shape (B, L, D, V): milliseconds by column of the table."""
    batch, length, dim, vocab = shape
    x_0 = torch.randint(vocab, (batch, length), device=device)
    table, t = torch.randn(vocab + 1, dim, device=device), torch.rand(batch, device=device)
    seed, out = torch.tensor([1, 2], device=device), torch.empty(batch, length, dim, device=device)
    compiled = torch.compile(eager_noising)
    calls: dict[str, Callable[[], object]] = {
        "fused": lambda: ops.forward_noising(x_0, x_0, table, t, SCHEDULE, vocab, seed),
        "eager": lambda: eager_noising(x_0, table, t, vocab),
        "compile": lambda: compiled(x_0, table, t, vocab),
        "normal": lambda: out.normal_(),
        "copy": lambda: out.clone(),
    }
    return {name: milliseconds(call, device, repeats, QUEUED) for name, call in calls.items()}


def reverse(shape: tuple[int, int, int, int], device: torch.device, repeats: int) -> dict[str, float]:
    """Time the reverse step of a shape (N, V, D, K): milliseconds by column of the table."""
    count, vocab, dim, latents = shape
    logits, table = 3 * torch.randn(latents, count, vocab, device=device), torch.randn(vocab + 1, dim, device=device)
    z_t, rows = torch.randn(latents, count, dim, device=device), torch.arange(count, device=device)
    fused = step_coefficients(*torch.tensor([0.45, 0.5], dtype=torch.float64, device=device), SCHEDULE)
    step, seed = torch.tensor([0.1, 0.1, 0.9, 0.2], device=device), torch.tensor([1, 2], device=device)
    compiled = torch.compile(eager_reverse)
    calls: dict[str, Callable[[], object]] = {
        f"fused {name}": lambda name=name, p=p: ops.reverse_step(
            logits, rows, z_t, table, fused, vocab, seed, Decoding(name.split()[0], top_p=p)
        )
        for name, p in (("hard", 1.0), ("sample", 1.0), ("soft", 1.0), ("hard top-p", 0.9))
    }
    calls |= {
        "eager": lambda: eager_reverse(logits, z_t, table, step),
        "compile": lambda: compiled(logits, z_t, table, step),
        "multinomial": lambda: torch.multinomial(logits[0].softmax(-1), 1),
        "amax": lambda: logits.amax(-1),
    }
    return {name: milliseconds(call, device, repeats, QUEUED) for name, call in calls.items()}


def memory_of(shape: tuple[int, int, int, int]) -> dict[str, float]:
    """Measure by how many MiB one fused and one eager reverse step raise this process's peak resident size (CPU)."""
    count, vocab, dim, latents = shape
    logits, table = torch.zeros(latents, count, vocab), torch.zeros(vocab + 1, dim)
    z_t, rows, seed = torch.zeros(latents, count, dim), torch.arange(count), torch.tensor([1, 2])
    fused = step_coefficients(*torch.tensor([0.45, 0.5], dtype=torch.float64), SCHEDULE)
    step = torch.tensor([0.1, 0.1, 0.9, 0.2])
    grown = {}
    for name, call in (
        ("fused hard", lambda: ops.reverse_step(logits, rows, z_t, table, fused, vocab, seed)),
        ("eager", lambda: eager_reverse(logits, z_t, table, step)),
    ):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call()
        grown[name] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return grown


def table(title: str, rows: dict[str, dict[str, float]], base: str) -> str:
    """Format milliseconds as Markdown, with the ratio to the column `base` in brackets."""
    names = list(next(iter(rows.values())))
    lines = [f"| {title} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for shape, values in rows.items():
        cells = [
            f"{v:.2f}" + ("" if n.startswith("fused") else f" ({v / values[base]:.1f}x)") for n, v in values.items()
        ]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--repeats", type=int, default=9, help="calls of which the median is taken")
    parser.add_argument("--small", action="store_true", help="the smallest shape of each kernel only")
    parser.add_argument("--json", type=as_path, help="file for the results as JSON")
    args = parser.parse_args()
    if args.repeats < 1:
        raise InputError(f"--repeats must be at least 1, not {args.repeats}")
    device = torch.device(args.device)
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    print(f"{ops.backend().name} on {machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"median of {args.repeats}, ms\n")  # fmt: skip
    shapes = (NOISING[2:3], REVERSE[3:]) if args.small else (NOISING, REVERSE)
    grown = memory_of(shapes[1][0]) if device.type == "cpu" else {}
    result: dict[str, Any] = {"backend": ops.backend().name, "machine": machine, "torch": torch.__version__}
    result["memory_mib"] = grown
    result["noising"] = {"B={} L={} D={} V={}".format(*s): noising(s, device, args.repeats) for s in shapes[0]}
    print(table("forward noising", result["noising"], "fused"), "\n")
    result["reverse"] = {"N={} V={} D={} K={}".format(*s): reverse(s, device, args.repeats) for s in shapes[1]}
    print(table("reverse step", result["reverse"], "fused hard"))
    if grown:
        print(f"\nmemory of a reverse step, {next(iter(result['reverse']))}: "
              + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in grown.items()))  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    run(main)
