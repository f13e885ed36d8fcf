"""Measure a trained model of images: its samples against real ones, and its likelihood bound.

python evaluate.py frechet                             the newest run, in the features of a small classifier
python evaluate.py fid --num 50000 --steps 512         FID, IS, precision and recall by torch-fidelity (Inception)
python evaluate.py bound                               bits per dimension on held-out images, a bound from above

`frechet` trains its classifier on the same data: it compares models, and is never to be called FID.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cadd_min import checkpoint, generate, images, judge
from cadd_min.errors import InputError, run, torch_device
from cadd_min.guidance import Guided
from cadd_min.inception import inception_metrics
from cadd_min.loss import nelbo_parts
from cadd_min.model import Denoiser
from cadd_min.options import HelpFormatter
from cadd_min.pixels import Pixels
from cadd_min.trainer import DTYPES, seeded

NAMES = {
    "FD": "Fréchet distance (classifier's features, not FID)",
    "variety": "class entropy of all, nats",
    "doubt": "class entropy of each, nats",
    "precision": "precision",
    "recall": "recall",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("what", choices=["frechet", "fid", "bound"])
    parser.add_argument("--ckpt", type=Path, default=Path("runs"), help="a checkpoint, its folder, or a folder of runs")
    parser.add_argument("--num", type=int, default=2048, help="samples, or at most so many held-out images")
    parser.add_argument("--batch-size", type=int, default=128, help="images at a time")
    parser.add_argument("--archive", type=Path, help="where the data set lies, if not where the run found it")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "cadd_min", help="for the classifier")
    parser.add_argument("--inception-weights", help="file, if torch-fidelity cannot download them")
    parser.add_argument("--guidance", type=float, help="of a model of classes (default: 1, its own)")
    parser.add_argument("--T", type=int, help="steps of the bound; without, continuous time")
    parser.add_argument("--repeat", type=int, default=4, help="times that the bound draws for each image")
    generate.add_sampling_options(parser)
    return parser


def labels_of(model: Denoiser, labels: np.ndarray | None, rows: slice) -> torch.Tensor | None:
    """The labels of these images, where the model knows classes."""
    if not model.config.classes or labels is None:
        return None
    return torch.from_numpy(labels[rows]).to(model.embedding.weight.device)


def draw(model: Denoiser, pixels: Pixels, args: argparse.Namespace) -> np.ndarray:
    """(num, H, W, C) samples; of a model of classes as many of each."""
    parts = []
    for index, first in enumerate(tqdm(range(0, args.num, args.batch_size), desc="sampling", unit="batch")):
        count, denoiser = min(args.batch_size, args.num - first), None
        if model.config.classes:
            label = (first + torch.arange(count, device=model.embedding.weight.device)) % model.config.classes
            denoiser = Guided(model, label, 1.0 if args.guidance is None else args.guidance)
        parts.append(pixels.decode(generate.samples(model, args, count, index=index, denoiser=denoiser)))
    return np.concatenate(parts)


def frechet(samples: np.ndarray, data: images.Images, args: argparse.Namespace) -> dict[str, Any]:
    """The measures of judge.py, and what as many held-out images have."""
    net, accuracy = judge.open_judge(data, args.cache)
    real, _ = judge.judged(net, data.train)
    rows: dict[str, Any] = {"classifier's held-out accuracy": accuracy}
    for whose, some in (("", samples), ("held-out images' ", data.held_out[: args.num])):
        rows |= {whose + NAMES[key]: value for key, value in judge.measures(net, real, some).items()}
    return rows


def bound(model: Denoiser, pixels: Pixels, data: images.Images, args: argparse.Namespace) -> dict[str, Any]:
    """Bits per dimension of held-out images, with the standard error over images."""
    device, held_out = model.embedding.weight.device, data.held_out[: args.num]
    found = []
    for repeat in range(args.repeat):
        for first in range(0, len(held_out), args.batch_size):
            rows = slice(first, min(first + args.batch_size, len(held_out)))
            label = labels_of(model, data.labels[1] if data.labels else None, rows)
            x_0, gen = (
                pixels.encode(held_out[rows]).to(device),
                seeded(args.seed, repeat * len(held_out) + first, device),
            )
            denoiser = model if label is None else Guided(model, label)
            with torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != "float32"):
                parts = nelbo_parts(
                    denoiser, x_0, model.table(), model.schedule, model.mask_id, steps=args.T, generator=gen
                )
            found.append(torch.stack([*parts], -1).double() / (math.log(2) * pixels.length))
    each = torch.cat(found)
    whole = each.sum(-1)
    return {
        "bound, bits per dimension": float(whole.mean()),
        "standard error": float(whole.std() / math.sqrt(len(whole))),
        "of it tokens": float(each[:, 0].mean()),
        "of it latents": float(each[:, 1].mean()),
        "images": len(held_out),
        "times for each": args.repeat,
    }


def main() -> None:
    args = build_parser().parse_args()
    for name in ("num", "batch_size", "repeat"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.what != "bound" and args.num < 10:
        raise InputError(f"--num must be at least 10 to compare samples with images, not {args.num}")
    device = torch_device(args.device)
    model, pixels, content = checkpoint.load_denoiser(args.ckpt, device)
    if not isinstance(pixels, Pixels):
        raise InputError(f"--ckpt {args.ckpt} is a model of text: evaluate.py knows images so far")
    if args.guidance is not None and not model.config.classes:
        raise InputError(f"--guidance needs a model of classes, and --ckpt {args.ckpt} was trained without labels")
    args.zhat, args.dtype = args.zhat or "soft", generate.dtype_of(args.dtype, content)
    settings = content["settings"]
    archive = args.archive or (Path(settings["archive"]) if settings.get("archive") else None)
    data = images.open_images(settings["dataset"], args.cache, archive)
    if args.what == "bound":
        rows, how = bound(model, pixels, data, args), f"T {args.T or 'continuous'}, {args.dtype}, seed {args.seed}"
    else:
        samples, how = draw(model, pixels, args), f"{args.num} samples, {generate.settings(args)}"
        if args.what == "fid":
            rows = inception_metrics(samples, data.train, device, args.inception_weights)
        else:
            rows = frechet(samples, data, args)
    for name, value in rows.items():
        print(f"{name:55} {value:.4f}" if isinstance(value, float) else f"{name:55} {value}")
    print(f"model {model.config.model} at step {content['trainer']['step']} ({checkpoint.find(args.ckpt)}), {how}")


if __name__ == "__main__":
    run(main)
