"""Evaluate programs that a model writes for HumanEval or MBPP: how many pass their tests.

There are three steps, each with a file in --out: the model's answers (generations.jsonl), the programs in them
(programs.jsonl), and how the programs ended (results.jsonl). A step that is cut off goes on from its file. The third
step runs only with --execute.

python evaluate.py code --benchmark humaneval --num-samples 10 --k 1 10
python evaluate.py code --benchmark mbpp --problems mbpp.jsonl --execute
python evaluate.py code --benchmark humaneval --reference --execute     do the reference solutions pass here?
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

from cadd_min.checkpoints.load import open_model, weights_digest
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
from cadd_min.utils.cli import add_options, as_path, from_args, integer
from cadd_min.utils.device import torch_device
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import locked

Encode = Callable[[str], list[int]]  # a prompt -> its ids
Complete = Callable[[list[str], int], list[str]]  # complete(prompts, seed) -> a model's answers
GENERATIONS, PROGRAMS, RESULTS = "generations.jsonl", "programs.jsonl", "results.jsonl"
EXECUTES = (
    "runs model-written programs on this machine, each contained by Linux namespaces and limits: no network, no files "
    "but Python's own and a folder in memory, no other processes, no environment; where this is impossible, none is run"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate.py code`."""
    parser.add_argument("--benchmark", choices=["humaneval", "mbpp"], required=True)
    parser.add_argument("--problems", type=as_path, help="the file of problems (HumanEval's default: its package's)")
    parser.add_argument("--plus", action="store_true", help="add EvalPlus's tests, from --problems or from its cache")
    parser.add_argument("--split", choices=problems.SPLITS, default="test", help="of MBPP: test is task ids 11 to 510")
    parser.add_argument(
        "--shots", type=integer, default=len(problems.SHOTS), help="solved problems in a prompt of MBPP"
    )
    parser.add_argument(
        "--num-samples", type=integer, default=1, help="programs for each problem; a later run may ask for more"
    )
    parser.add_argument("--k", type=integer, nargs="+", default=[1], help="the k of pass@k")
    parser.add_argument("--out", type=as_path, help="folder (default: beside the checkpoint, of the benchmark's name)")
    parser.add_argument("--reference", action="store_true", help="test the reference solutions, no model")
    parser.add_argument("--execute", action="store_true", help=EXECUTES)
    parser.add_argument(
        "--workers", type=integer, default=os.cpu_count() or 1, help="programs that run at the same time"
    )
    add_options(parser, sandbox.Limits, "limits of a program")
    parser.add_argument("--ckpt", type=as_path, default=Path("runs"), help=generate.CKPT)
    generate.add_source_options(parser)
    parser.add_argument("--batch-size", type=integer, default=32, help="prompts at a time")
    generate.add_sampling_options(parser)
    generate.add_run_options(parser)


def check(args: argparse.Namespace) -> None:
    """Raise InputError for options that are out of range or do not go together."""
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
    """Read the problems of the benchmark that is asked for."""
    if args.plus:
        return plus.load(args.benchmark, args.problems)
    if args.benchmark == "humaneval":
        return problems.humaneval(args.problems)
    shots = 0 if args.reference else args.shots
    return problems.mbpp(args.problems, args.split, shots)


def text_model(model: Model, tokenizer: Tokenizer, encode: Encode, settings: Sampling, dtype: str) -> Complete:
    """Make complete(prompts, seed) of a model of text. settings: the sampler's settings.

    The model fills its whole length after the prompt. An answer ends before the first of `end_ids`.
    """

    def answer(row: list[int], start: int) -> str:
        """Return the text of a row's tokens from `start` to the first token that ends an answer."""
        end = next((n for n in range(start, len(row)) if row[n] in tokenizer.end_ids), len(row))
        # decoded from the beginning, because some tokenizers drop the first space of a text
        return tokenizer.decode(row[:end])[len(tokenizer.decode(row[:start])) :]

    def complete(prompts: list[str], seed: int) -> list[str]:
        """Draw an answer to each prompt."""
        masked = torch.full((len(prompts), model.config.length), tokenizer.mask_id)  # (B, L)
        encoded = [encode(prompt) for prompt in prompts]
        for row, ids in zip(masked, encoded):
            row[: len(ids)] = torch.tensor(ids)
        x = generate.samples(model, settings, len(prompts), seed=seed, dtype=dtype, prompt=masked).tolist()
        return [answer(row, len(ids)) for row, ids in zip(x, encoded)]

    return complete


def check_lengths(asked: list[Problem], encode: Encode, length: int) -> None:
    """Raise InputError where a prompt leaves no room for an answer."""
    for problem in asked:
        count = len(encode(problem.prompt))
        if count >= length:
            raise InputError(f"the prompt of {problem.task_id} has {count} tokens: the model's length is {length}")


def generations(asked: list[Problem], complete: Complete, folder: Path, args: argparse.Namespace, model: str) -> None:
    """Step 1: write the model's answers to generations.jsonl.

    The batches and their seeds do not depend on where an earlier run was cut off, so the answers do not either.
    """
    prompts = {problem.task_id: problem.prompt for problem in asked}
    settle(folder, GENERATIONS, {"benchmark": args.benchmark, "prompts": digest(prompts), "model": model})
    keys = wanted(asked, args.num_samples)
    batches = [keys[first : first + args.batch_size] for first in range(0, len(keys), args.batch_size)]
    with Journal(folder / GENERATIONS) as written, tqdm(total=len(keys), desc="generation", unit="answer") as bar:
        for index, batch in enumerate(batches):
            missing = written.missing(batch)
            if missing:
                seed = int(np.random.SeedSequence((args.seed, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))
                texts = dict(zip(batch, complete([prompts[task] for task, _ in batch], seed)))
                for key in missing:
                    written.add(key, text=texts[key])
            bar.update(len(batch))


def wanted(asked: list[Problem], count: int) -> list[Key]:
    """List the keys of the samples: first the first sample of every problem, then the second, and so on.

    So a later run that asks for more samples only appends to the list.
    """
    return [(problem.task_id, sample) for sample in range(count) for problem in asked]


def digest(texts: dict[str, str]) -> str:
    """Return a checksum of texts by name, 16 hexadecimal digits."""
    return hashlib.sha256(repr(sorted(texts.items())).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def programs(asked: list[Problem], folder: Path, count: int) -> None:
    """Step 2: extract the program from each answer, to programs.jsonl."""
    by_id = {problem.task_id: problem for problem in asked}
    settle(folder, PROGRAMS, {"solutions": "of a model"})
    with Journal(folder / GENERATIONS) as written, Journal(folder / PROGRAMS) as extracted:
        for key in tqdm(extracted.missing(wanted(asked, count)), desc="extraction", unit="program", leave=False):
            extracted.add(key, program=extract(str(written.rows[key].get("text")), by_id[key[0]]))


def references(asked: list[Problem], folder: Path) -> None:
    """Write the reference solutions to programs.jsonl, in place of steps 1 and 2."""
    solutions = {problem.task_id: problem.solution for problem in asked}
    settle(folder, PROGRAMS, {"solutions": f"of the reference ({digest(solutions)})"})
    with Journal(folder / PROGRAMS) as extracted:
        for key in extracted.missing(wanted(asked, 1)):
            extracted.add(key, program=solutions[key[0]])


def results(asked: list[Problem], folder: Path, args: argparse.Namespace) -> dict[Key, sandbox.Outcome]:
    """Step 3: run the programs that have no result yet. Returns the outcomes of all, from results.jsonl."""
    tests = {problem.task_id: problem.tests for problem in asked}
    limits = from_args(sandbox.Limits, args)
    settle(folder, RESULTS, {"tests": digest(tests), **dataclasses.asdict(limits)})
    keys = wanted(asked, args.num_samples)
    with Journal(folder / PROGRAMS) as extracted, Journal(folder / RESULTS) as ended:
        missing = ended.missing(keys)
        with (
            sandbox.opened(limits) as run,
            tqdm(total=len(keys), initial=len(keys) - len(missing), desc="execution") as bar,
        ):
            pool = ThreadPoolExecutor(args.workers)
            try:
                jobs = {pool.submit(run, str(extracted.rows[k].get("program")), tests[k[0]]): k for k in missing}
                for job in as_completed(jobs):
                    ended.add(jobs[job], **dataclasses.asdict(job.result()))
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)
        return {key: outcome(ended.rows[key], folder / RESULTS) for key in keys}


def outcome(row: dict[str, object], path: Path) -> sandbox.Outcome:
    """Read an outcome from a row of results.jsonl. Raises InputError where the row has no outcome."""
    status, detail, seconds = (row.get(name) for name in ("status", "detail", "seconds"))
    if status not in sandbox.STATUSES or not isinstance(detail, str) or not isinstance(seconds, int | float):
        raise InputError(f"{path} is damaged: it has no outcome of {row['task_id']}, sample {row['sample']}")
    return sandbox.Outcome(str(status), detail, seconds)


def assess(asked: list[Problem], complete: Complete | None, model: str, folder: Path, args: argparse.Namespace) -> str:
    """Run all steps in a folder. Returns the table of pass@k and the number of programs of each status.

    complete: writes the answers; None takes the reference solutions instead. model: a line with the model and its
    settings. A folder holds the answers under one such line only. Without --execute the programs are not run, and the
    text says where they are. Raises InputError where another process works in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def refuse() -> None:
        raise InputError(f"another process works in {folder}: wait for its end, or give another --out")

    with locked(folder, refuse):
        return _assess(asked, complete, model, folder, args)


def _assess(asked: list[Problem], complete: Complete | None, model: str, folder: Path, args: argparse.Namespace) -> str:
    if complete is None:
        references(asked, folder)
    else:
        generations(asked, complete, folder, args, model)
        programs(asked, folder, args.num_samples)
    count = len(asked) * args.num_samples
    name = f"{args.benchmark}{' with EvalPlus' if args.plus else ''}, {len(asked)} problems, {args.num_samples} each"
    if not args.execute:
        return f"{name}: {count} programs in {folder / PROGRAMS}, none of them run\n--execute {EXECUTES}"
    outcomes = results(asked, folder, args)
    passed = dict.fromkeys((problem.task_id for problem in asked), 0)
    for (task, _), ended in outcomes.items():
        passed[task] += ended.status == "passed"
    lines = [f"{name}: {counted(ended.status for ended in outcomes.values())}"]
    if complete is None:
        failures = [(task, ended) for (task, _), ended in outcomes.items() if ended.status != "passed"]
        lines += [f"{task}: {ended.status}, {ended.detail}" for task, ended in failures]
    limits = ", ".join(
        f"{name} {value:g}" for name, value in dataclasses.asdict(from_args(sandbox.Limits, args)).items()
    )
    scores = table(passed, args.num_samples, args.k)
    return "\n\n".join([scores, "\n".join(lines), f"{model}; {limits}; in {folder}"])


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
    weights = weights_digest(model)[:12]  # a file of this name may hold other weights tomorrow
    described = f"model {model.config.model} at step {content['trainer']['step']} ({path}, weights {weights}), "
    described += f"{generate.describe(args, [model.config.model])}{chat}"
    complete = text_model(model, codec, encode, generate.sampling(args), args.dtype)
    parent = Path(path.name) if args.source else path.parent
    folder = args.out or parent / f"{args.benchmark}{'-plus' if args.plus else ''}"
    print(assess(asked, complete, f"{described}, batches of {args.batch_size}", folder, args))
