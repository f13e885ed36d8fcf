"""What evaluate.py measures of models of images: the bound, and samples against real images."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cadd_min.checkpoints.file import check_data
from cadd_min.data import images
from cadd_min.data.images import Images
from cadd_min.data.pixels import Pixels
from cadd_min.evaluation import image_judge
from cadd_min.evaluation.bound import Models, held_out_bound, report, summary
from cadd_min.evaluation.fid import check_inception, inception_metrics
from cadd_min.model import Guided, Model
from cadd_min.objective import Batch
from cadd_min.sampling import generate
from cadd_min.utils.errors import InputError

Rows = dict[str, Any]
NAMES = {
    "FD": "Fréchet distance (classifier's features, not FID)",
    "variety": "class entropy of all, nats",
    "doubt": "class entropy of each, nats",
    "precision": "precision",
    "recall": "recall",
}


def bound(models: Models, args: argparse.Namespace) -> str:
    """Report the bound of held-out images under each model, in bits per dimension."""
    settings = f"T {args.T or 'continuous'}, {args.dtype}, seed {args.seed}"
    return _reports(models, args, bound_rows, lambda model: settings)


def frechet(models: Models, args: argparse.Namespace) -> str:
    """Report samples of each model against real images, in the features of a small classifier."""
    return _reports(models, args, frechet_rows, lambda model: _drawn(model, args))


def fid(models: Models, args: argparse.Namespace) -> str:
    """Report FID, Inception Score, precision and recall of each model, by torch-fidelity."""
    check_inception(args.inception_weights)
    return _reports(models, args, fid_rows, lambda model: _drawn(model, args))


def bound_rows(model: Model, pixels: Pixels, data: Images, args: argparse.Namespace) -> Rows:
    """Measure the bound in bits per dimension."""
    rows_of = images.chosen(len(data.held_out), args.num)
    held_out = data.held_out[rows_of]

    def batches() -> Iterator[Batch]:
        """Yield the held-out images, with their labels where the model has classes."""
        for first in range(0, len(held_out), args.batch_size):
            rows = slice(first, first + args.batch_size)
            label = None
            if model.config.classes and data.labels is not None:
                label = torch.from_numpy(data.labels[1][rows_of][rows])
            yield Batch(pixels.encode(held_out[rows]), label)

    nats = held_out_bound(model, batches(), steps=args.T, repeat=args.repeat, seed=args.seed, dtype=args.dtype)
    found = summary(nats, math.log(2) * pixels.length)
    found["bound, bits per dimension"] = found.pop("bound")
    return {"images": len(held_out), "draws for each": args.repeat, **found}


def frechet_rows(model: Model, pixels: Pixels, data: Images, args: argparse.Namespace) -> Rows:
    """Measure samples as image_judge.py says, and as many held-out images by the same code."""
    net, accuracy = image_judge.open_judge(data, args.cache)
    real, _ = image_judge.judged(net, data.train)
    samples = draw(model, pixels, args)
    rows: Rows = {"classifier's held-out accuracy": accuracy}
    compared = {"": samples}
    if len(data.held_out) >= args.num:  # measures of unlike numbers of images cannot be compared
        compared["held-out images' "] = data.held_out[images.chosen(len(data.held_out), args.num)]
    else:
        rows["held-out images"] = f"left out: there are {len(data.held_out)}, fewer than --num {args.num}"
    for whose, some in compared.items():
        rows |= {whose + NAMES[key]: value for key, value in image_judge.measures(net, real, some).items()}
    return rows


def fid_rows(model: Model, pixels: Pixels, data: Images, args: argparse.Namespace) -> Rows:
    """Measure samples by torch-fidelity."""
    return inception_metrics(draw(model, pixels, args), data.train, model.device, args.inception_weights)


def draw(model: Model, pixels: Pixels, args: argparse.Namespace) -> np.ndarray:
    """Draw samples (num, H, W, C). A model of classes draws as many of each class."""

    def guided(first: int, count: int) -> Any:
        """Make the denoiser of samples first to first + count - 1, whose classes take turns."""
        label = (first + torch.arange(count, device=model.device)) % model.config.classes
        return Guided(model, label, 1.0 if args.guidance is None else args.guidance)

    settings, denoiser = generate.sampling(args), guided if model.config.classes else None
    x = generate.many(
        model, settings, args.num, seed=args.seed, dtype=args.dtype, batch_size=args.batch_size, denoiser=denoiser
    )
    return pixels.decode(x)


def _drawn(model: Model, args: argparse.Namespace) -> str:
    return f"{args.num} samples, {generate.describe(args, [model.config.model])}"


def _reports(
    models: Models,
    args: argparse.Namespace,
    measure: Callable[[Model, Pixels, Images, argparse.Namespace], Rows],
    caption: Callable[[Model], str],
) -> str:
    """Open each model's data, measure, and report."""
    reports, opened = [], {}
    for path, (model, pixels, content) in models.items():  # all, before the first is measured
        if getattr(args, "guidance", None) is not None and not model.config.classes:
            raise InputError(f"--guidance needs a model of classes, and --ckpt {path} was trained without labels")
        opened[path] = open_data(path, model, pixels, content, args)
        if args.what == "frechet" and opened[path].labels is None:
            raise InputError(f"{opened[path].name} has no labels to train a judge on")
    for path, (model, pixels, content) in models.items():
        rows = measure(model, pixels, opened[path], args)
        name = f"model {model.config.model} at step {content['trainer']['step']} ({path})"
        reports.append(report(rows, f"{name}, {caption(model)}"))
    return "\n\n".join(reports)


def open_data(path: Path, model: Model, pixels: Pixels, content: dict[str, Any], args: argparse.Namespace) -> Images:
    """Open the data set that a checkpoint was trained on. Raises InputError where it has changed."""
    settings = content["settings"]
    if not settings.get("dataset"):
        raise InputError(f"--ckpt {path} does not say which images it was trained on")
    archive = args.archive or (Path(settings["archive"]) if settings.get("archive") else None)
    data = images.open_images(settings["dataset"], args.cache, archive)
    if data.pixels() != pixels or 0 < model.config.classes < data.classes():
        raise InputError(f"--ckpt {path} was trained on other images than {settings['dataset']} now has")
    check_data(content, data.digest(), f"the data set {settings['dataset']}", args.anyway)
    return data
