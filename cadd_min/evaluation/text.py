"""What evaluate.py measures of models of text: the bound, samples beside held-out text, frontiers, and infilling."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cadd_min.data.tokenizer import Tokenizer
from cadd_min.evaluation import text_scores
from cadd_min.evaluation.bound import Models, held_out_bound, report, summary
from cadd_min.evaluation.held_out import cut, padding, written
from cadd_min.evaluation.text_judge import SEPARATOR, SMOLLM2, LanguageJudge, open_judge
from cadd_min.evaluation.text_scores import MAUVE_LEAST, score
from cadd_min.model import Model
from cadd_min.objective import Batch
from cadd_min.orders import Sampling
from cadd_min.sampling import generate
from cadd_min.utils.errors import InputError, described
from cadd_min.utils.plots import pyplot

REAL = "held-out text"
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0)  # of a frontier without --temperatures and --top-ps
COLUMNS = {  # of score(): heading and digits
    "judge_bpc": ("judge, bits/character", 3),
    "judge_bpc_se": ("± s.e.", 3),
    "judge_ppl": ("judge's perplexity", 1),
    "entropy": ("entropy, nats", 3),
    "entropy_2": ("of pairs", 3),
    "entropy_3": ("of triples", 3),
    "distinct_1": ("distinct-1", 3),
    "distinct_2": ("distinct-2", 3),
    "distinct_3": ("distinct-3", 3),
    "repetition": ("repetition", 3),
    "mauve": ("MAUVE", 3),
}


# ------------------------------------------------------------------------------------------------ the commands


def bound(models: Models, args: argparse.Namespace) -> str:
    """Report the bound of held-out text under each model."""
    pieces = {  # of all, before the first is measured
        path: cut(model, tokenizer, content, args, args.num) for path, (model, tokenizer, content) in models.items()
    }
    reports = []
    for path, (model, tokenizer, content) in models.items():
        settings = f"T {args.T or 'continuous'}, {args.dtype}, seed {args.seed}"
        name = f"model {model.config.model} at step {content['trainer']['step']} ({path})"
        reports.append(report(bound_rows(model, tokenizer, pieces[path], args), f"{name}, {settings}"))
    return "\n\n".join(reports)


def bound_rows(model: Model, tokenizer: Tokenizer, held_out: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the bound of pieces (N, L) in the field's units.

    The perplexity is the bound's, never that of CADD's cross-entropy.
    """
    length, rows = model.config.length, model.config.rows
    batches = map(Batch, held_out.split(args.batch_size))
    nats = held_out_bound(model, batches, steps=args.T, repeat=args.repeat, seed=args.seed, dtype=args.dtype)
    found = summary(nats, length)
    letters = tokenizer.characters(held_out[written(held_out, padding(model, tokenizer))].tolist()) / len(held_out)
    with np.errstate(over="ignore"):  # an untrained cdm's perplexity is beyond floats
        perplexity = float(np.exp(found["bound"]))
    return {
        **({"bound, nats per line": found["bound"] * length} if rows else {}),
        "bound, nats per token": found["bound"],
        "its standard error over sequences": found["standard error"],
        "of it tokens": found["of it tokens"],
        "of it latents": found["of it latents"],
        "bound, perplexity per token": perplexity,
        "bound, bits per character": found["bound"] * length / letters / math.log(2),
        f"{'lines' if rows else 'sequences'} of held-out text": len(held_out),
        "draws for each": args.repeat,
    }


def samples(models: Models, args: argparse.Namespace) -> str:
    """Score samples of each model under the judge. Returns a Markdown table with a row of held-out text."""
    rows, _, caption = scored(models, [args], args)
    return f"{table(rows)}\n\n{caption}"


def frontier(models: Models, args: argparse.Namespace) -> str:
    """Score samples over a range of temperatures or of top-p, and draw bits against entropy to args.out.

    The table is printed first: the scores are there even if the picture fails.
    """
    rows, curves, caption = scored(models, sweep(args), args)
    print(f"{table(rows)}\n\n{caption}")
    try:
        plot(rows, curves, args.out)
    except Exception as error:  # matplotlib may raise anything
        why = described(error)
        raise InputError(f"--out {args.out} could not be drawn ({why}): the table above has all scores") from None
    return f"frontier in {args.out}"


def infill(models: Models, args: argparse.Namespace) -> str:
    """Count how many tokens, masked in held-out text, each model puts back. Returns a Markdown table."""
    first, tokenizer, content = common(models)
    x_0 = cut(first, tokenizer, content, args, args.num)
    lines = ["| model | " + " | ".join(f"{share:.0%} masked" for share in args.masked) + " |"]
    lines.append("|---" * (1 + len(args.masked)) + "|")
    names = short_names(models)
    for path, (model, _, content) in models.items():
        shares = [
            infilled(model, x_0, masked, generate.sampling(args), args, padding(model, tokenizer))
            for masked in args.masked
        ]
        cells = [f"{100 * each.mean():.1f}% ± {100 * each.std() / len(each) ** 0.5:.1f}" for each in shares]
        name = f"{model.config.model} at step {content['trainer']['step']} ({names[path]})"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    caption = f"{len(x_0)} held-out sequences of {x_0.shape[1]} tokens, ± standard error; "
    return "\n".join([*lines, "", caption + generate.describe(args, kinds(models))])


# ------------------------------------------------------------------------------------------------ samples


@dataclass
class Reader:
    """Scores samples (N, L) of one tokenizer by `text_scores.score`. MAUVE compares with half of the pieces of `real`.

    The other half of `real` is scored like samples.
    """

    tokenizer: Tokenizer
    judge: LanguageJudge
    real: Tensor  # (2 num, L)
    lines: bool = False  # a sample is the text before its first EOT
    reference: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.reference = self.judge.read(self.texts(self.real[::2])).features

    def texts(self, ids: Tensor) -> list[str]:
        """Decode tokens (N, L) for the judge."""
        documents = [self.tokenizer.documents(row) for row in ids.tolist()]
        # a judge cannot read a line without text, but it can read its end
        return [found[0] or SEPARATOR if self.lines else SEPARATOR.join(found) for found in documents]

    def score(self, ids: Tensor) -> dict[str, float]:
        """Compute a row of the table."""
        return score(self.texts(ids), ids.cpu(), self.judge, self.reference)

    def real_text(self) -> dict[str, float]:
        """Compute the row of real text, beside which every model is to be read."""
        return self.score(self.real[1::2])


def scored(
    models: Models, each: Collection[argparse.Namespace], args: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], dict[str, list[str]], str]:
    """Score samples of each model by each of the settings `each`, beside held-out text.

    Returns the rows by name, the names of each model's rows, and how the rows were made. The judge is opened last,
    because that takes a while: whatever is wrong with the data is said before.
    """
    first, tokenizer, content = common(models)
    length, of_lines = first.config.length, first.config.rows
    why = ": real text is scored beside the samples, and is MAUVE's reference"
    real = cut(first, tokenizer, content, args, 2 * args.num, why)
    text_scores.check(real[::2])
    judge = open_judge(args.judge or SMOLLM2, args.device, args.judge_dtype)
    reader = Reader(tokenizer, judge, real, of_lines)
    rows = {REAL: reader.real_text()}
    curves: dict[str, list[str]] = {}
    names = short_names(models)
    for path, (model, _, _) in models.items():
        label = f"{model.config.model} ({names[path]})"
        for one in each:
            name = label if one is args else f"{label}, {generate.draw_settings([one])}"
            ids = generate.many(
                model, generate.sampling(one), args.num, seed=args.seed, dtype=args.dtype, batch_size=args.batch_size
            )
            rows[name] = reader.score(ids)
            curves.setdefault(label, []).append(name)
    lines = [f"MAUVE is left out: it needs --num {MAUVE_LEAST} samples, not {args.num}"] * (args.num < MAUVE_LEAST)
    padded = ", of which it reads the lines; entropies, distinct-n and repetition count the padding" if of_lines else ""
    lines.append(
        f"judge {judge.name} in {args.judge_dtype}; {args.num} samples of {length} tokens each{padded}, "
        f"{generate.describe(args, kinds(models), each)}; {args.num} pieces of held-out text as MAUVE's reference, "
        "others as real text"
    )
    return rows, curves, "\n\n".join(lines)


def common(models: Models) -> tuple[Model, Tokenizer, dict[str, Any]]:
    """Return the first model, the tokenizer that all models share, and the first checkpoint's content.

    Raises InputError where the models' sequences are not alike.
    """
    (first, tokenizer, content), *others = models.values()
    if any(t.spec() != tokenizer.spec() or m.config.length != first.config.length for m, t, _ in others):
        raise InputError("--ckpt: models that are compared must have one tokenizer and one length")
    if any(m.config.rows != first.config.rows for m, _, _ in others):
        raise InputError("--ckpt: models of lines and of running text cannot be compared")
    return first, tokenizer, content


def kinds(models: Models) -> set[str]:
    """Return which of cadd, mdlm, ... the models are."""
    return {model.config.model for model, _, _ in models.values()}


def short_names(paths: Iterable[Path]) -> dict[Path, str]:
    """Name each checkpoint by its folder, or by its path where another folder has the same name."""
    short = {path: path.parent.name or path.name for path in paths}
    names = list(short.values())
    return {path: name if names.count(name) == 1 else str(path) for path, name in short.items()}


def percent(part: int, whole: int) -> str:
    """Write a share ± its standard error, or nothing where the whole is 0."""
    share = part / max(1, whole)
    return f"{share:.1%} ± {100 * (share * (1 - share) / whole) ** 0.5:.1f}" if whole else ""


def table(rows: dict[str, dict[str, float]]) -> str:
    """Write rows as Markdown."""
    shown = [key for key in COLUMNS if any(key in row for row in rows.values())]
    lines = ["| samples | " + " | ".join(COLUMNS[key][0] for key in shown) + " |", "|---" * (1 + len(shown)) + "|"]
    for name, row in rows.items():
        cells = [f"{row[key]:.{COLUMNS[key][1]}f}" if key in row else "" for key in shown]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def infilled(
    model: Model, x_0: Tensor, share: float, settings: Sampling, args: argparse.Namespace, pad: int | None = None
) -> Tensor:
    """Mask a share of x_0 (N, L) at random, fill in, and return the share of masked tokens put back, (N,).

    The masks are the same for every model of one length. pad: see `padding`; the padding is never masked.
    """
    text = written(x_0, pad)
    noise = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(args.seed))
    ranks = noise.masked_fill(~text, 1.0).argsort(1).argsort(1)  # the padding has the last ranks
    masked = ranks < (share * text.sum(1, keepdim=True).double()).round().clamp(min=1)
    prompt = torch.where(masked, model.mask_id, x_0)
    parts = [
        generate.samples(model, settings, len(part), seed=args.seed, dtype=args.dtype, index=index, prompt=part)
        for index, part in enumerate(tqdm(prompt.split(args.batch_size), desc="filling in", leave=False))
    ]
    right = (torch.cat(parts).cpu() == x_0) & masked
    return right.sum(1) / masked.sum(1)


# ------------------------------------------------------------------------------------------------ frontiers


def sweep(args: argparse.Namespace) -> list[argparse.Namespace]:
    """List the settings of a frontier, for each temperature or for each top-p, in rising order.

    A cosine temperature ends at each of the temperatures. Raises InputError for options that the sweep would ignore.
    """
    if args.temperatures and args.top_ps:
        raise InputError("--temperatures and --top-ps cannot be given together: a frontier varies one of them")
    name, values = ("top_p", args.top_ps) if args.top_ps else ("temperature", args.temperatures or TEMPERATURES)
    if getattr(args, name) != getattr(Sampling, name):
        flag = f"--{name.replace('_', '-')}"
        raise InputError(f"{flag} is what this frontier varies: give {flag}s, not {flag} {getattr(args, name)}")
    return [argparse.Namespace(**vars(args) | {name: value}) for value in sorted(set(values))]


def check_picture(path: Path) -> None:
    """Raise InputError where `plot` could not draw to a --out."""
    if path.suffix != ".png":
        raise InputError(f"--out must be a .png file, not {path}")
    if not path.parent.is_dir():
        raise InputError(f"--out must be a file in a folder that is there, not {path}")
    find_matplotlib()


def find_matplotlib() -> None:
    """Raise InputError that says how to install matplotlib, where it is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the picture of a frontier needs matplotlib: pip install matplotlib")


def plot(rows: dict[str, dict[str, float]], curves: dict[str, list[str]], path: Path) -> None:
    """Draw the judge's bits per character against entropy: a line for each curve, a star for real text.

    A curve that lies lower at the same entropy is better. Moving along a curve trades the two for each other.
    """
    find_matplotlib()
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for label, names in curves.items():
        points = [(rows[n]["entropy"], rows[n]["judge_bpc"], rows[n].get("judge_bpc_se", 0.0)) for n in names]
        x, y, error = zip(*points)
        axis.errorbar(x, y, error, label=label, marker="o", ms=3, lw=1, capsize=2)
    axis.plot(rows[REAL]["entropy"], rows[REAL]["judge_bpc"], "k*", ms=10, label=REAL)
    axis.set(xlabel="entropy of a sample's tokens, nats", ylabel="bits per character under the judge")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)
