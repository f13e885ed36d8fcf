"""Where a training step goes: the network, and everything that is not.

    python -m benchmarks.training_step                      tiny, 8 x 128 tokens, vocabulary 4,096
    CADD_BACKEND=torch python -m benchmarks.training_step   the same without the fused kernels
    python -m benchmarks.training_step --preset nano --models cadd mdlm cdm
    python -m benchmarks.training_step --unet cifar10 --image 32 32 3 --vocab-size 256 --batch-size 128 --repeat 1

Each part is timed by itself, median of --repeat runs, all in one process; shares are of their sum. Peak memory is that
of a training step, weights, gradients and optimiser included: the allocator's on a GPU, the process's on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import resource

import torch

from benchmarks.kernels import milliseconds
from cadd_min import ops
from cadd_min.dit import PRESETS
from cadd_min.errors import InputError, run
from cadd_min.loss import stratified_times, token_losses
from cadd_min.model import MODELS, Denoiser, ModelConfig
from cadd_min.trainer import TrainConfig, Trainer, best_dtype, seeded
from cadd_min.unet import UNET_PRESETS
from train_image import DEFAULTS


def build(model: str, args: argparse.Namespace) -> Denoiser:
    """An untrained model of text, or with --unet of images."""
    torch.manual_seed(0)
    if args.unet is None:
        return Denoiser(ModelConfig(args.vocab_size, args.length, PRESETS[args.preset], model=model))
    shape = tuple(args.image)
    chosen = {k: v for k, v in DEFAULTS.items() if k in {f.name for f in dataclasses.fields(ModelConfig)}}
    size = UNET_PRESETS[args.unet]
    return Denoiser(ModelConfig(args.vocab_size, math.prod(shape), size, shape, model=model, **chosen))


def peak_memory(trainer: Trainer) -> float:
    """GiB that a training step has needed at most, so far."""
    if trainer.device.type == "cuda":
        return torch.cuda.max_memory_allocated(trainer.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def parts(net: Denoiser, args: argparse.Namespace) -> tuple[dict[str, float], float]:
    """Milliseconds of each part of a step and of the step itself, and the step's peak memory in GiB."""
    vocab_size, length, batch_size = args.vocab_size, net.config.length, args.batch_size
    device = torch.device(args.device)
    net, data = net.to(device), torch.randint(vocab_size, (batch_size, length), device=device)
    trainer = Trainer(net, lambda index: data, TrainConfig(batch_size=batch_size, dtype=args.dtype))
    trainer.train_step()
    memory = peak_memory(trainer)
    gen, table = seeded(0, 0, device), net.table()
    t = stratified_times(batch_size, gen, device)
    x_t, z_t = ops.forward_noising(data, data, table, t, net.schedule, net.mask_id, ops.draw_seed(gen))
    masked = x_t == net.mask_id
    with trainer.autocast(), torch.no_grad():
        features = net.features(x_t, z_t, t.float())[masked].requires_grad_()

    def noise() -> None:
        ops.forward_noising(data, data, net.table(), t, net.schedule, net.mask_id, ops.draw_seed(gen))

    def network() -> None:
        with trainer.autocast():
            out = net.features(x_t, z_t, t.float())
        out.float().square().mean().backward()

    def head() -> None:
        with trainer.autocast():
            ce, _ = token_losses(features, net.head_matrix(), data[masked])
        ce.sum().backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        trainer.optimizer.step()
        trainer._update_ema()

    named = {"forward noising": noise, "network": network, "head and CE": head, "clip, AdamW, EMA": update}
    every = named | {"step": trainer.train_step}
    return {name: milliseconds(f, trainer.device, args.repeat) for name, f in every.items()}, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cadd", "mdlm"], choices=MODELS)
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--unet", choices=UNET_PRESETS, help="of images instead, this U-Net")
    parser.add_argument("--image", type=int, nargs=3, default=[32, 32, 3], help="height, width, colours")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    if args.repeat < 1:
        raise InputError(f"--repeat must be at least 1, not {args.repeat}")
    found, memory = {}, {}
    for m in args.models:
        found[m], memory[m] = parts(build(m, args), args)
    dtype = best_dtype(torch.device(args.device)) if args.dtype == "auto" else args.dtype
    what = f"U-Net {args.unet}, {args.batch_size} images of {'x'.join(map(str, args.image))}"
    if args.unet is None:
        what = f"{args.preset}, {args.batch_size} x {args.length} tokens"
    print(f"{ops.backend().name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype}, {what}, "
          f"V = {args.vocab_size}; peak memory so far, GiB: "
          + ", ".join(f"{m} {gib:.1f}" for m, gib in memory.items()) + "\n")  # fmt: skip
    print("| part | " + " | ".join(f"{m} ms | share" for m in found) + " |")
    print("|---" * (1 + 2 * len(found)) + "|")
    for name in next(iter(found.values())):
        cells = []
        for times in found.values():
            total = sum(v for k, v in times.items() if k != "step")
            cells.append(f"{times[name]:.1f} | " + ("" if name == "step" else f"{times[name] / total:.0%}"))
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run(main)
