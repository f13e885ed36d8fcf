"""The sampler as the scripts call it: its options, a call with them, a line that records them, and a live view."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cadd_min import ops
from cadd_min.baselines import dispatch
from cadd_min.model import Model
from cadd_min.orders import HITTING, Sampling, cosine_temperature
from cadd_min.sampler import Step
from cadd_min.utils.cli import add_options, expanded, from_args, integer
from cadd_min.utils.device import DTYPES, autocast, default_device, seeded
from cadd_min.utils.errors import InputError, choose

CKPT = "a checkpoint, its folder, a folder of runs, a folder for others, or hf:owner/name of the hub"
HOME = "\x1b[H\x1b[2J"  # to a terminal's first line, and clear the screen


def add_sampling_options(parser: argparse.ArgumentParser, zhats: bool = False) -> None:
    """Add all sampling options. `add_run_options` adds those of the noise and the device.

    zhats: let --zhat take several estimates, as a list.
    """
    group = add_options(parser, Sampling, "sampling")
    if zhats:
        next(action for action in parser._actions if action.dest == "zhat").nargs = "+"
    parser.set_defaults(zhat=None)  # text and images have different defaults
    group.add_argument(
        "--cosine-temperature",
        type=float,
        nargs="?",
        const=2.5,
        metavar="START",
        help="let the temperature fall from START to --temperature along a cosine (the paper's for images: 2.5)",
    )


def add_run_options(parser: Any) -> None:
    """Add the options of the noise, the dtype and the device."""
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: as the model was trained")
    parser.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1, ...")


def add_source_options(parser: Any) -> None:
    """Add the options of a model that is not a checkpoint, and of its prompts."""
    parser.add_argument(
        "--from", dest="source", type=expanded, help="instead of --ckpt: a model of the Hugging Face hub, or its folder"
    )
    parser.add_argument(
        "--length", type=integer, help="with --from: tokens in a sample (default: as the model was tuned, or 256)"
    )
    parser.add_argument("--mask-token", help="with --from: the mask's text, if the model does not name it")
    parser.add_argument("--chat", action="store_true", help="prompts go through the tokenizer's chat template")


def dtype_of(asked: str, content: dict[str, Any]) -> str:
    """Return the dtype that is asked for. "auto" is the dtype in which the checkpoint was trained.

    Raises InputError for an unknown dtype.
    """
    dtype = content["settings"].get("dtype", "float32") if asked == "auto" else asked
    return choose("the dtype of the checkpoint", dtype, DTYPES)


def check_seed(args: argparse.Namespace) -> None:
    """Raise InputError for a --seed that torch's generators do not accept."""
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must be from 0 to 2^63 - 1, not {args.seed}")


def unheeded(args: argparse.Namespace, models: Collection[Model]) -> list[str]:
    """Write a note for each kind of model on which sampling options, given on the command line, have no effect."""
    defaults = vars(Sampling())
    given = {n for n, value in defaults.items() if getattr(args, n) not in (None, value, [value])}
    notes = []
    for kind, model in {model.config.model: model for model in models}.items():
        names = {"zhat", "num_latents", "strength"} if model.table().shape[1] == 0 else set()
        names |= {"steps"} if kind == "ar" or args.time_grid == HITTING else set()
        if names & given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names & given))
            notes.append(f"note: {options} without effect on {kind}")
    return notes


def sampling(args: argparse.Namespace) -> Sampling:
    """Make the sampler's settings from the options, and check the seed. A cosine temperature is a function of t.

    Raises InputError for an option out of range.
    """
    check_seed(args)
    options = from_args(Sampling, args)
    if args.cosine_temperature is not None:
        falling = cosine_temperature(args.cosine_temperature, args.temperature)
        options = dataclasses.replace(options, temperature=falling)
    for t in (0.0, 1.0):  # a cosine lies between its ends, so checking these is enough
        options.temperature_at(t)
    return options


def samples(
    model: Model,
    settings: Sampling,
    count: int,
    *,
    seed: int,
    dtype: str,
    index: int = 0,
    denoiser: Any = None,
    prompt: Tensor | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Tensor:
    """Draw one batch of tokens (count, L) int64.

    Args: settings: the sampler's settings; seed and index, the batch's number, name the noise; dtype: "float32" or
    "bfloat16"; denoiser, prompt, callback: see `dispatch.draw`.
    """
    with autocast(model.device, dtype):
        return dispatch.draw(
            model,
            count,
            settings,
            denoiser=denoiser,
            prompt=prompt,
            # a generator of the CPU: the same noise on every device
            generator=seeded(seed, index) if index else torch.Generator().manual_seed(seed),
            callback=callback,
        )


def many(
    model: Model,
    settings: Sampling,
    count: int,
    *,
    seed: int,
    dtype: str,
    batch_size: int,
    denoiser: Callable[[int, int], Any] | None = None,
) -> Tensor:
    """Draw tokens (count, L) int64, batch by batch.

    denoiser(first, n): makes the denoiser of the samples first to first + n - 1.
    """
    parts = []
    for index, first in enumerate(tqdm(range(0, count, batch_size), desc="sampling", unit="batch", leave=False)):
        n = min(batch_size, count - first)
        guided = denoiser(first, n) if denoiser else None
        parts.append(samples(model, settings, n, seed=seed, dtype=dtype, index=index, denoiser=guided))
    return torch.cat(parts)


def draw_settings(each: Collection[argparse.Namespace]) -> str:
    """Describe the temperature and the top-p of these options. Where they differ, all values are listed."""
    starts = ["" if args.cosine_temperature is None else f"{args.cosine_temperature} to " for args in each]
    temperatures = dict.fromkeys(f"{start}{args.temperature}" for start, args in zip(starts, each))
    top_ps = dict.fromkeys(str(args.top_p) for args in each)
    listed = {"temperature": temperatures, "top-p": top_ps}
    return ", ".join(f"{name} {', '.join(values)}{' in turn' * (len(values) > 1)}" for name, values in listed.items())


def _steps(args: argparse.Namespace, models: Collection[str]) -> str:
    """Describe the steps of these models' chains. The autoregressive model ("ar") ignores --steps."""
    token_by_token = "a step for each token"
    if args.time_grid == HITTING:
        return f"{token_by_token} ({HITTING})"
    stepped = [f"T {args.steps} ({args.time_grid})"] if set(models) - {"ar"} else []
    return ", but of ar ".join(stepped + [token_by_token] * ("ar" in models))


def describe(
    args: argparse.Namespace, models: Collection[str], each: Collection[argparse.Namespace] | None = None
) -> str:
    """Describe the settings without which samples of these models ("cadd", "ar", ...) cannot be compared with others.

    each: the options of every point of a sweep, or None.
    """
    order = "".join(f", {name} {getattr(args, name)}" for name in ("order", "block", "remask") if getattr(args, name))
    return (
        f"backend {ops.backend().name}, zhat {args.zhat}, {_steps(args, models)}, K {args.num_latents}, "
        f"{draw_settings(each or [args])}, strength {args.strength}{order}, {args.dtype} on {args.device}, "
        f"last step a draw, seed {args.seed}"
    )


def together(*callbacks: Callable[[Step], None] | None) -> Callable[[Step], None] | None:
    """Return one callback that calls all that are not None, or None where there is none."""
    given = [callback for callback in callbacks if callback is not None]

    def call_all(step: Step) -> None:
        for callback in given:
            callback(step)

    return call_all if given else None


class Watch:
    """A sampler callback for --watch: show the first sample after each step, at most 20 steps a second.

    draw(step) -> the sample as text for the terminal, which is cleared before each step.
    """

    def __init__(self, mask_id: int, steps: int, draw: Callable[[Step], str]):
        self.mask_id, self.steps, self.draw = mask_id, steps, draw
        self.clear = HOME if sys.stdout.isatty() else "\n"

    def __call__(self, step: Step) -> None:
        masked = int((step.x[0] == self.mask_id).sum())
        print(f"{self.clear}step {step.number + 1}/{self.steps}  t = {step.s:.3f}  {masked} masked\n")
        print(self.draw(step), flush=True)
        time.sleep(1 / 20)
