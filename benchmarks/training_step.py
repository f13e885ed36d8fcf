"""Where a training step goes: the network, and everything that is not.

    python -m benchmarks.training_step                      tiny, 8 x 128 tokens, vocabulary 4,096
    CADD_BACKEND=torch python -m benchmarks.training_step   the same without the fused kernels
    python -m benchmarks.training_step --preset nano --models cadd mdlm cdm

Each part is timed by itself, median of --repeat runs, all in one process; shares are of their sum.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.kernels import milliseconds
from cadd_min import ops
from cadd_min.dit import PRESETS
from cadd_min.errors import InputError, run
from cadd_min.loss import stratified_times, token_losses
from cadd_min.model import MODELS, Denoiser, ModelConfig
from cadd_min.trainer import TrainConfig, Trainer, best_dtype, seeded


def parts(model_name: str, preset: str, vocab_size: int, length: int, batch_size: int, repeat: int) -> dict[str, float]:
    """Milliseconds of each part of a step, and of the step itself."""
    torch.manual_seed(0)
    net = Denoiser(ModelConfig(vocab_size, length, PRESETS[preset], model=model_name))
    data = torch.randint(vocab_size, (batch_size, length))
    trainer = Trainer(net, lambda index: data, TrainConfig(batch_size=batch_size))
    gen, table = seeded(0, 0), net.table()
    t = stratified_times(batch_size, gen)
    x_t, z_t = ops.forward_noising(data, data, table, t, net.schedule, net.mask_id, ops.draw_seed(gen))
    masked = x_t == net.mask_id
    features = net.features(x_t, z_t, t.float()).detach()[masked].requires_grad_()
    weight = torch.randn(batch_size, length, net.head_matrix().shape[1])

    def noise() -> None:
        ops.forward_noising(data, data, net.table(), t, net.schedule, net.mask_id, ops.draw_seed(gen))

    def network() -> None:
        with trainer.autocast():
            out = net.features(x_t, z_t, t.float())
        (out * weight).sum().backward()

    def head() -> None:
        with trainer.autocast():
            ce, _ = token_losses(features, net.head_matrix(), data[masked])
        ce.sum().backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        trainer.optimizer.step()
        trainer._update_ema()

    named = {"forward noising": noise, "network": network, "head and CE": head, "clip, AdamW, EMA": update}
    return {name: milliseconds(f, trainer.device, repeat) for name, f in (named | {"step": trainer.train_step}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cadd", "mdlm"], choices=MODELS)
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    if args.repeat < 1:
        raise InputError(f"--repeat must be at least 1, not {args.repeat}")
    found = {m: parts(m, args.preset, args.vocab_size, args.length, args.batch_size, args.repeat) for m in args.models}
    dtype = best_dtype(torch.device("cpu"))
    print(f"{ops.backend().name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype}, "
          f"{args.preset}, {args.batch_size} x {args.length} tokens, V = {args.vocab_size}\n")  # fmt: skip
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
