"""Train models for equal time on laws with a judge, and part their errors: the network's, and those of few steps.

    python -m benchmarks.budget --tasks chain sudoku --minutes 20            mdlm, cadd and a late latent, 3 seeds
    python -m benchmarks.budget --tasks molecules --molecules qm9.txt --train mdlm cadd:drop_latent=0.3
    python -m benchmarks.budget --table rows.jsonl                           only the tables of rows that --out has

A model is mdlm or cadd. Behind a colon stand settings: fields of ModelConfig and TrainConfig. The tasks are those of
tasks.py. Each trained model is sampled by each of --chains, an estimate of z_0 with settings of `Sampling` behind its
colon ("soft:time_grid=cosine"). The masked model has no latent: its exact chain is "hard", and settings of the latent
fall away. Each run appends one line of JSON to --out. The first table has the error of each model at each T, and in
brackets its variety, with FD for molecules. "one" is one token a step, at first-hitting times: no two tokens are drawn
at once, so the errors are the network's. The second table is for errors that are counted:

    network    error at "one" of the masked model, less that of true data
    steps      its error at T, less that at "one": the price of drawing tokens at once
    back       what a model gives back of that price: (error of the masked model at T - the model's own) / steps. Seeds
               are paired. It is left out where `steps` is less than two standard errors over seeds: there is nothing
               to win. A model that has learned more than the masked model in equal time gives back more, and a model
               that has learned less gives back less: compare their errors at "one"
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import train_for
from benchmarks.specs import OF_LATENTS, draw, markdown, parse, parse_chain, pop_fields, read_rows, run_all, spread
from benchmarks.tasks import OWN, TASKS, Task, open_task
from cadd_min.model import ModelConfig
from cadd_min.orders import HITTING, Sampling
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.utils.cli import as_path, expanded, run
from cadd_min.utils.errors import InputError, choose
from cadd_min.utils.files import cache_folder, check_writable

LATE = "cadd:discrete=power4,continuous=linear,evidence=0.75,latent_dim=9"
MASKED, EXACT = "mdlm", "hard"  # the model whose error is parted, and its chain
ONE = "one"  # one token a step, in place of T
TRUE = "true data"
BESIDE = {"variety": "", "FD": "FD "}  # measures beside the error, as they are headed
CLOCKED = ("steps", "seed")  # fields of TrainConfig that a benchmark sets


def open_models(specs: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """Parse specs of models: (spec, "mdlm" or "cadd", settings). Raises InputError for what a benchmark sets itself."""
    found = []
    for spec in specs:
        model, options = parse(spec)
        choose("--train", model, (MASKED, "cadd"))
        for name in (*OWN, *CLOCKED):
            if name in options:
                raise InputError(f"--train {spec}: {name} is set by the benchmark")
        found.append((spec, model, options))
    return found


def settings(task: Task, job: dict[str, Any]) -> tuple[dict[str, Any], TrainConfig]:
    """Return the settings of a job's model, and its training. Raises InputError."""
    options = {"batch_size": task.batch_size, "dtype": "float32", **task.settings, **job["options"]}
    model = {"model": job["model"], **pop_fields(ModelConfig, options)}
    return model, TrainConfig(**pop_fields(TrainConfig, options), seed=job["seed"])


def trained(task: Task, job: dict[str, Any]) -> tuple[Trainer, float]:
    """Train the model of a job for its minutes. Returns its trainer and the seconds."""
    model, train = settings(task, job)
    data = task.data(train.batch_size, job["seed"])
    trainer = Trainer(task.build(job["preset"], job["seed"], **model), data, train)
    return trainer, [*train_for(trainer, 60 * job["minutes"])][-1]


def chains(task: Task, job: dict[str, Any]) -> dict[str, Sampling]:
    """List the chains by which a job's model is sampled, by names like "soft 8" and "soft one". Raises InputError."""
    found, masked = {}, job["model"] == MASKED
    for spec in [EXACT, *job["chains"]] if masked else job["chains"]:
        zhat, options = parse_chain(spec)
        if masked:
            zhat, options = EXACT, {name: value for name, value in options.items() if name not in OF_LATENTS}
            spec = ":".join(filter(None, (EXACT, ",".join(f"{name}={value}" for name, value in options.items()))))
        for steps in job["T"] or task.T:
            found[f"{spec} {steps}"] = Sampling(steps, zhat, **options)
        if not options:
            found[f"{spec} {ONE}"] = Sampling(task.length, zhat, time_grid=HITTING)
    return found


def one_run(job: dict[str, Any]) -> dict[str, Any]:
    """Train one model with one seed, sample it by all chains, and score the samples."""
    torch.set_num_threads(job["threads"])
    task = open_task(job["task"], job["seed"], Path(job["cache"]), job["molecules"] and Path(job["molecules"]))
    trainer, clock = trained(task, job)
    true = task.score(task.real(job["samples"], job["seed"]))
    scores = {
        name: task.score(draw(trainer.ema, trainer.ema, chain, job["samples"], job["seed"]))
        for name, chain in chains(task, job).items()
    }
    return job | {"clock": clock, "updates": trainer.step, "counts": task.counts, "true": true, "scores": scores}


# ------------------------------------------------------------------------------------------------ tables


def names_of(rows: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Name the lines of a table: a model's spec and a chain's spec for each name."""
    pairs = dict.fromkeys((row["spec"], key.partition(" ")[0]) for row in rows for key in row["scores"])
    plain = {row["spec"] for row in rows if row["model"] == MASKED}
    return {spec if spec in plain and chain == EXACT else f"{spec} {chain}": (spec, chain) for spec, chain in pairs}


def columns(rows: list[dict[str, Any]]) -> list[str]:
    """List the columns of a table: the numbers of steps in rising order, then ONE."""
    steps = {key.partition(" ")[2] for row in rows for key in row["scores"]}
    return [*sorted(steps - {ONE}, key=int), *({ONE} & steps)]


def cell(scores: list[dict[str, float]]) -> str:
    """Format the errors of one chain over seeds, and in brackets the means of their BESIDE. Empty without scores."""
    found = {name: [score[name] for score in scores if name in score] for name in BESIDE}
    beside = [f"{head}{statistics.mean(found[name]):.2f}" for name, head in BESIDE.items() if found[name]]
    errors_ = spread([score["error"] for score in scores]) if scores else ""
    return errors_ + (f" ({', '.join(beside)})" if beside else "")


def errors(task: str, rows: list[dict[str, Any]]) -> str:
    """Format the errors of one task as Markdown: a line for each model and chain, a column for each T."""
    heads, lines = columns(rows), []
    for name, (spec, chain) in names_of(rows).items():
        own = [row["scores"] for row in rows if row["spec"] == spec]
        lines.append([name, *(cell([s[f"{chain} {h}"] for s in own if f"{chain} {h}" in s]) for h in heads)])
    true = [row["true"] for row in rows if row["spec"] == rows[0]["spec"]]
    lines.append([TRUE, cell(true), *[""] * (len(heads) - 1)])
    return markdown([task, *(f"T = {head}" if head != ONE else head for head in heads)], lines)


def parted(task: str, rows: list[dict[str, Any]], least: float = 0.0) -> str:
    """Part the masked model's error of one task, as Markdown: a line for each T. See the module's docstring.

    least: the smallest price of few steps of which a share is told.
    """
    by_seed: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["spec"]] = row
    specs = {row["spec"] for row in rows}
    whole = [found for found in by_seed.values() if found.keys() == specs]  # seeds that every model has
    others = {name: pair for name, pair in names_of(rows).items() if pair != (MASKED, EXACT)}
    lines = []
    error = lambda found, spec, chain, head: found[spec]["scores"][f"{chain} {head}"]["error"]
    floors = [error(found, MASKED, EXACT, ONE) for found in whole]
    network = statistics.mean(floor - found[MASKED]["true"]["error"] for floor, found in zip(floors, whole))
    for head in columns(rows)[:-1]:
        masked = [error(found, MASKED, EXACT, head) for found in whole]
        prices = [e - floor for e, floor in zip(masked, floors)]
        price = statistics.mean(prices)
        doubt = statistics.stdev(prices) / len(prices) ** 0.5 if len(prices) > 1 else 0.0
        gains = {
            name: statistics.mean(e - error(found, spec, chain, head) for e, found in zip(masked, whole))
            for name, (spec, chain) in others.items()
        }
        back = [f"{gain / price:.0%}" if price > max(2 * doubt, least) else "" for gain in gains.values()]
        lines.append([f"T = {head}", f"{network:.3f}", spread(prices), *back])
    return markdown([task, "network", "steps", *(f"back: {name}" for name in others)], lines)


def tables(rows: list[dict[str, Any]]) -> str:
    """Format the rows of all tasks as Markdown. Raises InputError where one run is there twice."""
    runs = Counter((row["task"], row["spec"], row["seed"]) for row in rows)
    for run_, count in runs.items():
        if count > 1:
            raise InputError(f"--table has the run {' '.join(map(str, run_))} {count} times: they are no seeds")
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        specs = dict.fromkeys(row["spec"] for row in own)
        parts.append(errors(task, own))
        if own[0]["counts"] and MASKED in specs and len(names_of(own)) > 1:
            parts.append(parted(task, own))
        updates = [f"{s} {statistics.mean(r['updates'] for r in own if r['spec'] == s):,.0f}" for s in specs]
        seeds = len({row["seed"] for row in own})
        parts.append(
            f"{own[0]['preset']}, {own[0]['minutes']:g} minutes of training with {own[0]['threads']} thread(s) (steps: "
            f"{', '.join(updates)}), {own[0]['samples']} samples, seeds: {seeds}, ± their standard deviation"
        )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["chain", "sudoku", "digits"], help=", ".join(TASKS))
    parser.add_argument("--train", nargs="+", default=[MASKED, "cadd", LATE], help="models to train")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training")
    parser.add_argument("--preset", default="tiny", help="size of the networks")
    parser.add_argument("--molecules", type=expanded, help="a file with one molecule a line, as SMILES")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    parser.add_argument("--samples", type=int, default=1024, help="samples for each T and chain")
    parser.add_argument("--T", type=int, nargs="+", help="sampling steps (default: the task's own)")
    parser.add_argument("--chains", nargs="+", default=["soft", EXACT], help="estimates of z_0, and how to sample")
    parser.add_argument("--cache", type=expanded, default=str(cache_folder()), help="folder of prepared data")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--out", type=as_path, help="append each run as a line of JSON")
    parser.add_argument("--table", type=as_path, help="only print the tables of the runs in this file")
    args = parser.parse_args()
    if args.table:
        return print(tables(read_rows(args.table)))
    if min(args.seeds, args.samples, args.jobs, args.threads) < 1 or not 0 < args.minutes < float("inf"):
        raise InputError("--seeds, --samples, --jobs, --threads and --minutes must be greater than 0")
    if args.out:
        check_writable(args.out, "--out")
    shared = {k: v for k, v in vars(args).items() if k not in ("tasks", "train", "seeds", "jobs", "out", "table")}
    jobs = [
        shared | {"task": task, "spec": spec, "model": model, "options": options, "seed": seed}
        for seed in range(args.seeds)
        for task in args.tasks
        for spec, model, options in open_models(args.train)
    ]
    for name in args.tasks:  # whatever is wrong is said before the first model is trained
        task = open_task(name, 0, Path(args.cache), args.molecules and Path(args.molecules))
        for note in task.notes:
            print(f"note: {note}", file=sys.stderr)
        for job in (job for job in jobs if job["task"] == name and job["seed"] == 0):
            task.config(args.preset, **settings(task, job)[0])
            chains(task, job)
    print(tables(run_all(one_run, jobs, args.jobs, args.out)))


if __name__ == "__main__":
    run(main)
