"""Compare exact and trained denoisers on Markov sources whose law is known exactly. This decides the defaults.

    python -m benchmarks.markov                              exact denoisers, three seeds: only the sampler can err
    python -m benchmarks.markov --train mdlm cadd cdm        also networks, trained by the project's trainer
    python -m benchmarks.markov --train cadd:hint=raw,latent_norm=1,preset=tiny --source topics --seeds 3

A model is mdlm, cadd or cdm. Behind a colon stand settings: any fields of ModelConfig and TrainConfig, and preset=,
layers=, width=, heads=, and of the sampling strength=, time_grid= and num_latents=. Other settings have the project's
defaults. Each run appends one line of JSON to --out, and --table FILE prints the tables of such a file. The cells are
means and standard deviations over seeds of

    bad       share of impossible transitions
    tv        total variation between the samples' transitions and the law
    entropy   entropy of the samples' bigrams less that of true bigrams, bits
    exact CE  the exact denoiser's CE at masked positions, nats, by t
    gap       by how much the network's CE on the same (x_t, z_t) is larger, nats
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import defaultdict
from typing import Any

import torch

from benchmarks.sources import ExactDenoiser, Source
from benchmarks.specs import draw, heed_steps, parse, pop_fields, read_rows, run_all, spread
from cadd_min.dit import PRESETS
from cadd_min.forward import q_sample
from cadd_min.loss import log_probs
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.objective import Batch
from cadd_min.orders import Sampling
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.utils.cli import as_path, run
from cadd_min.utils.device import seeded
from cadd_min.utils.errors import InputError, choose

SOURCES = {"chain": {"topics": 1}, "topics": {"topics": 8}}
TIMES = (0.2, 0.4, 0.6, 0.8)
OF_SAMPLING = {"strength": "float", "time_grid": "str", "num_latents": "int"}
EXTRA = {"preset": "str", "layers": "int", "width": "int", "heads": "int"} | OF_SAMPLING
PAPER = "cadd:continuous=linear,latent_norm=2"  # the paper's; an exact denoiser has nothing else


def build(source: Source, model: str, options: dict[str, Any], seed: int) -> Denoiser:
    """Make an untrained network for a source. The exact denoiser uses its table and its schedule, too."""
    torch.manual_seed(seed)
    size = PRESETS[choose("preset", options.pop("preset", "nano"), PRESETS)]
    size = dataclasses.replace(size, **{k: options.pop(k) for k in ("layers", "width", "heads") if k in options})
    chosen = pop_fields(ModelConfig, options)
    return Denoiser(ModelConfig(source.states, source.length, size, model=model, **chosen)).eval()


def train(source: Source, model: Denoiser, config: TrainConfig) -> Trainer:
    """Train on fresh sequences of the source in every step."""

    def data(index: int) -> Batch:
        return Batch(source.draw(config.batch_size, seeded(config.seed + 1000, index)))

    trainer = Trainer(model.train(), data, config)
    for _ in range(config.steps):
        trainer.train_step()
    return trainer


@torch.no_grad()
def ce_gap(source: Source, model: Denoiser, count: int = 1024) -> dict[str, list[float]]:
    """Measure the exact denoiser's CE, and the network's excess over it, in nats per masked position at TIMES."""
    gen, exact = seeded(7, 0), ExactDenoiser(source, model.table(), model.schedule)
    rows: dict[str, list[float]] = {"exact_ce": [], "gap": []}
    for time_ in TIMES:
        x_0, t = source.draw(count, gen), torch.full((count,), time_)
        x_t, z_t = q_sample(x_0, model.table()[x_0], t, model.schedule, model.mask_id, generator=gen)
        masked = x_t == model.mask_id
        ce = [
            -log_probs(d(x_t, z_t, t), model.mask_id).gather(-1, x_0[..., None])[..., 0][masked].mean().item()
            for d in (exact, model)
        ]
        rows["exact_ce"].append(ce[0])
        rows["gap"].append(ce[1] - ce[0])
    return rows


def of_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the settings of the sampling from a spec's options, and return them. Raises InputError."""
    found = {name: options.pop(name) for name in OF_SAMPLING if name in options}
    heed_steps(found)
    return found


def one_run(job: dict[str, Any]) -> dict[str, Any]:
    """Train one model with one seed if its job says so, sample at every T and zhat, and score the samples."""
    torch.set_num_threads(1)
    seed, options = job["seed"], dict(job["options"])
    source = Source(seed=seed, **SOURCES[job["source"]])
    sampling = of_sampling(options)
    model = build(source, job["model"], options, seed)
    row, start = dict(job), time.time()
    denoiser: Any = ExactDenoiser(source, model.table(), model.schedule)
    if job["trained"]:
        config = {"steps": job["steps"], "batch_size": 64, "lr": 2e-3, "compile": True, "seed": seed} | options
        trainer = train(source, model, TrainConfig(**config))
        model = denoiser = trainer.ema
        row |= ce_gap(source, model)
        row["train_seconds"] = time.time() - start
    truth = source.score(source.draw(job["samples"], seeded(seed, 99)))
    row["scores"] = {}
    for zhat in job["zhat"] if model.table().shape[1] else ["hard"]:
        for steps in job["T"]:
            settings = Sampling(steps, zhat, **sampling)
            score = source.score(draw(denoiser, model, settings, job["samples"], seed))
            score["entropy"] -= truth["entropy"]
            row["scores"][f"{zhat} {steps}"] = score
    return row


def tables(rows: list[dict[str, Any]]) -> str:
    """Format the results as Markdown: a table of the samples, then a table of the CE gaps of trained models."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[("trained " if row["trained"] else "exact ") + row["spec"]].append(row)
    steps = rows[0]["T"]
    lines = ["| model | zhat | " + " | ".join(f"T={s}: bad / tv / entropy" for s in steps) + " |"]
    lines.append("|---" * (2 + len(steps)) + "|")
    for name, group in groups.items():
        for zhat in dict.fromkeys(key.split()[0] for key in group[0]["scores"]):
            cells = [
                " / ".join(
                    spread([row["scores"][f"{zhat} {s}"][key] for row in group], 2 if key == "entropy" else 3)
                    for key in ("bad", "tv", "entropy")
                )
                for s in steps
            ]
            lines.append(f"| {name} | {zhat} | " + " | ".join(cells) + " |")
    trained = {name: group for name, group in groups.items() if group[0]["trained"]}
    if trained:
        lines += ["", "| model | " + " | ".join(f"t={t}: exact CE, gap" for t in TIMES) + " | train s |"]
        lines.append("|---" * (2 + len(TIMES)) + "|")
        for name, group in trained.items():
            cells = [
                f"{spread([r['exact_ce'][i] for r in group])}, +{spread([r['gap'][i] for r in group])}"
                for i in range(len(TIMES))
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {spread([r['train_seconds'] for r in group], 0)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exact", nargs="*", default=["mdlm", PAPER, "cadd"], help="models with the exact denoiser")
    parser.add_argument("--train", nargs="*", default=[], help="models to train")
    parser.add_argument("--source", choices=SOURCES, default="chain", help="one chain, or one of 8 for each sequence")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    parser.add_argument("--steps", type=int, default=9000, help="training steps")
    parser.add_argument("--samples", type=int, default=2048, help="samples for each T and zhat")
    parser.add_argument("--T", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="sampling steps")
    parser.add_argument("--zhat", nargs="+", default=["sample", "soft", "hard"], help="estimates of z_0")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--out", type=as_path, help="append each run as a line of JSON")
    parser.add_argument("--table", type=as_path, help="only print the table of the runs in this file")
    args = parser.parse_args()
    if args.table:
        return print(tables(read_rows(args.table)))
    if min(args.seeds, args.samples, *args.T) < 1:
        raise InputError("--seeds, --samples and --T must be at least 1")
    shared = {"source": args.source, "steps": args.steps, "samples": args.samples, "T": args.T, "zhat": args.zhat}
    jobs = []
    for trained, specs in ((False, args.exact), (True, args.train)):
        for spec in specs:
            model, options = parse(spec, **EXTRA)
            for zhat in args.zhat:  # whatever is wrong is said before a model is trained
                Sampling(args.T[0], zhat, **of_sampling(dict(options)))
            for seed in range(args.seeds):
                jobs.append(
                    shared | {"spec": spec, "model": model, "options": options, "trained": trained, "seed": seed}
                )
    jobs.sort(key=lambda job: job["seed"])
    print(tables(run_all(one_run, jobs, args.jobs, args.out)))


if __name__ == "__main__":
    run(main)
