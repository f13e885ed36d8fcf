"""What training costs: tokens/s, peak memory, the share of the machine's arithmetic that is used, where a step goes.

    python -m benchmarks.training                       tiny, 8 x 128 tokens, vocabulary 4,096: cadd, mdlm, ar, GPT-2
    CADD_BACKEND=torch python -m benchmarks.training    the same without the fused kernels
    python -m benchmarks.training --preset small --length 1024 --vocab-size 50257 --batch-size 32 --compile
    python -m benchmarks.training --models cadd cadd:mse=1 mdlm
    python -m benchmarks.training --models cadd --unet cifar10 --image 32 32 3 --vocab-size 256 --batch-size 128

A model is one of cadd, mdlm, cdm, ar, udm, sedd, with fields of ModelConfig or TrainConfig behind a colon; or gpt2, the
Hugging Face library's GPT-2 (pip install transformers) of the same width, depth, heads and vocabulary, trained by the
plainest loop: AdamW, clipped, no average of weights.

Steps of all models in turn, --repeat rounds, medians; then, of all but udm and sedd, each part of a step by itself and
the whole step in turn, as many rounds, medians, and what the parts do not add up to (below 0: they take longer alone).
Peak memory is of two steps in a process of its own, weights, gradients and optimiser included (on a CPU by Linux's
/proc). MFU: the arithmetic of the model, forward and backward, 6 for each weight and row that it multiplies and 12
width L for each layer's attention (half of that if causal), over what this machine's matrix product of 2048 x 2048
(8192 on a GPU) reaches in the same dtype; the head counts the rows at which it runs.
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
from benchmarks.specs import parse
from cadd_min import ops
from cadd_min.baselines.ar import causal_features
from cadd_min.dit import PRESETS, Size
from cadd_min.loss import token_losses
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.objective import Batch
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.unet import UNET_PRESETS
from cadd_min.utils.cli import run
from cadd_min.utils.device import DTYPES, autocast, best_dtype, seeded, torch_device
from cadd_min.utils.errors import InputError
from train_image import DEFAULTS

GPT2 = "gpt2"


class Ours:
    """A model of this project under its own trainer."""

    def __init__(self, spec: str, args: argparse.Namespace):
        name, options = parse(spec)
        chosen = {f.name for f in dataclasses.fields(ModelConfig)} & options.keys()
        model, training = {k: options[k] for k in chosen}, {k: v for k, v in options.items() if k not in chosen}
        torch.manual_seed(0)
        if args.unet is None:
            config = ModelConfig(args.vocab_size, args.length, PRESETS[args.preset], model=name, **model)
        else:
            usual = {k: v for k, v in DEFAULTS.items() if k in {f.name for f in dataclasses.fields(ModelConfig)}}
            shape = tuple(args.image)
            config = ModelConfig(
                args.vocab_size, math.prod(shape), UNET_PRESETS[args.unet], shape, model=name, **(usual | model)
            )
        self.net, device = Denoiser(config).to(args.device), args.device
        self.data = torch.randint(args.vocab_size, (args.batch_size, config.length), device=device)
        training = {"batch_size": args.batch_size, "dtype": args.dtype, "compile": args.compile} | training
        self.trainer = Trainer(self.net, lambda index: Batch(self.data), TrainConfig(**training))
        # on average over t half of the tokens are masked; ar and udm predict them all
        self.head_share = {"ar": 1.0, "udm": 1.0, "cdm": 1.0}.get(name, 0.5)
        self.step: Callable[[], Any] = self.trainer.train_step
        self.backward: Callable[[], Any] = self.trainer.backward

    def parts(self) -> dict[str, Callable[[], Any]]:
        """What a step of the core's models and of ar consists of; the update needs the gradients of `backward`."""
        net, data, trainer = self.net, self.data, self.trainer
        model, config = net.config.model, trainer.config
        if model not in ("cadd", "mdlm", "cdm", "ar"):
            return {}
        gen, table = seeded(0, 0, data.device), net.table()
        # as spread as a step's times, and 1/2 on average for a single sequence too: the head runs where it is masked
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

        first = {} if model == "ar" else {"forward noising": noise}
        return first | passes(net, features, loss) | {"clip, AdamW": update, "EMA": trainer._update_ema}

    def flops(self) -> float | None:
        """Of a step, forward and backward; None for a U-Net."""
        size, config = self.net.config.size, self.net.config
        if not isinstance(size, Size):
            return None
        tokens = self.data.numel()
        per_token = matrices(size, config.length, config.model == "ar")
        return tokens * (per_token + 6 * self.head_share * config.vocab_size * size.width)


class Gpt2:
    """GPT-2 by the Hugging Face library."""

    def __init__(self, args: argparse.Namespace):
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError:
            raise InputError("--models gpt2 needs transformers: pip install transformers, or leave it out") from None
        size = PRESETS[args.preset]
        torch.manual_seed(0)
        self.args, self.size = args, size
        config = GPT2Config(
            vocab_size=args.vocab_size, n_positions=args.length, n_embd=size.width, n_layer=size.layers,
            n_head=size.heads, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False, bos_token_id=None,
            eos_token_id=None,
        )  # fmt: skip
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
        """What a step consists of; the update needs the gradients of `backward`."""
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
        per_token = matrices(self.size, self.args.length, causal=True)
        return self.data.numel() * (per_token + 6 * self.args.vocab_size * self.size.width)


def passes(
    net: nn.Module, features: Callable[[], Tensor], loss: Callable[[Tensor], Tensor]
) -> dict[str, Callable[[], Any]]:
    """The parts that go forward and backward: the network up to its features, and from them the head to the loss.

    features() are (..., F), and loss of them a scalar. Gradients are made anew at every call, as in a step; those that
    the parameters hold stay.
    """
    weights = [p for p in net.parameters() if p.requires_grad]
    rows = features().detach().requires_grad_()
    return {
        "network": lambda: torch.autograd.grad(features().float().square().mean(), weights, allow_unused=True),
        "head and loss": lambda: torch.autograd.grad(loss(rows), [rows, *weights], allow_unused=True),
    }


def matrices(size: Size, length: int, causal: bool) -> float:
    """Operations of a token in a transformer's blocks, forward and backward: 12 width^2 weights a layer, attention."""
    return size.layers * (6 * 12 * size.width**2 + 12 * size.width * length * (0.5 if causal else 1))


def build(spec: str, args: argparse.Namespace) -> Ours | Gpt2:
    return Gpt2(args) if spec == GPT2 else Ours(spec, args)


def peak_memory(job: tuple[str, argparse.Namespace]) -> float:
    """GiB that two steps need at most: the allocator's on a GPU; on a CPU the process's, beyond what it had before."""
    spec, args = job
    torch.set_num_threads(args.threads)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, which was that of importing
    model = build(spec, args)
    for _ in range(2):
        model.step()
    if torch.device(args.device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return (_resident("VmHWM") - before) / 2**20


def _resident(key: str) -> int:
    """KiB of this process by /proc: VmRSS now, VmHWM at most."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) if found else 0


def machine_flops(args: argparse.Namespace, device: torch.device) -> float:
    """A second, of a matrix product in the network's dtype."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(DTYPES[args.dtype])
    return 2 * n**3 / (milliseconds(lambda: a @ a, device, 7) / 1e3)


def row(name: str, values: list[str]) -> str:
    return f"| {name} | " + " | ".join(values) + " |"


def report(models: dict[str, Ours | Gpt2], args: argparse.Namespace, device: torch.device) -> None:
    """Both tables."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.repeat):
        for name, model in models.items():
            times[name].append(milliseconds(model.step, device, 1))
    step = {name: statistics.median(found) for name, found in times.items()}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = dict(zip(models, pool.imap(peak_memory, [(name, args) for name in models], chunksize=1)))
    peak = machine_flops(args, device)
    print("| model | step, ms | to the first | tokens/s | MFU | peak memory, GiB | parameters |\n" + "|---" * 7 + "|")
    for name, model in models.items():
        flops, tokens = model.flops(), model.data.numel()
        used = "" if flops is None else f"{flops / (step[name] / 1e3) / peak:.0%}"
        ratio = statistics.median(b / a for a, b in zip(times[next(iter(models))], times[name]))
        count = sum(p.numel() for p in model.net.parameters())
        speed = f"{1e3 * tokens / step[name]:,.0f}"
        print(
            row(name, [f"{step[name]:.1f}", f"{ratio:.2f}", speed, used, f"{memory[name]:.2f}", f"{count / 1e6:.1f}M"])
        )
    print(f"\na matrix product reaches {peak / 1e9:,.0f} GFLOP/s\n")
    report_parts(models, args.repeat, device)


def report_parts(models: dict[str, Ours | Gpt2], repeat: int, device: torch.device) -> None:
    """The second table, of the models that have parts: ms and share of the step, which closes it."""
    measured = {
        name: timed_parts(model, parts, repeat, device) for name, model in models.items() if (parts := model.parts())
    }
    if not measured:
        return
    print(row("part", [f"{name} ms | share" for name in measured]) + "\n" + "|---" * (1 + 2 * len(measured)) + "|")
    for part in max(measured.values(), key=len):  # it has every part that another has
        cells = [f"{v[part]:.1f} | {v[part] / v['step']:.0%}" if part in v else " | " for v in measured.values()]
        print(row(part, cells))


def timed_parts(
    model: Ours | Gpt2, parts: dict[str, Callable[[], Any]], repeat: int, device: torch.device
) -> dict[str, float]:
    """Medians in ms of a model's parts, what the step takes beyond their sum, and the step."""
    times: dict[str, list[float]] = {name: [] for name in (*parts, "step")}
    for _ in range(repeat):
        model.backward()
        for name, call in (*parts.items(), ("step", model.step)):  # last, as it leaves no gradients
            times[name].append(milliseconds(call, device, 1))
    found = {name: statistics.median(times[name]) for name in parts}
    step = statistics.median(times["step"])
    return found | {"not in a part": step - sum(found.values()), "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mdlm", "cadd", "ar", GPT2], help="the first is compared with")
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--unet", choices=UNET_PRESETS, help="of images instead, this U-Net")
    parser.add_argument("--image", type=int, nargs=3, default=[32, 32, 3], help="height, width, colours")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the networks")
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    if args.repeat < 1:
        raise InputError(f"--repeat must be at least 1, not {args.repeat}")
    device = torch_device(args.device)
    args.threads = torch.get_num_threads()
    args.dtype = best_dtype(device) if args.dtype == "auto" else args.dtype
    what = f"U-Net {args.unet}, {args.batch_size} images of {'x'.join(map(str, args.image))}"
    if args.unet is None:
        what = f"{args.preset}, {args.batch_size} x {args.length} tokens"
    backend = f"{ops.backend().name}, torch {torch.__version__}, {device}, {args.threads} threads, {args.dtype}"
    print(f"{backend}, {what}, V = {args.vocab_size}\n")
    report({spec: build(spec, args) for spec in dict.fromkeys(args.models)}, args, device)


if __name__ == "__main__":
    run(main)
