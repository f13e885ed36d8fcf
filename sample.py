"""Draw samples from a trained model.

python sample.py                                       the newest run
python sample.py --zhat soft --steps 256 --num 4       mode covering, more steps, four samples
python sample.py --prompt "The [8] of the union [16]"  given text stays, [n] is a gap of n tokens
python sample.py --watch                               see it happen
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from cadd_min import checkpoint, ops
from cadd_min.errors import InputError, run, torch_device
from cadd_min.options import HelpFormatter
from cadd_min.sampler import TIME_GRIDS, ZHATS, cosine_temperature, sample
from cadd_min.text import Watch, parse_prompt
from cadd_min.trainer import DTYPES


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--ckpt", type=Path, default=Path("runs"), help="a checkpoint, its folder, or a folder of runs")
    parser.add_argument("--zhat", default="hard", help=f"estimate of z_0 at each step: {', '.join(ZHATS)}")
    parser.add_argument("--steps", type=int, default=128, help="T, steps from noise to text")
    parser.add_argument("--num-latents", type=int, default=1, help="K, latents whose predictions are averaged")
    parser.add_argument("--num", type=int, default=1, help="samples")
    parser.add_argument("--prompt", help='text with gaps, "The [8] of the union [16]"')
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
    parser.add_argument("--watch", action="store_true", help="show the first sample's denoising in the terminal")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.num < 1:
        raise InputError(f"--num must be at least 1, not {args.num}")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must be from 0 to 2^63 - 1, not {args.seed}")
    device = torch_device(args.device)
    model, tokenizer, content = checkpoint.load_denoiser(args.ckpt, device)
    length = model.config.length
    prompt = parse_prompt(args.prompt, tokenizer, length).expand(args.num, -1) if args.prompt else None
    start, tau = args.cosine_temperature, args.temperature
    heat = "" if start is None else f"{start} to "
    if start is not None:
        tau = cosine_temperature(start, args.temperature)
    trained = content.get("settings", {}).get("dtype", "float32")
    dtype = trained if args.dtype == "auto" else args.dtype
    with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
        x = sample(
            model,
            (args.num, length),
            model.table(),
            model.schedule,
            model.mask_id,
            steps=args.steps,
            zhat=args.zhat,
            num_latents=args.num_latents,
            temperature=tau,
            top_p=args.top_p,
            strength=args.strength,
            time_grid=args.time_grid,
            prompt=prompt,
            generator=torch.Generator().manual_seed(args.seed),  # of the CPU: the same noise on every device
            callback=Watch(tokenizer, args.steps) if args.watch else None,
        )
    for row in x.tolist():
        print(tokenizer.decode(row), end="\n\n")
    print(
        f"model {model.config.model} at step {content['trainer']['step']} ({checkpoint.find(args.ckpt)}), "
        f"backend {ops.backend().name}, zhat {args.zhat}, T {args.steps} ({args.time_grid}), K {args.num_latents}, "
        f"temperature {heat}{args.temperature}, top-p {args.top_p}, "
        f"strength {args.strength}, {dtype} on {device}, seed {args.seed}"
    )


if __name__ == "__main__":
    run(main)
