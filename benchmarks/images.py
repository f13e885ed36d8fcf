"""Compare models of images: train them for equal steps, sample at several T and zhat, and judge the samples.

    python -m benchmarks.images                                     mdlm, cadd and cdm on digits, three seeds
    python -m benchmarks.images --train cadd:latent_dim=4,evidence=0.2 --seeds 1
    python -m benchmarks.images --dataset fashion-mnist --archive /usr/share/datasets/fashion-mnist

A model is mdlm, cadd or cdm. Behind a colon stand settings: any fields of ModelConfig and TrainConfig, and preset=.
Other settings have train_image.py's defaults. Samples are judged in the features of a small classifier
(evaluation/image_judge.py). Each run appends one line of JSON to --out, and --table FILE prints the table of such a
file. The first rows of the table are real images. The columns are means and standard deviations over seeds of

    FD        Fréchet distance to the training images
    variety   entropy of the classes of all samples, nats
    doubt     mean entropy of the class of one sample, nats
    P / R     precision and recall
    copies    share of the samples that are exact copies of training images
    bits      the likelihood bound on held-out images, bits per dimension
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.specs import draw, markdown, parse, pop_fields, read_rows, run_all, spread
from cadd_min.data.batches import ImageBatches
from cadd_min.data.images import Images, chosen, open_images
from cadd_min.evaluation.image_judge import judged, measures, open_judge
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.objective import Batch
from cadd_min.orders import Sampling, cosine_temperature
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.unet import UNET_PRESETS
from cadd_min.utils.cli import as_path, expanded, run
from cadd_min.utils.errors import InputError, choose
from cadd_min.utils.files import cache_folder
from train_image import DEFAULTS

COLUMNS = {"FD": 2, "variety": 2, "doubt": 2, "precision": 2, "recall": 2, "copies": 3}


class Judge:
    """The judge of one data set, with its features of the training images, computed once."""

    def __init__(self, data: Images, cache: Path):
        self.net, _ = open_judge(data, cache)
        self.real, _ = judged(self.net, data.train)
        self.known = {image.tobytes() for image in data.train}

    def score(self, images: np.ndarray) -> dict[str, float]:
        """Score images (N, H, W, C) against the training images."""
        copies = sum(image.tobytes() in self.known for image in images) / len(images)
        return measures(self.net, self.real, images) | {"copies": copies}


def one_run(job: dict[str, Any]) -> dict[str, Any]:
    """Train one model with one seed, sample it at every T and zhat, and judge the samples."""
    torch.set_num_threads(job["threads"])
    seed, options, cache = job["seed"], job["options"], Path(job["cache"])
    data = open_images(job["dataset"], cache, job["archive"])
    judge = Judge(data, cache)
    options = DEFAULTS | {"dtype": "float32", "steps": job["steps"]} | options
    size = UNET_PRESETS[choose("preset", options.pop("preset", "tiny"), UNET_PRESETS)]
    pixels, row = data.pixels(), dict(job)
    torch.manual_seed(seed)
    config = ModelConfig(
        pixels.levels, pixels.length, size, pixels.shape, model=job["model"], **pop_fields(ModelConfig, options)
    )
    train = TrainConfig(**pop_fields(TrainConfig, options) | {"seed": seed})
    batches = ImageBatches(data.train, None, pixels, train.batch_size, seed, data.flip)
    trainer, start = Trainer(Denoiser(config), batches, train), time.time()
    for _ in range(train.steps):
        trainer.train_step()
    row["train_seconds"] = time.time() - start
    held_out = pixels.encode(data.held_out[chosen(len(data.held_out), job["samples"])])
    row["bits"] = trainer.evaluate([*map(Batch, held_out.repeat(4, 1).split(256))])["val_bound"] / math.log(2)
    row["scores"] = {}
    for zhat in job["zhat"] if trainer.ema.latent.dim else ["hard"]:
        for steps in job["T"]:
            x = draw(trainer.ema, trainer.ema, chain(job, steps, zhat), job["samples"], seed)
            row["scores"][f"{zhat} {steps}"] = judge.score(pixels.decode(x))
    return row


def chain(job: dict[str, Any], steps: int, zhat: str) -> Sampling:
    """Return the sampler's settings of a job at T = `steps`."""
    temperature = cosine_temperature(job["hot"]) if job["hot"] else job["temperature"]
    return Sampling(steps, zhat, temperature=temperature, time_grid=job["time_grid"])


def table(rows: list[dict[str, Any]]) -> str:
    """Format the results as Markdown, in the order of the rows."""
    heads, lines = ("model", "zhat", "T", "bits", "FD", "variety", "doubt", "P / R", "copies"), []
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["spec"]].append(row)
    for name, group in groups.items():
        for key in group[0]["scores"]:
            cell = {c: spread([r["scores"][key][c] for r in group], digits) for c, digits in COLUMNS.items()}
            zhat, _, steps = key.partition(" ")
            bits = spread([r["bits"] for r in group], 2) if "bits" in group[0] else ""
            both = f"{cell['precision']} / {cell['recall']}"
            lines.append([name, zhat, steps, bits, cell["FD"], cell["variety"], cell["doubt"], both, cell["copies"]])
    return markdown(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="*", default=["mdlm", "cadd", "cdm"], help="models to train")
    parser.add_argument("--dataset", type=expanded, default="digits", help="as for train_image.py")
    parser.add_argument("--archive", type=as_path, help="where the data set lies, if not to be downloaded")
    parser.add_argument("--cache", type=expanded, default=cache_folder(), help="folder of prepared data")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    parser.add_argument("--steps", type=int, default=DEFAULTS["steps"], help="training steps")
    parser.add_argument("--samples", type=int, default=1024, help="samples for each T and zhat")
    parser.add_argument("--T", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="sampling steps")
    parser.add_argument("--zhat", nargs="+", default=["sample", "soft", "hard"], help="estimates of z_0")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the draws")
    parser.add_argument("--hot", type=float, default=0.0, help="start of a cosine temperature that falls to 1; 0: none")
    parser.add_argument("--time-grid", default="uniform", help="uniform or cosine")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--out", type=as_path, help="append each run as a line of JSON")
    parser.add_argument("--table", type=as_path, help="only print the table of the runs in this file")
    args = parser.parse_args()
    if args.table:
        return print(table(read_rows(args.table)))
    if min(args.seeds, args.samples, *args.T) < 1:
        raise InputError("--seeds, --samples and --T must be at least 1")
    shared = {k: v for k, v in vars(args).items() if k not in ("train", "seeds", "jobs", "out", "table")}
    data = open_images(args.dataset, Path(args.cache), args.archive)
    judge, half = Judge(data, Path(args.cache)), len(data.train) // 2
    real = {f"{len(data.held_out)} held-out images": data.held_out, f"{half} training images": data.train[:half]}
    rows = [{"spec": name, "scores": {"": judge.score(images)}} for name, images in real.items()]
    specs = [(spec, *parse(spec, preset="str")) for spec in args.train]
    jobs = [
        shared | {"spec": spec, "model": model, "options": options, "seed": seed}
        for seed in range(args.seeds)
        for spec, model, options in specs
    ]
    print(table(rows + run_all(one_run, jobs, args.jobs, args.out)))
    print(f"\n{args.samples} samples each: FD, precision and recall of another number of images cannot be compared")


if __name__ == "__main__":
    run(main)
