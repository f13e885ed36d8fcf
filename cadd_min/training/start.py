"""What the training scripts share: read the settings, make the run's folder, start or resume the training."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cadd_min import ops
from cadd_min.checkpoints import file as checkpoint
from cadd_min.checkpoints.load import blaming, model_config
from cadd_min.data.codec import Codec
from cadd_min.model import Model, ModelConfig
from cadd_min.objective import Batch
from cadd_min.training import log
from cadd_min.training.distributed import World, check_shard, world
from cadd_min.training.loop import FitConfig, Run, fit
from cadd_min.training.trainer import TrainConfig, Trainer, check_settings
from cadd_min.utils.cli import Parser, add_options, as_path, from_args, set_defaults
from cadd_min.utils.device import default_device, launched, seed_torch, torch_device
from cadd_min.utils.errors import InputError, choose
from cadd_min.utils.files import cache_folder, remove_leftovers

RUNS = Path("runs")
LATENT = (
    "continuous",
    "latent_dim",
    "latent_norm",
    "evidence",
    "latent_table",
    "fusion",
    "hint",
    "bayes_head",
    "mse",
    "wrong_hints",
    "drop_latent",
)
UNHEEDED = {  # options without effect on a model
    "mdlm": LATENT,
    "cdm": ("discrete",),
    "ar": (*LATENT, "discrete", "weighting"),
    "udm": (*LATENT, "weighting"),
    "sedd": (*LATENT, "weighting"),
}


class Source(NamedTuple):
    """What a run is trained on: in words, as a hash of its content, and the names of its classes by their numbers."""

    words: str
    digest: str
    class_names: tuple[str, ...] = ()


def build_parser(description: str | None, model: type = ModelConfig) -> argparse.ArgumentParser:
    """Make a parser with the options that all training scripts share.

    model: the dataclass whose options describe the model.
    """
    parser = Parser(description)
    parser.add_argument("--out", type=as_path, help="folder of the run (default: a new one in runs/)")
    parser.add_argument("--resume", action="store_true", help="go on with --out, or with the newest run")
    parser.add_argument("--anyway", action="store_true", help="with --resume: on data that is not the run's, too")
    parser.add_argument("--cache", type=as_path, default=cache_folder(), help="folder of prepared data")
    parser.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1, ...")
    for config, title in ((model, "model"), (TrainConfig, "training"), (FitConfig, "logging")):
        add_options(parser, config, title)
    return parser


def parse_args(parser: argparse.ArgumentParser, script: str) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Read the settings from the command line. Returns them and the checkpoint to resume from, or None.

    With --resume the checkpoint's settings are the defaults, and the command line may change them. Raises InputError
    for a checkpoint of another script than `script`.
    """
    parser.set_defaults(script=script)
    args = parser.parse_args()
    ops.backend()  # an unknown CADD_BACKEND ends here, before the data is read
    if not args.resume:
        check(args)
        args.unheeded = unheeded(args, parser)
        return args, None
    where = checkpoint.find(args.out or RUNS)
    content = checkpoint.load(where)
    checkpoint.check_outline(content, where)
    trained_by = checkpoint.trained_by(content)
    if trained_by != script:
        raise InputError(f"--resume: {where} was trained by {trained_by}: resume it with that")
    set_defaults(parser, content.get("settings"), str(where))
    parser.set_defaults(out=where.parent)
    args = parser.parse_args()
    check(args)
    return args, content


def check(args: argparse.Namespace) -> None:
    """Raise InputError for settings that are wrong whatever the data and the model are.

    Tokenising and opening a model can take an hour, so this comes before.
    """
    if args.anyway and not args.resume:
        raise InputError("--anyway goes with --resume: a new run has no data yet")
    device = torch_device(args.device)
    from_args(FitConfig, args)
    check_settings(from_args(TrainConfig, args), args.model, int(os.environ["WORLD_SIZE"]) if launched() else 1)
    if args.shard:
        check_shard(device)
    if args.out and not args.resume:
        check_free(args.out)


def check_free(out: Path) -> None:
    """Raise InputError where a new run cannot be in the folder `out`: it holds a run, or is a file."""
    if out.is_file():
        raise InputError(f"--out must be a folder, and {out} is a file")
    if checkpoint.holds_run(out):
        raise InputError(f"--out {out} holds a run already: --resume it, or name another folder")


def unheeded(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """List the options, given on the command line, that have no effect on this model: a table would compare equals."""
    names = [*UNHEEDED.get(args.model, ())]
    names += ["drop_label"] * (not getattr(args, "classes", False)) + ["evidence"] * (args.latent_norm > 0)
    given = [name for name in dict.fromkeys(names) if getattr(args, name, None) != parser.get_default(name)]
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def network(args: argparse.Namespace, presets: dict[str, Any], resumed: dict[str, Any] | None) -> dict[str, Any]:
    """Return the size that --preset names, as a field of ModelConfig.

    A resumed run keeps its own size, head and neighbours, which may have no name or option today. Raises InputError.
    """
    if resumed and all(getattr(args, name, None) == resumed["settings"].get(name) for name in ("preset", "backbone")):
        where = checkpoint.find(args.out or RUNS)
        with blaming(where):
            own = model_config(resumed, where)
        return {"size": own.size, "head_bias": own.head_bias, "neighbours": own.neighbours}
    return {"size": presets[choose("--preset", args.preset, presets)]}


def new_folder(args: argparse.Namespace) -> Path:
    """Make the folder of a new run: --out, or the next free name in runs/.

    The folder is made at once, so that no other run takes the same name. Raises InputError where --out holds a run, is
    a file, or cannot be made.
    """
    name = f"{Path(args.dataset).stem}-{args.model}"
    folders = [args.out] if args.out else [RUNS / (name + (f"-{n}" if n > 1 else "")) for n in range(1, 1000)]
    for folder in folders:
        if args.out:
            check_free(folder)
        try:
            folder.mkdir(parents=True, exist_ok=args.out is not None)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"--out {folder} cannot be made: {error.strerror}") from None
        return folder
    raise InputError(f"--out: {folders[0]} and the next {len(folders)} names are taken; give one")


def train(
    args: argparse.Namespace,
    resumed: dict[str, Any] | None,
    make: Callable[[], Model],
    data: Callable[[int], Batch],
    held_out: Sequence[Batch],
    codec: Codec,
    show_sample: Callable[[Trainer, Path | None], str],
    source: Source,
) -> None:
    """Train a model with these settings, from the start or from the checkpoint `resumed`.

    Args: make() -> the model; data(index) -> micro-batch `index`; codec: the tokenizer or the pixels, whose spec() goes
    into the checkpoint; show_sample(trainer, folder) -> a line about a sample, which is written where a folder is
    given; source: what the data is. Raises InputError where the data is not what the checkpoint was trained on.
    """
    if resumed and codec.spec() != resumed["tokenizer"]:
        raise InputError(
            f"--dataset {args.dataset} has other tokens than the run had: resume on the same data, or anew"
        )
    if resumed:
        checkpoint.check_data(resumed, source.digest, f"--dataset {args.dataset}", args.anyway)
    train_config, fit_config = from_args(TrainConfig, args), from_args(FitConfig, args)
    with world(args.device) as processes:
        seed_torch(args.seed)
        with torch.device("cpu" if processes.first or not args.shard else "meta"):  # `shared` fills the shape
            model = make()
        trainer = Trainer(model if args.shard else model.to(processes.device), data, train_config, processes)
        out = args.out or RUNS
        if processes.first and not resumed:
            out = new_folder(args)
        if resumed:
            restore(trainer, resumed, out)
        contents = _contents(args, trainer, codec) | {"data": source.digest, "class_names": source.class_names}
        if processes.first:
            _announce(args, trainer, processes, out, source.words, contents)
        fit(trainer, Run(out, list(held_out), show_sample, contents), fit_config)
        if processes.first:
            print(f"trained: {out / checkpoint.FILE}; now: python sample.py --ckpt {out}")


def _contents(args: argparse.Namespace, trainer: Trainer, codec: Codec) -> dict[str, Any]:
    """Return what the run's checkpoints hold beside the trainer's state, as plain values."""
    kept = vars(args).keys() - {"out", "resume", "anyway", "unheeded"}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k in kept}
    # the values that "auto" and 0 stand for: a resumed run keeps its dtype, and its steps stay as large
    settings |= {"dtype": trainer.dtype, "accumulate": trainer.accumulate}
    shape = checkpoint.model_dict(trainer.model.config)
    return {"settings": settings, "model_config": shape, "tokenizer": codec.spec()}


def restore(trainer: Trainer, content: dict[str, Any], where: Path) -> None:
    """Give a trainer the state of a checkpoint.

    Raises InputError that names the file `where` for a state that does not fit or is damaged.
    """
    with blaming(where):
        state = content["trainer"]
        checkpoint.check_state(trainer.model, state["model"], where)
        trainer.load_state_dict(state)


def _announce(
    args: argparse.Namespace, trainer: Trainer, processes: World, out: Path, what: str, contents: dict[str, Any]
) -> None:
    """Print what is trained, write it to run.json, and remove the files that a killed run left half written."""
    remove_leftovers(out)
    where = str(processes.device) + (f" in {processes.size} processes" if processes.size > 1 else "")
    print(
        f"{args.model} {getattr(args, 'preset', '')}, {trainer.parameters():,} parameters, {trainer.dtype} on {where}, "
        f"backend {ops.backend().name}, {what}, run in {out}"
    )
    if getattr(args, "unheeded", ""):
        print(f"note: {args.unheeded} without effect on {args.model} with these settings", file=sys.stderr)
    start = {"step": trainer.step, "processes": processes.size, "device": str(processes.device)}
    start["backend"] = " ".join(ops.backend())
    try:
        log.record(out, {key: contents[key] for key in ("settings", "model_config")} | {"data": what}, start)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written to: {error.strerror}") from None
