"""Give a model to others: write it as a folder that carries no code, or as weights that another project reads.

python export.py folder runs my-model                    the newest run, its averaged weights; or name one
python export.py from-mdlm mdlm.safetensors my-mdlm      the public MDLM's weights, as such a folder
python export.py to-mdlm runs back.safetensors --time 0.5    a masked model trained here, in MDLM's layout

A model that finetune.py made from a Hugging Face model becomes a folder in that library's own format, with LoRA merged.
The library opens the folder as the masked model without its latent. All other models become safetensors and JSON
(cadd_min/checkpoints/folder.py). sample.py --ckpt, evaluate.py --ckpt and finetune.py --from take both kinds of folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cadd_min.checkpoints import mdlm
from cadd_min.checkpoints.folder import save_pretrained, write_weights
from cadd_min.checkpoints.load import load_denoiser
from cadd_min.data.hf_tokenizer import HFTokenizer
from cadd_min.data.tokenizer import GPT2_SIZE, gpt2
from cadd_min.model import Denoiser
from cadd_min.upgrade import folder as upgraded
from cadd_min.upgrade.wrapper import Upgraded
from cadd_min.utils.cli import Parser, as_path, integer, run
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import new_or_empty


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    folder = commands.add_parser("folder", help="a model as a folder", description="Write a model as a folder.")
    folder.add_argument("source", type=as_path, help="a checkpoint, its folder, or a folder of runs")
    folder.add_argument("target", type=as_path, help="a new folder")
    what = "Write the public MDLM's weights, of GPT-2's tokens, as a folder of this project."
    ours = commands.add_parser("from-mdlm", help="MDLM's weights as a folder", description=what)
    ours.add_argument("source", type=as_path, help="MDLM's weights, or the folder that holds them")
    ours.add_argument("target", type=as_path, help="a new folder")
    ours.add_argument(
        "--length", type=integer, default=1024, help="tokens in a sequence, which the weights do not tell"
    )
    what = "Write a masked model's weights as a .safetensors file in the public MDLM's layout."
    theirs = commands.add_parser("to-mdlm", help="a masked model as MDLM's", description=what)
    theirs.add_argument("source", type=as_path, help="what --ckpt of sample.py takes")
    theirs.add_argument("target", type=as_path, help="a new .safetensors file")
    theirs.add_argument("--time", type=float, help="t from 0 to 1 at which to take a model that looks at the time")
    return parser


def export_folder(source: Path, target: Path) -> str:
    """Write the model of `source` to the new folder `target`. Returns what was written, in words."""
    new_or_empty(target)
    model, codec, content = load_denoiser(source)
    step = content["trainer"]["step"]
    if isinstance(model, Upgraded) and isinstance(codec, HFTokenizer):
        upgraded.save(model, codec, target)
    else:
        save_pretrained(model, codec, target, settings=content["settings"], step=step)
    count = sum(p.numel() for p in model.parameters())  # after saving, which adds LoRA's matrices in
    return f"{model.config.model} at step {step}, {count:,} parameters"


def import_mdlm(source: Path, target: Path, length: int) -> str:
    """Write MDLM's weights to the new folder `target` as a model of this project."""
    try:
        model = mdlm.from_mdlm(mdlm.read(source), length)
    except InputError as error:
        raise InputError(f"{source} is not of MDLM's layout: {error}") from None
    if model.config.vocab_size != GPT2_SIZE:
        raise InputError(f"{source} has {model.config.vocab_size} tokens, expected GPT-2's {GPT2_SIZE}")
    save_pretrained(model, gpt2(), target)
    return f"mdlm of length {length}"


def export_mdlm(source: Path, target: Path, time: float | None) -> str:
    """Write a masked model to the new file `target` in MDLM's layout."""
    model, _, _ = load_denoiser(source)
    if not isinstance(model, Denoiser):
        raise InputError(f"{source} is an upgraded model, and only a masked model trained here has MDLM's layout")
    write_weights(mdlm.to_mdlm(model, time), target)
    return "weights in MDLM's layout"


def main() -> None:
    args = build_parser().parse_args()
    if args.command == "folder":
        what = export_folder(args.source, args.target)
    elif args.command == "from-mdlm":
        what = import_mdlm(args.source, args.target, args.length)
    else:
        what = export_mdlm(args.source, args.target, args.time)
    print(f"written: {args.target}, {what}")


if __name__ == "__main__":
    run(main)
