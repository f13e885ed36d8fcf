"""Train CADD, the masked model (mdlm) or the continuous model (cdm) on images.

    python train_image.py                                  8x8 digits, on a laptop, in under three minutes
    python train_image.py --model mdlm                     the masked model; cdm is the continuous one
    python train_image.py --dataset photos/ --classes      your images, conditioned on the class: their folder
    python train_image.py --dataset cifar10 --preset cifar10 --batch-size 128 --steps 500000 --lr 2e-4 --ema 0.9999
    python train_image.py --resume                         continue the newest run

A pixel's value is a token. Models, loss and trainer are those for text, with a U-Net as the network. Writes
checkpoint.pt (everything), metrics.jsonl, loss.png, forward.png and grids of samples into a new folder in runs/, or
into --out.
"""

from __future__ import annotations

import argparse

from cadd_min.data import image_files, images
from cadd_min.data.batches import ImageBatches
from cadd_min.dit import PATCH_PRESETS
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.sampling.pictures import preview
from cadd_min.training import start
from cadd_min.unet import UNET_PRESETS
from cadd_min.utils.cli import as_path, expanded, from_args, run
from cadd_min.utils.device import default_device
from cadd_min.utils.errors import InputError, choose

PRESETS = {"unet": UNET_PRESETS, "dit": PATCH_PRESETS}
SIZE_NAMES = "; ".join(f"{', '.join(sizes)} of the {name}" for name, sizes in PRESETS.items())
HELD_OUT = 2**25  # probabilities (B, L, V) in each of the four evaluation batches: the bound has all in memory
DEFAULTS = {
    "steps": 1800,
    "batch_size": 64,
    "discrete": "cosine",
    "continuous": "linear",
    "latent_table": "ordered",
    "latent_dim": 4,
    "evidence": 0.35,
    "eval_every": 600,
    "sample_every": 600,
}


def build_parser() -> argparse.ArgumentParser:
    parser = start.build_parser(__doc__)
    names = f"{', '.join(images.NAMES)}, an .npz, or a folder"
    parser.add_argument("--dataset", type=expanded, default="digits", help=names)
    parser.add_argument(
        "--archive", type=as_path, help="local file or folder of a named data set, instead of a download"
    )
    parser.add_argument("--backbone", default="unet", help=f"{', '.join(PRESETS)}")
    parser.add_argument("--preset", default="tiny", help=f"size of the network: {SIZE_NAMES}")
    parser.add_argument("--classes", action="store_true", help="condition on the labels")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the images")
    # on a CPU, a convolution of few channels is no faster in bfloat16
    parser.set_defaults(**DEFAULTS, dtype="auto" if default_device() == "cuda" else "float32")
    return parser


def main() -> None:
    args, resumed = start.parse_args(build_parser(), "train_image.py")
    shape = start.network(args, PRESETS[choose("--backbone", args.backbone, PRESETS)], resumed)
    image_files.pillow()  # fail now where it is missing, not at the first picture
    data = images.open_images(args.dataset, args.cache, args.archive)
    if args.classes and data.labels is None:
        raise InputError(f"--classes needs labels, and --dataset {args.dataset} has none")
    pixels, (labels, held_out_labels) = data.pixels(), (data.labels if args.classes else None) or (None, None)
    classes = data.classes() if args.classes else 0
    config = from_args(
        ModelConfig,
        args,
        vocab_size=pixels.levels,
        length=pixels.length,
        image=pixels.shape,
        classes=classes,
        **shape,
    )
    flip = data.flip if args.flip is None else args.flip
    batches = ImageBatches(data.train, labels, pixels, args.batch_size, args.seed, flip)
    eval_batch_size = min(64, len(data.held_out), max(1, HELD_OUT // (pixels.length * pixels.levels)))
    order = images.chosen(len(data.held_out), len(data.held_out))  # a folder's images are in the order of its classes
    held_out_labels = None if held_out_labels is None else held_out_labels[order]
    held_out = ImageBatches(data.held_out[order], held_out_labels, pixels, eval_batch_size)
    first = pixels.encode(data.train[:1])
    start.train(
        args,
        resumed,
        lambda: Denoiser(config),
        batches,
        [held_out(i) for i in range(4)],
        pixels,
        lambda trainer, out: trainer.averaged(preview, pixels, first.to(trainer.device), out, trainer.step),
        start.Source(
            f"{len(data.train):,} images of {'x'.join(map(str, pixels.shape))} in {pixels.levels} levels",
            data.digest(),
            data.class_names,
        ),
    )


if __name__ == "__main__":
    run(main)
