"""The sampler as the scripts call it: its options, a call with them, and a line that says which they were."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cadd_min import ops
from cadd_min.errors import InputError
from cadd_min.model import Denoiser
from cadd_min.sampler import TIME_GRIDS, ZHATS, Step, cosine_temperature, sample
from cadd_min.trainer import DTYPES, seeded


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Everything that shapes a sample, but the model."""
    parser.add_argument(
        "--zhat", help=f"estimate of z_0 at each step: {', '.join(ZHATS)} (default: hard, images: soft)"
    )
    parser.add_argument("--steps", type=int, default=128, help="T, steps from noise to sample")
    parser.add_argument("--num-latents", type=int, default=1, help="K, latents whose predictions are averaged")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the draws; 0 takes the most probable")
    parser.add_argument(
        "--cosine-temperature",
        type=float,
        nargs="?",
        const=2.5,
        metavar="START",
        help="let it fall to --temperature along a cosine from START (the paper's for images: 2.5)",
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the smallest set with this probability")
    parser.add_argument("--strength", type=float, default=1.0, help="of the latent that the network sees; 0 ignores it")
    parser.add_argument("--time-grid", default="uniform", help=f"{', '.join(TIME_GRIDS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: as it was trained")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(asked: str, content: dict[str, Any]) -> str:
    """The dtype asked for, or of "auto" the one that this checkpoint was trained in."""
    return content.get("settings", {}).get("dtype", "float32") if asked == "auto" else asked


def samples(
    model: Denoiser,
    args: argparse.Namespace,
    count: int,
    *,
    index: int = 0,
    denoiser: Any = None,
    prompt: Tensor | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Tensor:
    """(count, L) tokens by these options; `index` is of the batch: another one has other noise."""
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must be from 0 to 2^63 - 1, not {args.seed}")
    device, start, tau = model.embedding.weight.device, args.cosine_temperature, args.temperature
    with torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != "float32"):
        return sample(
            denoiser or model,
            (count, model.config.length),
            model.table(),
            model.schedule,
            model.mask_id,
            steps=args.steps,
            zhat=args.zhat,
            num_latents=args.num_latents,
            temperature=tau if start is None else cosine_temperature(start, tau),
            top_p=args.top_p,
            strength=args.strength,
            time_grid=args.time_grid,
            prompt=prompt,
            # of the CPU: the same noise on every device
            generator=seeded(args.seed, index) if index else torch.Generator().manual_seed(args.seed),
            callback=callback,
        )


def settings(args: argparse.Namespace) -> str:
    """What a reader needs to compare samples with others."""
    heat = "" if args.cosine_temperature is None else f"{args.cosine_temperature} to "
    return (
        f"backend {ops.backend().name}, zhat {args.zhat}, T {args.steps} ({args.time_grid}), K {args.num_latents}, "
        f"temperature {heat}{args.temperature}, top-p {args.top_p}, strength {args.strength}, {args.dtype} on "
        f"{args.device}, seed {args.seed}"
    )
