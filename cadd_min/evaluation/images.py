"""What evaluate.py measures of a model of images: its samples against real ones, and the bound of held-out ones."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cadd_min.data import images
from cadd_min.data.pixels import Pixels
from cadd_min.evaluation import image_judge as judge
from cadd_min.evaluation.bound import held_out_bound, report, summary
from cadd_min.evaluation.fid import inception_metrics
from cadd_min.model import Guided, Model
from cadd_min.objective import Batch
from cadd_min.sampling import generate
from cadd_min.utils.errors import InputError

NAMES = {
    "FD": "Fréchet distance (classifier's features, not FID)",
    "variety": "class entropy of all, nats",
    "doubt": "class entropy of each, nats",
    "precision": "precision",
    "recall": "recall",
}


def draw(model: Model, pixels: Pixels, args: argparse.Namespace) -> np.ndarray:
    """(num, H, W, C) samples; of a model of classes as many of each."""

    def guided(first: int, count: int) -> Any:
        label = (first + torch.arange(count, device=model.device)) % model.config.classes
        return Guided(model, label, 1.0 if args.guidance is None else args.guidance)

    how, denoiser = generate.sampling(args), guided if model.config.classes else None
    x = generate.many(
        model, how, args.num, seed=args.seed, dtype=args.dtype, batch_size=args.batch_size, denoiser=denoiser
    )
    return pixels.decode(x)


def frechet(samples: np.ndarray, data: images.Images, args: argparse.Namespace) -> dict[str, Any]:
    """The measures of judge.py, and what as many held-out images have."""
    net, accuracy = judge.open_judge(data, args.cache)
    real, _ = judge.judged(net, data.train)
    rows: dict[str, Any] = {"classifier's held-out accuracy": accuracy}
    for whose, some in (("", samples), ("held-out images' ", data.held_out[: args.num])):
        rows |= {whose + NAMES[key]: value for key, value in judge.measures(net, real, some).items()}
    return rows


def bound(model: Model, pixels: Pixels, data: images.Images, args: argparse.Namespace) -> dict[str, Any]:
    """Bits per dimension of held-out images."""
    held_out = data.held_out[: args.num]

    def batches() -> Iterator[Batch]:
        """Held-out images as tokens, with labels where the model knows classes."""
        for first in range(0, len(held_out), args.batch_size):
            rows = slice(first, first + args.batch_size)
            label = None
            if model.config.classes and data.labels is not None:
                label = torch.from_numpy(data.labels[1][: args.num][rows])
            yield Batch(pixels.encode(held_out[rows]), label)

    nats = held_out_bound(model, batches(), steps=args.T, repeat=args.repeat, seed=args.seed, dtype=args.dtype)
    found = summary(nats, math.log(2) * pixels.length)
    found["bound, bits per dimension"] = found.pop("bound")
    return {"images": len(held_out), "draws for each": args.repeat, **found}


def assess(models: dict[Path, tuple[Model, Any, dict[str, Any]]], args: argparse.Namespace) -> str:
    """What is asked for, of each model."""
    return "\n\n".join(_one(path, *models[path], args) for path in models)


def _one(path: Path, model: Model, pixels: Pixels, content: dict[str, Any], args: argparse.Namespace) -> str:
    if args.guidance is not None and not model.config.classes:
        raise InputError(f"--guidance needs a model of classes, and --ckpt {path} was trained without labels")
    settings = content["settings"]
    if not settings.get("dataset"):
        raise InputError(f"--ckpt {path} does not say which images it was trained on")
    archive = args.archive or (Path(settings["archive"]) if settings.get("archive") else None)
    data = images.open_images(settings["dataset"], args.cache, archive)
    if data.pixels() != pixels or 0 < model.config.classes < data.classes():
        raise InputError(f"--ckpt {path} was trained on other images than {settings['dataset']} now has")
    if args.what == "bound":
        rows, how = bound(model, pixels, data, args), f"T {args.T or 'continuous'}, {args.dtype}, seed {args.seed}"
    else:
        samples, how = draw(model, pixels, args), f"{args.num} samples, {generate.settings(args, [model.config.model])}"
        if args.what == "fid":
            rows = inception_metrics(samples, data.train, model.device, args.inception_weights)
        else:
            rows = frechet(samples, data, args)
    return report(rows, f"model {model.config.model} at step {content['trainer']['step']} ({path}), {how}")
