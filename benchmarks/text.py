"""Compare models of text: train them for equal steps, sample with many settings, and score the samples with a judge.

    python -m benchmarks.text                                            mdlm, cadd, cdm on the packaged text, 3 seeds
    python -m benchmarks.text --dataset wiki.txt --train mdlm cadd:evidence=0.2 --vary steps=8,32,128 zhat=hard,soft
    python -m benchmarks.text --ablation fusion                          an ablation of the paper, see ABLATIONS
    python -m benchmarks.text --ablation zhat --ckpt runs/sotu-cadd      an ablation of a trained model, in minutes
    python -m benchmarks.text --table rows.jsonl                         only the table of rows that --out has written

A model is cadd, mdlm, cdm, ar, udm or sedd. Behind a colon stand settings: any fields of ModelConfig and TrainConfig,
and preset=. Other settings have train_text.py's defaults. train_text.py trains each model and seed in a folder in
--runs. A finished run is not trained again, and a stopped run is resumed. --vary names fields of the sampler with their
values; every combination of values is sampled.

The first row of the table is held-out text, scored by the same code. The cells are means ± standard deviations over
seeds of the scores of evaluation/text_scores.py. bound: an upper bound on held-out text's nats per token.

A second table follows where mdlm has several steps, L among them. It parts mdlm's bits as budget.py parts errors: in
the network's, of T = L beyond held-out text, and the price of fewer steps. Prices under 0.2 bits are no yardstick.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import budget
from benchmarks.specs import OF_LATENTS, parse, read_rows, run_all, spread
from cadd_min.checkpoints import file as checkpoint
from cadd_min.checkpoints.load import find, load_denoiser
from cadd_min.evaluation.bound import held_out_bound, summary
from cadd_min.evaluation.held_out import cut
from cadd_min.evaluation.text import COLUMNS, REAL, Reader, plot
from cadd_min.evaluation.text_judge import SMOLLM2, open_judge
from cadd_min.objective import Batch
from cadd_min.orders import Sampling
from cadd_min.sampling import generate
from cadd_min.training.log import read_metrics
from cadd_min.utils.cli import TYPES, as_path, expanded, run
from cadd_min.utils.device import DTYPES, default_device
from cadd_min.utils.errors import InputError, choose
from cadd_min.utils.files import cache_folder

ROOT = Path(__file__).parent.parent
NOT_THE_RUNS = ("train", "ckpt", "vary", "seeds", "out", "table", "picture")
OF_TRAINING = ("preset", "batch_size", "length", "dataset", "tokenizer", "model", "dtype", "seed")
SAID = ("num", "length", "dtype", "judge", "judge_dtype")
SWEPT = ("temperature", "top_p")  # along a frontier
DRAWN = ("entropy", "judge_bpc", "judge_bpc_se")
LEAST = 0.2  # bits a character
STRONG = "cadd:discrete=cosine,continuous=linear,evidence=0.35,latent_dim=9"

# Name: models, settings, and the paper's result (arXiv 2510.01329; OpenWebText, 168M, T = 4096 unless said otherwise).
ABLATIONS: dict[str, tuple[list[str], list[str], str]] = {
    "T": (
        ["mdlm", "cadd"],
        ["steps=8,16,32,64,128,256,512,1024,2048"],
        "MAUVE .270 (best discrete baseline .240), perplexity 102.5 (MDLM 104.7)",
    ),
    "zhat": (["cadd"], ["zhat=hard,soft,sample", "steps=16,128"], "MAUVE: hard .24, soft .18 with a higher entropy"),
    "latents": (
        ["cadd"],
        ["num_latents=1,2,4,8", "zhat=soft", "steps=16,128"],
        "no figures at hand; a step costs K network calls",
    ),
    "fusion": (
        ["cadd", "cadd:fusion=concat", "cadd:fusion=reweight"],
        ["steps=16,128"],
        "MAUVE: add .24, concat .21, reweight .24",
    ),
    "loss": (["cadd", "cadd:mse=1"], ["steps=16,128"], "tokens/s a GPU: CE 47,152, CE + MSE 32,117"),
    "strength": (["cadd"], ["strength=0,0.5,1,1.5", "steps=16,128"], "not in the paper"),
    "scale": (
        [
            *("mdlm", "cadd:evidence=0.05", "cadd", "cadd:evidence=0.2"),
            *(f"cadd:continuous={schedule}" for schedule in ("linear", "cosine", "flow")),
            STRONG,
        ],
        ["steps=16,128", "zhat=hard,soft"],
        "not in the paper",
    ),
    "orders": (
        ["mdlm", "cadd"],
        ["order=random,confidence,entropy,margin", "steps=16,128"],
        "its code runs unmask by entropy, temperature 0.1, 512 steps",
    ),
}


def varied(items: list[str]) -> list[dict[str, Any]]:
    """Combine ["steps=8,32", "zhat=hard"] into [{"steps": 8, "zhat": "hard"}, {"steps": 32, "zhat": "hard"}].

    Raises InputError for an unknown field, a value of another type, and settings that `Sampling` refuses.
    """
    fields = {field.name: str(field.type) for field in dataclasses.fields(Sampling)}
    axes = []
    for item in items:
        name, _, values = item.partition("=")
        kind = TYPES[fields[choose("--vary", name, fields)]]
        try:
            axes.append([(name, kind(value)) for value in values.split(",")])
        except (ValueError, argparse.ArgumentTypeError):
            raise InputError(f"--vary {name} must be of type {kind.__name__}, not {values!r}") from None
    settings = [dict(pairs) for pairs in itertools.product(*axes)]
    for setting in settings:
        Sampling(**setting)
    return settings


def trained(job: dict[str, Any]) -> Path:
    """Return the folder of this run, trained to its last step by train_text.py.

    Raises InputError where the training fails, or the folder has a model of other settings.
    """
    if "ckpt" in job:
        return find(Path(job["ckpt"])).parent
    folder = Path(job["runs"]) / f"{job['spec']}-{job['seed']}"
    options = {name: job[name] for name in OF_TRAINING} | {"steps": job["steps"]} | job["options"]
    resume: list[str] = []
    if (folder / checkpoint.FILE).exists():
        content = checkpoint.load(folder)
        for name in options.keys() - {"steps"}:
            if str(saved := content["settings"].get(name)) != str(options[name]):
                raise InputError(f"{folder} was trained with {name} {saved}, not {options[name]}: name another --runs")
        if content["trainer"]["step"] >= options["steps"]:
            return folder
        resume = ["--resume"]
    flags = [part for name, value in options.items() for part in _flag(name, value)]
    quiet = ["--eval-every", "0", "--sample-every", "0", "--out", str(folder), "--device", job["device"]]
    done = subprocess.run([sys.executable, "train_text.py", *flags, *quiet, *resume], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise InputError(f"training {job['spec']}: {done.stderr.decode().strip().splitlines()[-1]}")
    return folder


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


def one_run(job: dict[str, Any]) -> dict[str, Any]:
    """Train one model with one seed unless it is trained, then sample and score with every setting."""
    torch.set_num_threads(1)
    folder = trained(job)
    model, tokenizer, content = load_denoiser(folder, job["device"])
    own = argparse.Namespace(dataset=None, cache=Path(job["cache"]), anyway=False)
    judge = open_judge(job["judge"], job["device"], job["judge_dtype"])
    real = cut(model, tokenizer, content, own, 2 * job["num"])
    reader = Reader(tokenizer, judge, real, model.config.rows)
    dtype = content["settings"]["dtype"]
    row = job | {"dtype": dtype, "length": model.config.length, "scores": {}, "real": reader.real_text()}
    held_out = map(Batch, real[: job["num"]].split(32))
    nats = held_out_bound(model, held_out, steps=None, repeat=4, seed=0, dtype=dtype)
    row["bound"] = summary(nats, model.config.length)
    speeds = [r["tokens_per_second"] for r in read_metrics(folder / "metrics.jsonl") if "tokens_per_second" in r]
    row["tokens_per_second"] = statistics.median(speeds)
    for setting in job["settings"]:
        if model.latent.dim == 0:
            setting = {field: value for field, value in setting.items() if field not in OF_LATENTS}
        name = ", ".join(f"{field} {value}" for field, value in setting.items())
        if name in row["scores"]:
            continue
        start = time.perf_counter()
        ids = generate.many(model, Sampling(**setting), job["num"], seed=job["seed"], dtype=dtype, batch_size=32).cpu()
        seconds = time.perf_counter() - start
        row["scores"][name] = reader.score(ids) | {"seconds": seconds / job["num"]}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as Markdown: held-out text, then a line for each model and setting, then the caption."""
    keys = [key for key in COLUMNS if key != "judge_bpc_se" and key in rows[0]["real"]]
    heads = [*(COLUMNS[key][0] for key in keys), "s a sample", "bound, nats/token", "training, tokens/s"]
    lines = ["| model | sampler | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]

    def cells(scores: list[dict[str, float]]) -> str:
        return " | ".join(spread([s[key] for s in scores], COLUMNS[key][1]) for key in keys)

    lines.append(f"| {REAL} | | {cells([rows[0]['real']])} | | | |")
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in {(row["spec"], row["seed"]): row for row in rows}.values():  # the last row of a run counts
        groups[row["spec"]].append(row)
    for spec, group in groups.items():
        bound = spread([row["bound"]["bound"] for row in group], 2)
        speed = spread([row["tokens_per_second"] for row in group], 0)
        for name in dict.fromkeys(name for row in group for name in row["scores"]):
            scores = [row["scores"][name] for row in group if name in row["scores"]]
            seconds = spread([s["seconds"] for s in scores], 2)
            lines.append(f"| {spec} ({len(scores)}) | {name} | {cells(scores)} | {seconds} | {bound} | {speed} |")
    return "\n".join([*lines, "", caption(rows)])


def parts(rows: list[dict[str, Any]]) -> str:
    """Part mdlm's bits a character as Markdown. Empty where mdlm is not there, or not with T = L and another T."""
    found = []
    for row in {(row["spec"], row["seed"]): row for row in rows}.values():
        scores = {}
        for name, score in row["scores"].items():
            settings = dict(part.split(" ", 1) for part in name.split(", ") if part)
            steps = int(settings.pop("steps", 0))
            chain = ",".join(f"{field}={value}" for field, value in settings.items()) or budget.EXACT
            scores[f"{chain} {budget.ONE if steps == row['length'] else steps}"] = {"error": score["judge_bpc"]}
        found.append(row | {"scores": scores, "true": {"error": row["real"]["judge_bpc"]}})
    masked = {name for row in found if row["spec"] == budget.MASKED for name in row["scores"]}
    if f"{budget.EXACT} {budget.ONE}" not in masked or len(masked) == 1:
        return ""
    return budget.parted("bits a character", found, LEAST)


def caption(rows: list[dict[str, Any]]) -> str:
    """Write the settings that the table's numbers depend on."""
    said = {name: ", ".join(sorted({str(row[name]) for row in rows})) for name in SAID}
    default = dataclasses.asdict(Sampling())
    for name in {name for row in rows for setting in row["settings"] for name in setting}:
        default.pop(name)
    return (
        f"(n): seeds, ± their standard deviation; each {said['num']} samples of {said['length']} tokens, "
        f"models in {said['dtype']}; judge {said['judge']} in {said['judge_dtype']}; unless varied, "
        + ", ".join(f"{name} {value}" for name, value in default.items())
        + "; the last step is a draw"
    )


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the frontiers, means over seeds. Along the curve of a model and a setting run temperature or top-p."""
    points: dict[str, dict[str, float]] = {REAL: rows[0]["real"]}
    curves: dict[str, list[str]] = defaultdict(list)
    for spec in dict.fromkeys(row["spec"] for row in rows):
        group = [row["scores"] for row in rows if row["spec"] == spec]
        for name in dict.fromkeys(name for scores in group for name in scores):
            label = ", ".join([spec, *(part for part in name.split(", ") if part.split()[0] not in SWEPT)])
            means = {k: statistics.mean(s[name][k] for s in group if name in s) for k in DRAWN}
            points[f"{spec}, {name}"] = means
            curves[label].append(f"{spec}, {name}")
    plot(points, curves, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", default=["mdlm", "cadd", "cdm"], help="models to train")
    parser.add_argument("--ckpt", nargs="+", help="trained runs to score; nothing is trained")
    parser.add_argument("--vary", nargs="+", default=["steps=8,32,128", "zhat=hard,soft"], help="fields of the sampler")
    parser.add_argument("--ablation", choices=ABLATIONS, help="sets --train and --vary")
    parser.add_argument("--dataset", type=expanded, default="sotu", help="a name or a path, as for train_text.py")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2 or chars")
    parser.add_argument("--preset", default="tiny", help="size of the networks")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the models, in training and sampling")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    parser.add_argument("--num", type=int, default=64, help="samples of each setting, and pieces of held-out text")
    parser.add_argument("--judge", type=expanded, default=SMOLLM2, help="language model that scores the texts")
    parser.add_argument("--judge-dtype", choices=DTYPES, default="float32", help="bfloat16: faster, 0.002 bits higher")
    parser.add_argument("--cache", type=expanded, default=cache_folder(), help="folder of prepared data")
    parser.add_argument("--runs", default="runs/text", help="folder in which each model and seed has its run")
    parser.add_argument("--device", default=default_device(), help="on a GPU use --jobs 1")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--out", type=as_path, help="append each run as a line of JSON")
    parser.add_argument("--table", type=as_path, help="only print the table of the runs in this file")
    parser.add_argument("--picture", type=as_path, help="draw the frontiers of bits and entropy here")
    args = parser.parse_args()
    rows = read_rows(args.table) if args.table else experiment(args)
    print(table(rows))
    if found := parts(rows):
        print(f"\n{found}")
    if args.ablation:
        print(f"\nthe paper: {ABLATIONS[args.ablation][2]}")
    if args.picture:
        picture(rows, args.picture)


def experiment(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all models with all seeds, and return their rows, seed by seed."""
    if min(args.seeds, args.num) < 1:
        raise InputError("--seeds and --num must be at least 1")
    specs, vary = ABLATIONS[args.ablation][:2] if args.ablation else (args.train, args.vary)
    if args.ckpt and args.ablation and any(":" in spec for spec in specs):
        raise InputError(f"--ablation {args.ablation} compares models that it trains: leave out --ckpt")
    shared = {k: v for k, v in vars(args).items() if k not in NOT_THE_RUNS}
    settings = varied(vary)
    if args.ckpt:
        jobs = [shared | {"spec": path, "ckpt": path, "settings": settings, "seed": 0} for path in args.ckpt]
        return run_all(one_run, jobs, args.jobs, args.out)
    jobs = []
    for seed in range(args.seeds):
        for spec in specs:
            model, options = parse(spec, preset="str")
            job = {"spec": spec, "model": model, "options": options, "settings": settings, "seed": seed}
            jobs.append(shared | job)
    return run_all(one_run, jobs, args.jobs, args.out)


if __name__ == "__main__":
    run(main)
