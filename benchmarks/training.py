"""Measure what training costs: tokens/s, peak memory, the share of the machine's arithmetic, and the parts of a step.

    python -m benchmarks.training                       mdlm, cadd, ar, GPT-2: tiny, 8 x 128 tokens, vocabulary 4,096
    CADD_BACKEND=torch python -m benchmarks.training    the same without the fused kernels
    python -m benchmarks.training --preset small --length 1024 --vocab-size 50257 --batch-size 32 --compile
    python -m benchmarks.training --models cadd cadd:mse=1 mdlm
    python -m benchmarks.training --models cadd --unet cifar10 --image 32 32 3 --vocab-size 256 --batch-size 128

A model is cadd, mdlm, cdm, ar, udm or sedd, with fields of ModelConfig and TrainConfig behind a colon. "gpt2" is the
Hugging Face library's GPT-2 (pip install transformers) of the same width, depth, heads and vocabulary. Its training
loop is the plainest: AdamW with clipped gradients, no average of the weights.

The first table has a row for each model:

    step, ms       median of --repeat rounds; in each round every model makes one step
    to the first   the step relative to the first model's, median over rounds
    MFU            operations a second, over those of a matrix product of 2048 x 2048 (8192 on a GPU) in the same dtype.
                   Forward and backward take 6 operations for each weight and row that it multiplies, and 12 width L
                   a token for each layer's attention (half if causal). The head counts the rows at which it runs.
    peak memory    of two steps in a process of their own, with weights, gradients and optimiser (on a CPU by /proc)

The second table splits the step of every model but udm and sedd. Each part runs alone, then the whole step, in --repeat
rounds, and the medians count. "not in a part" is the step less its parts. It is below 0 where parts take longer alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels import milliseconds
from benchmarks.specs import gpt2_config, parse
from cadd_min import ops
from cadd_min.baselines.ar import causal_features
from cadd_min.dit import PRESETS, Size
from cadd_min.loss import token_losses
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.objective import Batch
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.unet import UNET_PRESETS
from cadd_min.utils.cli import run
from cadd_min.utils.device import DTYPES, autocast, best_dtype, default_device, seeded, torch_device
from cadd_min.utils.errors import InputError
from train_image import DEFAULTS

GPT2 = "gpt2"


class Ours:
    """A model of this project under the project's trainer."""

    def __init__(self, spec: str, args: argparse.Namespace):
        name, options = parse(spec)
        of_model = {f.name for f in dataclasses.fields(ModelConfig)} & options.keys()
        model, training = {k: options[k] for k in of_model}, {k: v for k, v in options.items() if k not in of_model}
        torch.manual_seed(0)
        if args.unet is None:
            config = ModelConfig(args.vocab_size, args.length, PRESETS[args.preset], model=name, **model)
        else:
            defaults = {k: v for k, v in DEFAULTS.items() if k in {f.name for f in dataclasses.fields(ModelConfig)}}
            shape = tuple(args.image)
            config = ModelConfig(
                args.vocab_size, math.prod(shape), UNET_PRESETS[args.unet], shape, model=name, **(defaults | model)
            )
        self.net, device = Denoiser(config).to(args.device), args.device
        self.data = torch.randint(args.vocab_size, (args.batch_size, config.length), device=device)
        training = {"batch_size": args.batch_size, "dtype": args.dtype, "compile": args.compile} | training
        self.trainer = Trainer(self.net, lambda index: Batch(self.data), TrainConfig(**training))
        # on average over t half of the tokens are masked; ar, udm and cdm predict all tokens
        self.head_share = {"ar": 1.0, "udm": 1.0, "cdm": 1.0}.get(name, 0.5)
        self.step: Callable[[], Any] = self.trainer.train_step
        self.backward: Callable[[], Any] = self.trainer.backward

    def parts(self) -> dict[str, Callable[[], Any]]:
        """Make the parts of a step, by name, for the paper's models and ar. The update needs `backward`'s gradients."""
        net, data, trainer = self.net, self.data, self.trainer
        model, config = net.config.model, trainer.config
        if model not in ("cadd", "mdlm", "cdm", "ar"):
            return {}
        gen, table = seeded(0, 0, data.device), net.table()
        # spread like a step's times, with mean 1/2 for a single sequence, too: the head runs at masked positions
        t = (torch.arange(len(data), device=data.device).double() + 0.5) / len(data)
        x_t, z_t = ops.forward_noising(data, data, table, t, net.schedule, net.mask_id, ops.draw_seed(gen))
        masked = x_t == net.mask_id
        targets = data.flatten() if model == "ar" else data[masked]

        def noise() -> None:
            ops.forward_noising(data, data, net.table(), t, net.schedule, net.mask_id, ops.draw_seed(gen))

        def features() -> Tensor:
            with trainer.autocast():
                return causal_features(net, data) if model == "ar" else net.features(x_t, z_t, t.float())[masked]

        def loss(rows: Tensor) -> Tensor:
            with trainer.autocast():
                ce, mse = token_losses(rows, net.head_matrix(), targets, table=table if config.mse > 0 else None)
            return (ce + config.mse * mse).sum()

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip)
            trainer.optimizer.step()

        noising = {} if model == "ar" else {"forward noising": noise}
        return noising | passes(net, features, loss) | {"clip, AdamW": update, "EMA": trainer._update_ema}

    def flops(self) -> float | None:
        """Count the operations of a step, forward and backward. Returns None for a U-Net."""
        size, config = self.net.config.size, self.net.config
        if not isinstance(size, Size):
            return None
        tokens = self.data.numel()
        per_token = matrices(size, config.length, config.model == "ar")
        return tokens * (per_token + 6 * self.head_share * config.vocab_size * size.width)


class Gpt2:
    """GPT-2 of the Hugging Face library in a plain training loop."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.size = args, PRESETS[args.preset]
        config = gpt2_config(self.size, args.vocab_size, args.length)
        from transformers import GPT2LMHeadModel

        torch.manual_seed(0)
        self.net = GPT2LMHeadModel(config).to(args.device)
        if args.compile:
            self.net.compile()
        self.data = torch.randint(args.vocab_size, (args.batch_size, args.length), device=args.device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3, fused=True)

    def autocast(self) -> torch.autocast:
        return autocast(torch.device(self.args.device), self.args.dtype)

    def loss(self, logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.data[:, 1:].flatten())

    def backward(self) -> Tensor:
        with self.autocast():
            logits = self.net(self.data).logits
        loss = self.loss(logits)
        loss.backward()
        return loss

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()

    def step(self) -> Tensor:
        loss = self.backward()
        self.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def parts(self) -> dict[str, Callable[[], Any]]:
        """Make the parts of a step, by name. The update needs the gradients of `backward`."""
        transformer: Any = self.net.transformer
        network = torch.compile(transformer) if self.args.compile else transformer

        def features() -> Tensor:
            with self.autocast():
                return network(self.data).last_hidden_state

        def loss(rows: Tensor) -> Tensor:
            with self.autocast():
                logits = self.net.lm_head(rows)
            return self.loss(logits)

        return passes(self.net, features, loss) | {"clip, AdamW": self.update}

    def flops(self) -> float:
        """Count the operations of a step, forward and backward."""
        per_token = matrices(self.size, self.args.length, causal=True)
        return self.data.numel() * (per_token + 6 * self.args.vocab_size * self.size.width)


def passes(
    net: nn.Module, features: Callable[[], Tensor], loss: Callable[[Tensor], Tensor]
) -> dict[str, Callable[[], Any]]:
    """Make the two parts that go forward and backward: the network up to its features, and the head up to the loss.

    features() returns (..., F), and loss maps these to a scalar. Every call computes gradients anew, as a step does,
    and leaves the gradients in the parameters alone.
    """
    weights = [p for p in net.parameters() if p.requires_grad]
    rows = features().detach().requires_grad_()
    return {
        "network": lambda: torch.autograd.grad(features().float().square().mean(), weights, allow_unused=True),
        "head and loss": lambda: torch.autograd.grad(loss(rows), [rows, *weights], allow_unused=True),
    }


def matrices(size: Size, length: int, causal: bool) -> float:
    """Count a token's operations in a transformer's blocks, forward and backward.

    A layer has 12 width^2 weights and its attention.
    """
    return size.layers * (6 * 12 * size.width**2 + 12 * size.width * length * (0.5 if causal else 1))


def build(spec: str, args: argparse.Namespace) -> Ours | Gpt2:
    return Gpt2(args) if spec == GPT2 else Ours(spec, args)


def peak_memory(job: tuple[str, argparse.Namespace]) -> float:
    """Measure the peak memory of two steps in GiB: by the allocator on a GPU, by the growth of the process on a CPU."""
    spec, args = job
    torch.set_num_threads(args.threads)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which is that of the imports
    model = build(spec, args)
    for _ in range(2):
        model.step()
    if torch.device(args.device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return (_resident("VmHWM") - before) / 2**20


def _resident(key: str) -> int:
    """Read the KiB of this process from /proc: VmRSS is its size now, VmHWM its peak."""
    match = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(match[1]) if match else 0


def machine_flops(args: argparse.Namespace, device: torch.device) -> float:
    """Measure the operations a second of a matrix product in the network's dtype."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(DTYPES[args.dtype])
    return 2 * n**3 / (milliseconds(lambda: a @ a, device, 7) / 1e3)


def row(name: str, values: list[str]) -> str:
    return f"| {name} | " + " | ".join(values) + " |"


def report(models: dict[str, Ours | Gpt2], args: argparse.Namespace, device: torch.device) -> None:
    """Print both tables."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.repeat):
        for name, model in models.items():
            times[name].append(milliseconds(model.step, device, 1))
    step = {name: statistics.median(ms) for name, ms in times.items()}
    peak = machine_flops(args, device)
    print("| model | step, ms | to the first | tokens/s | MFU | peak memory, GiB | parameters |\n" + "|---" * 7 + "|")
    for name, model in models.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own, whose peak is the model's
            memory = pool.apply(peak_memory, ((name, args),))
        flops, tokens = model.flops(), model.data.numel()
        used = "" if flops is None else f"{flops / (step[name] / 1e3) / peak:.0%}"
        ratio = statistics.median(b / a for a, b in zip(times[next(iter(models))], times[name]))
        count = sum(p.numel() for p in model.net.parameters())
        speed = f"{1e3 * tokens / step[name]:,.0f}"
        cells = [f"{step[name]:.1f}", f"{ratio:.2f}", speed, used, f"{memory:.2f}", f"{count / 1e6:.1f}M"]
        print(row(name, cells), flush=True)
    print(f"\na matrix product reaches {peak / 1e9:,.0f} GFLOP/s\n")
    report_parts(models, args.repeat, device)


def report_parts(models: dict[str, Ours | Gpt2], repeat: int, device: torch.device) -> None:
    """Print the second table, for the models that have parts: ms and share of the step. The step is the last row."""
    measured = {
        name: timed_parts(model, parts, repeat, device) for name, model in models.items() if (parts := model.parts())
    }
    if not measured:
        return
    print(row("part", [f"{name} ms | share" for name in measured]) + "\n" + "|---" * (1 + 2 * len(measured)) + "|")
    for part in max(measured.values(), key=len):  # the longest has all parts
        cells = [f"{v[part]:.1f} | {v[part] / v['step']:.0%}" if part in v else " | " for v in measured.values()]
        print(row(part, cells))


def timed_parts(
    model: Ours | Gpt2, parts: dict[str, Callable[[], Any]], repeat: int, device: torch.device
) -> dict[str, float]:
    """Measure the medians in ms of a model's parts, of what the step takes beyond their sum, and of the step."""
    times: dict[str, list[float]] = {name: [] for name in (*parts, "step")}
    for _ in range(repeat):
        model.backward()
        for name, call in (*parts.items(), ("step", model.step)):  # the step is last: it clears the gradients
            times[name].append(milliseconds(call, device, 1))
    medians = {name: statistics.median(times[name]) for name in parts}
    step = statistics.median(times["step"])
    return medians | {"not in a part": step - sum(medians.values()), "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["mdlm", "cadd", "ar", GPT2], help="models; ratios are to the first"
    )
    parser.add_argument("--preset", default="tiny", choices=PRESETS, help="size of the networks")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--unet", choices=UNET_PRESETS, help="train this U-Net on images instead")
    parser.add_argument("--image", type=int, nargs=3, default=[32, 32, 3], help="height, width and colours")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--compile", action="store_true", help="compile the networks")
    parser.add_argument("--repeat", type=int, default=9, help="rounds of which the median is taken")
    args = parser.parse_args()
    if args.repeat < 1:
        raise InputError(f"--repeat must be at least 1, not {args.repeat}")
    device = torch_device(args.device)
    args.threads = torch.get_num_threads()
    args.dtype = best_dtype(device) if args.dtype == "auto" else args.dtype
    task = f"U-Net {args.unet}, {args.batch_size} images of {'x'.join(map(str, args.image))}"
    if args.unet is None:
        task = f"{args.preset}, {args.batch_size} x {args.length} tokens"
    backend = f"{ops.backend().name}, torch {torch.__version__}, {device}, {args.threads} threads, {args.dtype}"
    print(f"{backend}, {task}, V = {args.vocab_size}\n")
    report({spec: build(spec, args) for spec in dict.fromkeys(args.models)}, args, device)


if __name__ == "__main__":
    run(main)
