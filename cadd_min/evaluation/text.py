"""What evaluate.py measures of models of text: samples beside held-out text under a judge, frontiers, and the bound."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cadd_min.data import corpus
from cadd_min.data.batches import TextBatches
from cadd_min.data.pairs import holds_pairs
from cadd_min.data.token_folder import TokenFolder, TokenView, is_folder, prepare
from cadd_min.data.tokenizer import Tokenizer
from cadd_min.evaluation import text_scores
from cadd_min.evaluation.bound import held_out_bound, report, summary
from cadd_min.evaluation.text_judge import SMOLLM2, LanguageJudge, characters, open_judge
from cadd_min.evaluation.text_scores import MAUVE_LEAST, score
from cadd_min.model import Model
from cadd_min.objective import Batch
from cadd_min.orders import Sampling
from cadd_min.sampling import generate
from cadd_min.utils.errors import InputError


def held_out_tokens(content: dict[str, Any], tokenizer: Tokenizer, dataset: str | None, cache: Path) -> TokenView:
    """The held-out ids of the data set that a checkpoint was trained on, or of another one under its tokenizer."""
    name = dataset or content["settings"].get("dataset")
    if not name:
        raise InputError("--dataset must be given: the checkpoint does not say what it was trained on")
    if holds_pairs(Path(name)):
        raise InputError(f"--dataset must be given, a text: {name} holds prompts and responses")
    if not is_folder(name):
        return prepare(corpus.open_corpus(name, cache), tokenizer, cache).split("val")
    tokens = TokenFolder(Path(name))
    if tokens.header["tokenizer"] != tokenizer.spec():
        raise InputError(f"--dataset {name} was made by another tokenizer than the checkpoint's")
    return tokens.split("val")


def windows(tokens: np.ndarray | TokenView, count: int, length: int) -> Tensor:
    """(count, length) pieces of held-out text, no two of them overlapping, the same at every call."""
    batches = TextBatches(tokens, length, count, name="the held-out text")
    if batches.per_epoch < count:
        raise InputError(
            f"--num: the held-out text has {batches.per_epoch} pieces of {length} tokens, and {count} are needed: real "
            "text is scored beside the samples"
        )
    return batches(0).x_0


@dataclass
class Reader:
    """Scores samples (N, L) of one tokenizer as `text_scores.score` does; MAUVE is against the pieces of `real`."""

    tokenizer: Tokenizer
    judge: LanguageJudge
    real: Tensor  # (2 num, L): one half is the reference of all samples, the other is scored like samples
    reference: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.reference = self.judge.read(self.texts(self.real[::2])).features

    def texts(self, ids: Tensor) -> list[str]:
        return [self.tokenizer.decode(row) for row in ids.tolist()]

    def score(self, ids: Tensor) -> dict[str, float]:
        """One row of the table."""
        return score(self.texts(ids), ids.cpu(), self.judge, self.reference)

    def real_text(self) -> dict[str, float]:
        """The row that no model should be read without."""
        return self.score(self.real[1::2])


def bound_rows(model: Model, tokenizer: Tokenizer, tokens: TokenView, args: argparse.Namespace) -> dict[str, Any]:
    """The bound of held-out text in the field's units. A perplexity of the bound; never of CADD's cross-entropy."""
    length = model.config.length
    held_out = windows(tokens, args.num, length)
    nats = held_out_bound(
        model,
        map(Batch, held_out.split(args.batch_size)),
        steps=args.T,
        repeat=args.repeat,
        seed=args.seed,
        dtype=args.dtype,
    )
    found = summary(nats, length)
    letters = sum(characters(tokenizer.decode(row)) for row in held_out.tolist()) / len(held_out)
    with np.errstate(over="ignore"):  # an untrained cdm's perplexity is beyond floats
        perplexity = float(np.exp(found["bound"]))
    return {
        "bound, nats per token": found["bound"],
        "its standard error over sequences": found["standard error"],
        "of it tokens": found["of it tokens"],
        "of it latents": found["of it latents"],
        "bound, perplexity per token": perplexity,
        "bound, bits per character": found["bound"] * length / letters / math.log(2),
        "sequences of held-out text": len(held_out),
        "draws for each": args.repeat,
    }


REAL = "held-out text"
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0)  # of a frontier that is not told any
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


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown, a line for each row."""
    shown = [key for key in COLUMNS if any(key in row for row in rows.values())]
    lines = ["| samples | " + " | ".join(COLUMNS[key][0] for key in shown) + " |", "|---" * (1 + len(shown)) + "|"]
    for name, row in rows.items():
        cells = [f"{row[key]:.{COLUMNS[key][1]}f}" if key in row else "" for key in shown]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sweep(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The options of a frontier, from the most careful to the model's own: one of temperature and top-p varies.

    A cosine temperature ends at each of the temperatures. Raises InputError for options that it would not heed.
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
    """Raise InputError, which says how to get it, where it is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the picture of a frontier needs matplotlib: pip install matplotlib")


def plot(rows: dict[str, dict[str, float]], curves: dict[str, list[str]], path: Path) -> None:
    """Judge's bits per character against entropy, a line for each curve (names of rows), real text as a star.

    Lower at the same entropy is better; what moves along a curve has only traded one for the other.
    """
    find_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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


def short_names(paths: Iterable[Path]) -> dict[Path, str]:
    """What to call each checkpoint: its folder where no other has that name, else its path."""
    short = {path: path.parent.name or path.name for path in paths}
    names = list(short.values())
    return {path: name if names.count(name) == 1 else str(path) for path, name in short.items()}


def assess(models: dict[Path, tuple[Model, Tokenizer, dict[str, Any]]], args: argparse.Namespace) -> str:
    """What is asked for, of each model, as Markdown or lines.

    A frontier's table is printed, so that it is there whatever becomes of the picture, which is drawn to args.out.
    """
    if args.what == "bound":
        return "\n\n".join(_bound_lines(path, *models[path], args) for path in models)
    (first, tokenizer, content), *others = models.values()
    if any(t.spec() != tokenizer.spec() or m.config.length != first.config.length for m, t, _ in others):
        raise InputError("--ckpt: models that are compared must have one tokenizer and one length")
    if args.what == "infill":
        tokens = held_out_tokens(content, tokenizer, args.dataset, args.cache)
        return infill_table(models, windows(tokens, args.num, first.config.length), args)
    tokens = held_out_tokens(content, tokenizer, args.dataset, args.cache)
    real = windows(tokens, 2 * args.num, first.config.length)
    text_scores.check(real[::2])
    judge = open_judge(args.judge or SMOLLM2, args.device, args.judge_dtype)  # last: it takes a while
    reader = Reader(tokenizer, judge, real)
    rows = {REAL: reader.real_text()}
    curves: dict[str, list[str]] = {}
    names, each = short_names(models), [args] if args.what == "samples" else sweep(args)
    for path, (model, _, _) in models.items():
        label = f"{model.config.model} ({names[path]})"
        for one in each:
            name = label if args.what == "samples" else f"{label}, {generate.draw_settings([one])}"
            rows[name] = reader.score(drawn(model, generate.sampling(one), args))
            curves.setdefault(label, []).append(name)
    lines = [table(rows)]
    if args.num < MAUVE_LEAST:
        lines.append(f"MAUVE is left out: it needs --num {MAUVE_LEAST} samples, not {args.num}")
    lines.append(
        f"judge {judge.name} in {args.judge_dtype}; {args.num} samples of {first.config.length} tokens each, "
        f"{generate.settings(args, kinds(models), each)}; {args.num} pieces of held-out text as MAUVE's reference, "
        "others as real text"
    )
    if args.what == "samples":
        return "\n\n".join(lines)
    print("\n\n".join(lines))
    plot(rows, curves, args.out)
    return f"frontier in {args.out}"


def kinds(models: dict[Path, tuple[Model, Tokenizer, dict[str, Any]]]) -> set[str]:
    """Which of cadd, mdlm, ... there are."""
    return {model.config.model for model, _, _ in models.values()}


def drawn(model: Model, how: Sampling, args: argparse.Namespace) -> Tensor:
    """(num, L) samples of a model by these options."""
    return generate.many(model, how, args.num, seed=args.seed, dtype=args.dtype, batch_size=args.batch_size)


def infilled(model: Model, x_0: Tensor, share: float, how: Sampling, args: argparse.Namespace) -> Tensor:
    """(N,) which share of its masked tokens each held-out sequence gets back: `share` of x_0 (N, L) masked, at random.

    The masks are the same for every model of one length.
    """
    count, length = x_0.shape
    ranks = torch.rand(count, length, generator=torch.Generator().manual_seed(args.seed)).argsort(1).argsort(1)
    masked = ranks < max(1, round(share * length))
    prompt = torch.where(masked, model.mask_id, x_0)
    parts = [
        generate.samples(model, how, len(part), seed=args.seed, dtype=args.dtype, index=index, prompt=part)
        for index, part in enumerate(tqdm(prompt.split(args.batch_size), desc="filling in", leave=False))
    ]
    right = (torch.cat(parts).cpu() == x_0) & masked
    return right.sum(1) / masked.sum(1)


def infill_table(
    models: dict[Path, tuple[Model, Tokenizer, dict[str, Any]]], x_0: Tensor, args: argparse.Namespace
) -> str:
    """Markdown: of each model, how many of the tokens masked in x_0 (N, L) it puts back."""
    lines = ["| model | " + " | ".join(f"{share:.0%} masked" for share in args.masked) + " |"]
    lines.append("|---" * (1 + len(args.masked)) + "|")
    names = short_names(models)
    for path, (model, _, content) in models.items():
        found = [infilled(model, x_0, share, generate.sampling(args), args) for share in args.masked]
        cells = [f"{100 * f.mean():.1f}% ± {100 * f.std() / len(f) ** 0.5:.1f}" for f in found]
        name = f"{model.config.model} at step {content['trainer']['step']} ({names[path]})"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    how = f"{len(x_0)} held-out sequences of {x_0.shape[1]} tokens, ± standard error; "
    how += generate.settings(args, kinds(models))
    return "\n".join([*lines, "", how])


def _bound_lines(
    path: Path, model: Model, tokenizer: Tokenizer, content: dict[str, Any], args: argparse.Namespace
) -> str:
    tokens = held_out_tokens(content, tokenizer, args.dataset, args.cache)
    rows = bound_rows(model, tokenizer, tokens, args)
    how = f"T {args.T or 'continuous'}, {args.dtype}, seed {args.seed}"
    return report(rows, f"model {model.config.model} at step {content['trainer']['step']} ({path}), {how}")
