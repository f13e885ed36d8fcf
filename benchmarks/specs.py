"""Shared parts of the benchmarks that train models: specs of models, runs in parallel, and mean ± spread."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cadd_min.dit import Size
from cadd_min.model import MODELS, Denoiser, ModelConfig
from cadd_min.orders import HITTING, TIME_GRIDS, Sampling
from cadd_min.reverse import ZHATS
from cadd_min.sampler import reverse_chain
from cadd_min.training.trainer import TrainConfig
from cadd_min.utils.device import seeded
from cadd_min.utils.errors import InputError, choose
from cadd_min.utils.files import json_rows

# Settings of a run that all rows of a table share: they name its data, its training and its measures.
ALIKE = (
    "dataset",
    "source",
    "preset",
    "steps",
    "batch_size",
    "length",
    "samples",
    "num",
    "dtype",
    "judge",
    "judge_dtype",
    "seconds",
    "minutes",
    "threads",
    "T",
    "zhat",
    "chains",
)
OF_LATENTS = ("zhat", "num_latents", "strength")  # settings of Sampling that change nothing without latents


def boolean(text: str) -> bool:
    """Parse true or false, in any case. Raises ValueError for another text."""
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise ValueError(text) from None


def parse(spec: str, **extra: str) -> tuple[str, dict[str, Any]]:
    """Parse "cadd:hint=linear,steps=100" into ("cadd", {"hint": "linear", "steps": 100}).

    Behind the colon may stand any field of ModelConfig or TrainConfig, and the names of `extra`, which gives their
    types. Raises InputError for another model or name, or a value of another type.
    """
    model, options = options_of(spec, "--train", (ModelConfig, TrainConfig), extra)
    return choose("model", model, MODELS), options


def parse_chain(spec: str) -> tuple[str, dict[str, Any]]:
    """Parse "soft:time_grid=cosine" into ("soft", {"time_grid": "cosine"}). Raises InputError.

    Behind the colon may stand any field of Sampling but steps and zhat. The steps must be heeded.
    """
    zhat, options = options_of(spec, "--chains", (Sampling,), {"temperature": "float"})
    for name in ("steps", "zhat"):
        if name in options:
            raise InputError(f"--chains {spec}: {name} does not stand behind the colon")
    heed_steps(options)
    return choose("zhat", zhat, ZHATS), options


def heed_steps(options: dict[str, Any]) -> None:
    """Raise InputError for a time grid that takes a step for each token, whatever T a table would say."""
    if options.get("time_grid") == HITTING:
        raise InputError(f"time_grid must be one of {', '.join(TIME_GRIDS)}: {HITTING} ignores T")


def options_of(
    spec: str, argument: str, classes: tuple[type, ...], extra: dict[str, str]
) -> tuple[str, dict[str, Any]]:
    """Parse "head:name=value,..." into the head and the values: of fields of `classes`, or of `extra`'s types."""
    head, _, rest = spec.partition(":")
    fields = {f.name: f.type for c in classes for f in dataclasses.fields(c)} | extra
    kinds: dict[str, Any] = {"int": int, "float": float, "bool": boolean}
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        name, _, value = item.partition("=")
        if name not in fields:
            raise InputError(f"{argument}: {name!r} is no field of {' or '.join(c.__name__ for c in classes)}")
        try:
            options[name] = kinds.get(str(fields[name]), str)(value)
        except ValueError:
            raise InputError(f"{argument}: {name} must be of type {fields[name]}, not {value!r}") from None
    return head, options


def pop_fields(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """Remove the options that are fields of `cls` from `options`, and return them."""
    names = {f.name for f in dataclasses.fields(cls)} & options.keys()
    return {name: options.pop(name) for name in names}


def run_all(
    one_run: Callable[[dict[str, Any]], dict[str, Any]], jobs: list[dict[str, Any]], at_once: int, out: Path | None
) -> list[dict[str, Any]]:
    """Run all jobs, `at_once` at a time, and return their rows in order, with a bar of the time that is left.

    Each row is appended to `out` as JSON as soon as its run ends. If a run fails, no other begins, and the error is
    raised when those that had begun have ended: their rows are written, too. Processes are spawned: a fork of a
    process that has used torch's threads may hang.
    """
    rows: dict[int, dict[str, Any]] = {}
    error: BaseException | None = None
    running: dict[Future[dict[str, Any]], int] = {}
    waiting = list(enumerate(jobs))
    bar = tqdm(total=len(jobs), desc="runs", unit="run", leave=False)
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn"), initializer=_end_with_parent) as pool:
        while running or waiting:
            # A pool runs all that it has queued, even after an error: it gets no job before a process is free.
            while waiting and len(running) < at_once:
                n, job = waiting.pop(0)
                running[pool.submit(one_run, job)] = n
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                n = running.pop(future)
                bar.update()
                if found := future.exception():
                    error, waiting = error or found, []
                    continue
                rows[n] = row = future.result() | {"job": n}
                if out:
                    with out.open("a") as file:
                        file.write(json.dumps(row, default=str) + "\n")
    bar.close()
    if error:
        raise error
    return [rows[n] for n in range(len(jobs))]


def _end_with_parent() -> None:
    """End this process as soon as its parent has ended: nobody would get the row of its run."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows that `run_all` wrote, in the order of their jobs.

    Raises InputError for rows that cannot stand in one table, see ALIKE.
    """
    rows = [row for _, row in json_rows(path)]
    rows.sort(key=lambda row: row.get("job", 0))
    for name in ALIKE:
        values = list(dict.fromkeys(str(row[name]) for row in rows if name in row))
        if len(values) > 1:
            raise InputError(f"--table {path} has rows of different {name}, {' and '.join(values)}: they are no table")
    return rows


def draw(denoiser: Any, model: Denoiser, settings: Sampling, count: int, seed: int) -> Tensor:
    """Draw samples (count, L) of a denoiser by the reverse chain, with the table and the schedule of a model.

    256 at a time: more do not fit the cache and take twice as long.
    """
    parts = []
    for first in range(0, count, 256):
        shape = (min(256, count - first), model.config.length)
        noise = seeded(seed, 10_000 * settings.steps + first)
        chain = (denoiser, shape, model.table(), model.schedule, model.mask_id, settings)
        parts.append(reverse_chain(*chain, generator=noise))
    return torch.cat(parts)


def gpt2_config(size: Size, vocab_size: int, length: int) -> Any:
    """Make the configuration of the library's GPT-2 of this size, without dropout. Raises InputError without it."""
    try:
        from transformers import GPT2Config
    except ImportError:
        raise InputError("--models gpt2 needs transformers: pip install transformers, or leave it out") from None
    return GPT2Config(
        vocab_size=vocab_size, n_positions=length, n_embd=size.width, n_layer=size.layers, n_head=size.heads,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table as Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def spread(values: list[float], digits: int = 3) -> str:
    """Format mean ± standard deviation, or the value alone."""
    dev = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{dev}"
