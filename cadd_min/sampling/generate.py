"""The sampler as the scripts call it: its options, a call with them, and a line that says which they were."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cadd_min import ops
from cadd_min.baselines import dispatch as methods
from cadd_min.model import Model
from cadd_min.orders import HITTING, Sampling, cosine_temperature
from cadd_min.sampler import Step
from cadd_min.utils.cli import add_options, from_args, whole
from cadd_min.utils.device import DTYPES, autocast, default_device, seeded
from cadd_min.utils.errors import InputError, choose

CKPT = "a checkpoint, its folder, a folder of runs, a folder for others, or hf:owner/name of the hub"


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add all options that shape a sample, the model and the noise apart."""
    group = add_options(parser, Sampling, "sampling")
    parser.set_defaults(zhat=None)  # each kind of data has its own
    group.add_argument(
        "--cosine-temperature",
        type=float,
        nargs="?",
        const=2.5,
        metavar="START",
        help="let it fall to --temperature along a cosine from START (the paper's for images: 2.5)",
    )


def add_run_options(parser: Any) -> None:
    """Add the options of the noise, the dtype and the device."""
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: as it was trained")
    parser.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1, ...")


def add_source_options(parser: Any) -> None:
    """Add the options of a model that is not a checkpoint, and of how its prompts are put."""
    parser.add_argument(
        "--from", dest="source", help="instead of --ckpt: a model of the Hugging Face hub, or its folder"
    )
    parser.add_argument(
        "--length", type=whole, help="with --from: tokens in a sample (default: as it was tuned, or 256)"
    )
    parser.add_argument("--mask-token", help="with --from: the mask's text, if the model does not say it")
    parser.add_argument("--chat", action="store_true", help="prompts go through the tokenizer's chat template")


def dtype_of(asked: str, content: dict[str, Any]) -> str:
    """The dtype asked for, or of "auto" the one that this checkpoint was trained in."""
    found = content["settings"].get("dtype", "float32") if asked == "auto" else asked
    return choose("the dtype of the checkpoint", found, DTYPES)


def check_seed(args: argparse.Namespace) -> None:
    """Raise InputError for a --seed that a generator does not take."""
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must be from 0 to 2^63 - 1, not {args.seed}")


def sampling(args: argparse.Namespace) -> Sampling:
    """The options as they were given, with a seed that is one; a cosine temperature is a function of t.

    Raises InputError for one that is out of range.
    """
    check_seed(args)
    options = from_args(Sampling, args)
    if args.cosine_temperature is not None:
        heat = cosine_temperature(args.cosine_temperature, args.temperature)
        options = dataclasses.replace(options, temperature=heat)
    for t in (0.0, 1.0):  # a cosine is between its ends
        options.temperature_at(t)
    return options


def samples(
    model: Model,
    how: Sampling,
    count: int,
    *,
    seed: int,
    dtype: str,
    index: int = 0,
    denoiser: Any = None,
    prompt: Tensor | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Tensor:
    """(count, L) tokens; `index` is of the batch: another one has other noise."""
    with autocast(model.device, dtype):
        return methods.draw(
            model,
            count,
            how,
            denoiser=denoiser,
            prompt=prompt,
            # of the CPU: the same noise on every device
            generator=seeded(seed, index) if index else torch.Generator().manual_seed(seed),
            callback=callback,
        )


def many(
    model: Model,
    how: Sampling,
    count: int,
    *,
    seed: int,
    dtype: str,
    batch_size: int,
    denoiser: Callable[[int, int], Any] | None = None,
) -> Tensor:
    """(count, L) tokens, batch by batch; denoiser(first, n) is the one for samples first to first + n - 1."""
    parts = []
    for index, first in enumerate(tqdm(range(0, count, batch_size), desc="sampling", unit="batch", leave=False)):
        n = min(batch_size, count - first)
        guided = denoiser(first, n) if denoiser else None
        parts.append(samples(model, how, n, seed=seed, dtype=dtype, index=index, denoiser=guided))
    return torch.cat(parts)


def draw_settings(each: Collection[argparse.Namespace]) -> str:
    """The temperature and the top-p of these options; what differs among them is listed."""
    starts = ["" if args.cosine_temperature is None else f"{args.cosine_temperature} to " for args in each]
    heats = dict.fromkeys(f"{start}{args.temperature}" for start, args in zip(starts, each))
    top_ps = dict.fromkeys(str(args.top_p) for args in each)
    listed = {"temperature": heats, "top-p": top_ps}
    return ", ".join(f"{name} {', '.join(some)}{' in turn' * (len(some) > 1)}" for name, some in listed.items())


def _steps(args: argparse.Namespace, models: Collection[str]) -> str:
    """What the chains of these models take of --steps, which not all of them heed."""
    each, others = "a step for each token", set(models) - {"ar"}
    if args.time_grid == HITTING:
        return f"{each} ({HITTING})"
    grid = [f"T {args.steps} ({args.time_grid})"] if others else []
    return ", but of ar ".join(grid + [each] * ("ar" in models))


def settings(
    args: argparse.Namespace, models: Collection[str], each: Collection[argparse.Namespace] | None = None
) -> str:
    """What a reader needs to compare samples of these models ("cadd", "ar", ...) with others.

    each: the options of a sweep, if there was one.
    """
    order = "".join(f", {name} {getattr(args, name)}" for name in ("order", "block", "remask") if getattr(args, name))
    return (
        f"backend {ops.backend().name}, zhat {args.zhat}, {_steps(args, models)}, K {args.num_latents}, "
        f"{draw_settings(each or [args])}, strength {args.strength}{order}, {args.dtype} on {args.device}, "
        f"last step a draw, seed {args.seed}"
    )
