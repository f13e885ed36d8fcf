"""What the benchmarks that train models share: a model and its settings in one word, many runs, mean ± spread."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from cadd_min.model import MODELS, ModelConfig
from cadd_min.training.trainer import TrainConfig
from cadd_min.utils.errors import InputError, choose


def parse(spec: str, **more: str) -> tuple[str, dict[str, Any]]:
    """ "cadd:hint=linear,steps=100" -> ("cadd", {"hint": "linear", "steps": 100}).

    Behind the colon may stand any field of ModelConfig or TrainConfig, and `more` names with their types.
    """
    model, _, rest = spec.partition(":")
    fields = {f.name: f.type for c in (ModelConfig, TrainConfig) for f in dataclasses.fields(c)} | more
    kinds: dict[str, Any] = {"int": int, "float": float, "bool": lambda v: v == "True"}
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        name, _, value = item.partition("=")
        if name not in fields:
            raise InputError(f"--train: {name!r} is no field of ModelConfig or TrainConfig")
        try:
            options[name] = kinds.get(str(fields[name]), str)(value)
        except ValueError:
            raise InputError(f"--train: {name} must be of type {fields[name]}, not {value!r}") from None
    return choose("model", model, MODELS), options


def pop_fields(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """Take the options that are fields of `cls` out of `options`."""
    names = {f.name for f in dataclasses.fields(cls)} & options.keys()
    return {name: options.pop(name) for name in names}


def run_all(
    one_run: Callable[[dict[str, Any]], dict[str, Any]], jobs: list[dict[str, Any]], at_once: int, out: Path | None
) -> list[dict[str, Any]]:
    """The rows of all jobs, in their order, each a line of JSON in `out` as soon as it is there."""
    rows = []
    with ProcessPoolExecutor(at_once) as pool:
        for row in pool.map(one_run, jobs):
            rows.append(row)
            if out:
                with out.open("a") as file:
                    file.write(json.dumps(row, default=str) + "\n")
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What `run_all` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def spread(values: list[float], digits: int = 3) -> str:
    """mean ± standard deviation."""
    dev = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{dev}"
