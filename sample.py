"""Draw samples, of text or of images, from a trained model.

python sample.py                                       the newest run
python sample.py --zhat soft --steps 256 --num 4       mode covering, more steps, four samples
python sample.py --watch                               show the denoising in the terminal
python sample.py --prompt "The[8] of the union[16]"    text: the prompt stays, [n] is a gap of n tokens
python sample.py --prompt "53..7....6..195..."         a model of sudoku: the puzzle from its first cells on
python sample.py --from owner/name --prompt "Once"     text: an untuned masked language model of the hub
python sample.py --html chain.html --zhat hard soft    a page that replays the chain, in any browser
python sample.py --gif path.gif                        the path from noise, animated
python sample.py --classes 3 8 --guidance 2            images: of classes 3 and 8, exaggerated
python sample.py --inpaint digit.png --mask hole.png   images: repaint where the mask is white
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cadd_min.baselines.dispatch import steps_of
from cadd_min.checkpoints.load import open_model
from cadd_min.data.codec import Codec
from cadd_min.data.pixels import Pixels
from cadd_min.model import Model
from cadd_min.sampler import Sampling
from cadd_min.sampling import generate, page
from cadd_min.sampling.generate import CKPT, add_run_options, add_sampling_options, add_source_options
from cadd_min.sampling.images import ImageTask
from cadd_min.sampling.text import TextTask
from cadd_min.utils.cli import Parser, as_path, integer, run
from cadd_min.utils.device import torch_device
from cadd_min.utils.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", type=as_path, default=Path("runs"), help=CKPT)
    add_sampling_options(parser, zhats=True)
    add_run_options(parser)
    parser.add_argument("--num", type=integer, help="number of samples (default: 1, images: 64)")
    parser.add_argument("--watch", action="store_true", help="show the first sample's denoising in the terminal")
    parser.add_argument("--gif", type=as_path, help="an animated picture of it: of the first text, of all images")
    parser.add_argument("--html", type=as_path, help="a page that replays it; --zhat may then have several values")
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", help='text with gaps, "The[8] of the union[16]"')
    add_source_options(text)
    image = parser.add_argument_group("images")
    image.add_argument("--out", type=as_path, help="the grid of samples (default: samples.png)")
    image.add_argument("--classes", type=integer, nargs="+", help="classes to draw, in turn (default: all)")
    image.add_argument("--guidance", type=float, help="0 ignores the class, 1 is the model's own, more exaggerates")
    image.add_argument("--inpaint", type=as_path, help="an image of the model's size to repaint")
    image.add_argument("--mask", type=as_path, help="an image of the same size, white where to repaint")
    return parser


def check_values(args: argparse.Namespace) -> None:
    """Raise InputError for options that no model can have, before a model is opened."""
    if args.num is not None and args.num < 1:
        raise InputError(f"--num must be at least 1, not {args.num}")
    zhats = args.zhat or []
    if len(zhats) > 1 and (args.html is None or args.gif or args.watch or len(set(zhats)) < len(zhats)):
        raise InputError("--zhat takes several (different) estimates only with --html, without --gif and --watch")
    for zhat in zhats or ["hard"]:
        settings_of(args, zhat)


def settings_of(args: argparse.Namespace, zhat: str) -> Sampling:
    """Make the sampler's settings with one of the estimates of z_0. Raises InputError for an option out of range."""
    return generate.sampling(argparse.Namespace(**vars(args) | {"zhat": zhat}))


def main() -> None:
    args = build_parser().parse_args()
    check_values(args)
    device = torch_device(args.device)
    model, codec, content, where = open_model(args.ckpt, device, args.source, args.length, args.mask_token)
    if isinstance(codec, Pixels):
        task: ImageTask | TextTask = ImageTask(model, codec, args, content.get("class_names") or ())
    else:
        task = TextTask(model, codec, args, content["settings"].get("dataset"))
    notes = generate.unheeded(args, [model])
    zhats, args.num = args.zhat or [task.zhat], task.num if args.num is None else args.num
    args.dtype = generate.dtype_of(args.dtype, content)
    recorders = draw(model, codec, task, args, zhats)
    for note in notes:
        print(note, file=sys.stderr)
    args.zhat = ", ".join(zhats)
    line = (
        f"model {model.config.model} at step {content['trainer']['step']} ({where}), "
        f"{generate.describe(args, [model.config.model])}{task.settings()}"
    )
    print(line)
    if args.html:
        page.write(args.html, f"{where.parent.name}: {model.config.model}, step by step", line, recorders)
        print(f"the chain, step by step, in {args.html}")


def draw(
    model: Model, codec: Codec, task: ImageTask | TextTask, args: argparse.Namespace, zhats: list[str]
) -> list[page.Recorder]:
    """Draw and show the samples by each estimate of z_0, with the same noise. Returns what --html shows of each."""
    prompt, recorders = task.prompt(args.num), []
    each = [settings_of(args, zhat) for zhat in zhats]
    for settings in each:
        if args.html:
            page.check(args.html, model, settings, args.num, len(zhats))
            recorders.append(page.Recorder(model, codec, args.num, prompt, settings, len(zhats)))
        x = generate.samples(
            model,
            settings,
            args.num,
            seed=args.seed,
            dtype=args.dtype,
            denoiser=task.denoiser(args.num),
            prompt=prompt,
            callback=generate.together(task.callback(steps_of(model, settings)), *recorders[-1:]),
        )
        task.show(x, settings.zhat if len(zhats) > 1 else "")
    return recorders


if __name__ == "__main__":
    run(main)
