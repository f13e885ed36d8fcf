"""evaluate.py code: programs that a model writes for HumanEval or MBPP, and how many of them pass their tests.

Three steps, each a file in --out: what the model wrote (generations.jsonl), the programs in it (programs.jsonl), how
they ended (results.jsonl). Each goes on where it was cut off, and the last runs only with --execute.

python evaluate.py code --benchmark humaneval --num-samples 10 --k 1 10
python evaluate.py code --benchmark mbpp --problems mbpp.jsonl --execute
python evaluate.py code --benchmark humaneval --reference --execute     the reference solutions: do all pass here?
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cadd_min.checkpoints.load import open_model
from cadd_min.codebench import evalplus as plus
from cadd_min.codebench import problems, sandbox
from cadd_min.codebench.journal import Journal, Key, settle
from cadd_min.codebench.problems import Problem
from cadd_min.codebench.scores import counted, extract, table
from cadd_min.data.hf_tokenizer import prompt_ids
from cadd_min.data.tokenizer import Tokenizer
from cadd_min.model import Model
from cadd_min.orders import Sampling
from cadd_min.sampling import generate
from cadd_min.utils.cli import add_options, from_args, whole
from cadd_min.utils.device import torch_device
from cadd_min.utils.errors import InputError

Encode = Callable[[str], list[int]]  # ids of a prompt
Complete = Callable[[list[str], int], list[str]]  # complete(prompts, seed): what a model writes after each
GENERATIONS, PROGRAMS, RESULTS = "generations.jsonl", "programs.jsonl", "results.jsonl"
EXECUTES = (
    "runs model-written programs on this machine, each contained by Linux namespaces and limits: no network, no files "
    "but Python's own and a folder in memory, no other processes, no environment; where this cannot be had, none is run"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate.py code`."""
    parser.add_argument("--benchmark", choices=["humaneval", "mbpp"], required=True)
    parser.add_argument("--problems", type=Path, help="the file of MBPP; of HumanEval, one instead of its package's")
    parser.add_argument(
        "--plus", action="store_true", help="with EvalPlus's tests in addition: --problems, or its cache"
    )
    parser.add_argument("--split", choices=problems.SPLITS, default="test", help="of MBPP: test is task ids 11 to 510")
    parser.add_argument("--shots", type=whole, default=len(problems.SHOTS), help="MBPP's solved problems in a prompt")
    parser.add_argument(
        "--num-samples", type=whole, default=1, help="programs for each problem; more may be asked later"
    )
    parser.add_argument("--k", type=whole, nargs="+", default=[1], help="of pass@k")
    parser.add_argument("--out", type=Path, help="folder (default: one beside the checkpoint, by the benchmark's name)")
    parser.add_argument("--reference", action="store_true", help="the reference solutions instead of a model's")
    parser.add_argument("--execute", action="store_true", help=EXECUTES)
    parser.add_argument("--workers", type=whole, default=os.cpu_count() or 1, help="programs that run at a time")
    add_options(parser, sandbox.Limits, "limits of a program")
    parser.add_argument("--ckpt", type=Path, default=Path("runs"), help=generate.CKPT)
    generate.add_source_options(parser)
    parser.add_argument("--batch-size", type=whole, default=32, help="prompts at a time")
    generate.add_sampling_options(parser)
    generate.add_run_options(parser)


def check(args: argparse.Namespace) -> None:
    """Options out of range, and those that do not go together."""
    for name in ("num_samples", "workers", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if not 0 <= args.shots <= len(problems.SHOTS):
        raise InputError(f"--shots must be from 0 to {len(problems.SHOTS)}, not {args.shots}")
    if args.reference and args.num_samples > 1:
        raise InputError(f"--num-samples must be 1, not {args.num_samples}: a problem has one reference solution")
    for k in args.k:
        if not 1 <= k <= args.num_samples:
            raise InputError(f"--k must be from 1 to --num-samples {args.num_samples}, not {k}")
    from_args(sandbox.Limits, args)
    args.zhat = args.zhat or "hard"
    generate.sampling(args)


def load(args: argparse.Namespace) -> list[Problem]:
    """The problems that are asked for."""
    if args.plus:
        return plus.load(args.benchmark, args.problems)
    if args.benchmark == "humaneval":
        return problems.humaneval(args.problems)
    shots = 0 if args.reference else args.shots
    return problems.mbpp(args.problems, args.split, shots)


def text_model(model: Model, tokenizer: Tokenizer, encode: Encode, how: Sampling, dtype: str) -> Complete:
    """A model of text: it fills all of its length after the prompt, and is read up to the first end of a text."""

    def answer(row: list[int], start: int) -> str:
        end = [*row, tokenizer.eot_id].index(tokenizer.eot_id, start)
        return tokenizer.decode(row[:end])[len(tokenizer.decode(row[:start])) :]  # some drop a text's first space

    def complete(prompts: list[str], seed: int) -> list[str]:
        given = torch.full((len(prompts), model.config.length), tokenizer.mask_id)
        coded = [encode(prompt) for prompt in prompts]
        for row, ids in zip(given, coded):
            row[: len(ids)] = torch.tensor(ids)
        x = generate.samples(model, how, len(prompts), seed=seed, dtype=dtype, prompt=given).tolist()
        return [answer(row, len(ids)) for row, ids in zip(x, coded)]

    return complete


def check_lengths(asked: list[Problem], encode: Encode, length: int) -> None:
    """Raises InputError where a prompt leaves no room for an answer."""
    for problem in asked:
        count = len(encode(problem.prompt))
        if count >= length:
            raise InputError(f"the prompt of {problem.task_id} has {count} tokens: the model's length is {length}")


def generations(asked: list[Problem], complete: Complete, folder: Path, args: argparse.Namespace, model: str) -> None:
    """Step 1: an answer to each prompt. Batches and their seeds are the same wherever it was cut off before."""
    prompts = {problem.task_id: problem.prompt for problem in asked}
    settle(folder, GENERATIONS, {"benchmark": args.benchmark, "prompts": digest(prompts), "model": model})
    keys = wanted(asked, args.num_samples)
    batches = [keys[first : first + args.batch_size] for first in range(0, len(keys), args.batch_size)]
    with Journal(folder / GENERATIONS) as written, tqdm(total=len(keys), desc="generation", unit="answer") as bar:
        for index, batch in enumerate(batches):
            left = written.missing(batch)
            if left:
                seed = int(np.random.SeedSequence((args.seed, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))
                texts = dict(zip(batch, complete([prompts[task] for task, _ in batch], seed)))
                for key in left:
                    written.add(key, text=texts[key])
            bar.update(len(batch))


def wanted(asked: list[Problem], count: int) -> list[Key]:
    """Every problem's first sample, then every second: a later run may ask for more."""
    return [(problem.task_id, sample) for sample in range(count) for problem in asked]


def digest(texts: dict[str, str]) -> str:
    """16 hex digits of texts by name."""
    return hashlib.sha256(repr(sorted(texts.items())).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def programs(asked: list[Problem], folder: Path, count: int) -> None:
    """Step 2: the program in each answer."""
    by_name = {problem.task_id: problem for problem in asked}
    settle(folder, PROGRAMS, {"solutions": "of a model"})
    with Journal(folder / GENERATIONS) as written, Journal(folder / PROGRAMS) as extracted:
        for key in tqdm(extracted.missing(wanted(asked, count)), desc="extraction", unit="program", leave=False):
            extracted.add(key, program=extract(str(written.rows[key].get("text")), by_name[key[0]]))


def references(asked: list[Problem], folder: Path) -> None:
    """Steps 1 and 2 of the reference solutions."""
    solutions = {problem.task_id: problem.solution for problem in asked}
    settle(folder, PROGRAMS, {"solutions": f"of the reference ({digest(solutions)})"})
    with Journal(folder / PROGRAMS) as extracted:
        for key in extracted.missing(wanted(asked, 1)):
            extracted.add(key, program=solutions[key[0]])


def results(asked: list[Problem], folder: Path, args: argparse.Namespace) -> dict[Key, sandbox.Outcome]:
    """Step 3: run what has not been run, and how all of them ended."""
    tests = {problem.task_id: problem.tests for problem in asked}
    limits = from_args(sandbox.Limits, args)
    settle(folder, RESULTS, {"tests": digest(tests), **dataclasses.asdict(limits)})
    keys = wanted(asked, args.num_samples)
    with Journal(folder / PROGRAMS) as extracted, Journal(folder / RESULTS) as ended:
        left = ended.missing(keys)
        with (
            sandbox.opened(limits) as run,
            tqdm(total=len(keys), initial=len(keys) - len(left), desc="execution") as bar,
        ):
            pool = ThreadPoolExecutor(args.workers)
            try:
                jobs = {pool.submit(run, str(extracted.rows[k].get("program")), tests[k[0]]): k for k in left}
                for job in as_completed(jobs):
                    ended.add(jobs[job], **dataclasses.asdict(job.result()))
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)
        return {key: outcome(ended.rows[key], folder / RESULTS) for key in keys}


def outcome(row: dict[str, object], path: Path) -> sandbox.Outcome:
    """A row of results.jsonl. Raises InputError where it is none."""
    status, detail, seconds = (row.get(name) for name in ("status", "detail", "seconds"))
    if status not in sandbox.STATUSES or not isinstance(detail, str) or not isinstance(seconds, int | float):
        raise InputError(f"{path} is damaged: it has no outcome of {row['task_id']}, sample {row['sample']}")
    return sandbox.Outcome(str(status), detail, seconds)


def assess(asked: list[Problem], complete: Complete | None, model: str, folder: Path, args: argparse.Namespace) -> str:
    """All steps, and the table. complete: writes the answers, or None for the reference solutions.

    model: which that is and how it samples; a folder holds the answers of one.
    """
    if complete is None:
        references(asked, folder)
    else:
        generations(asked, complete, folder, args, model)
        programs(asked, folder, args.num_samples)
    count = len(asked) * args.num_samples
    name = f"{args.benchmark}{' with EvalPlus' if args.plus else ''}, {len(asked)} problems, {args.num_samples} each"
    if not args.execute:
        return f"{name}: {count} programs in {folder / PROGRAMS}, none of them run\n--execute {EXECUTES}"
    found = results(asked, folder, args)
    passed = dict.fromkeys((problem.task_id for problem in asked), 0)
    for (task, _), one in found.items():
        passed[task] += one.status == "passed"
    lines = [table(passed, args.num_samples, args.k), f"{name}: {counted(one.status for one in found.values())}"]
    if complete is None:
        lines += [f"{task}: {one.status}, {one.detail}" for (task, _), one in found.items() if one.status != "passed"]
    limits = ", ".join(
        f"{name} {value:g}" for name, value in dataclasses.asdict(from_args(sandbox.Limits, args)).items()
    )
    return "\n\n".join(["\n".join(lines[:1]), "\n".join(lines[1:]), f"{model}; {limits}; in {folder}"])


def main(args: argparse.Namespace) -> None:
    """Run `evaluate.py code` with these arguments. Raises InputError."""
    check(args)
    asked = load(args)
    if args.reference:
        print(assess(asked, None, "reference solutions", args.out or Path(f"{args.benchmark}-reference"), args))
        return
    device = torch_device(args.device)
    model, codec, content, path = open_model(args.ckpt, device, args.source, args.length, args.mask_token)
    if not isinstance(codec, Tokenizer):
        raise InputError(f"code is for models of text, and --ckpt {args.ckpt} is one of images")
    encode = prompt_ids(codec, args.chat)
    args.dtype = generate.dtype_of(args.dtype, content)
    check_lengths(asked, encode, model.config.length)
    chat = ", chat" if args.chat else ""
    said = f"model {model.config.model} at step {content['trainer']['step']} ({path}), "
    said += f"{generate.settings(args, [model.config.model])}{chat}"
    complete = text_model(model, codec, encode, generate.sampling(args), args.dtype)
    place = Path(path.name) if args.source else path.parent
    folder = args.out or place / f"{args.benchmark}{'-plus' if args.plus else ''}"
    print(assess(asked, complete, f"{said}, batches of {args.batch_size}", folder, args))
