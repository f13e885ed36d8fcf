"""EvalPlus's tests (Liu et al. 2023): many more inputs for each problem. The reference solution gives the answers.

The package evalplus downloads the file of inputs once. For MBPP the package also has the inputs' types, which JSON
loses, and rules for which outputs count as equal. Its executor is not used.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cadd_min.codebench import problems
from cadd_min.codebench.problems import Problem
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import cache_folder

FILES = {"humaneval": "HumanEvalPlus-v*.jsonl", "mbpp": "MbppPlus-v*.jsonl"}
GETTERS = {"humaneval": "get_human_eval_plus", "mbpp": "get_mbpp_plus"}
STOPS = {"humaneval": problems.STOPS, "mbpp": ("\nassert ", '\n"""', "\nif ", "\nprint(")}

# The tests of one problem, a program. The tolerance is EvalPlus's. `judged` is the expression that accepts `found`.
TESTS = """
def _evalplus():
    import copy, math
    inf, nan, reference = math.inf, math.nan, {{}}
    def near(found, expected, atol):
        if type(expected) in (list, tuple):
            alike = type(found) is type(expected) and len(found) == len(expected)
            return alike and all(near(*pair, atol) for pair in zip(found, expected))
        if found == expected or type(expected) is not float:
            return found == expected
        return abs(found - expected) <= (atol or 1e-6) + 1e-7 * abs(expected)
    exec({solution!r}, reference)
    {oracles}
    for given in {inputs!r}:
        expected = reference[{entry!r}](*copy.deepcopy(given))
        found = {entry}(*copy.deepcopy(given))
        assert {judged}, given
_evalplus()
"""
NEAR = "near(found, expected, {atol!r})"
FIND_ZERO = "abs(reference['poly'](*given, found)) <= {atol!r}"  # a polynomial has many roots, and any will do


def data_file(benchmark: str) -> Path:
    """Find the newest file of this benchmark in evalplus's cache. Raises InputError that says how to get it."""
    cache = Path(os.path.expanduser(cache_folder("evalplus")))
    files = sorted(cache.glob(FILES[benchmark]))
    if not files:
        raise InputError(
            f"EvalPlus's tests are not in {cache}: pip install evalplus, and let it download them once by "
            f'python -c "import evalplus.data as d; d.{GETTERS[benchmark]}()"; or name the file by --problems'
        )
    return files[-1]


def load(benchmark: str, path: Path | None = None) -> list[Problem]:
    """Read the problems of HumanEval+ or MBPP+ from a file, or from evalplus's cache. Raises InputError."""
    path = path or data_file(benchmark)
    wanted: dict[str, type] = dict.fromkeys(("task_id", "prompt", "entry_point", "canonical_solution"), str)
    wanted |= {"base_input": list, "plus_input": list}
    parse = _humaneval if benchmark == "humaneval" else _mbpp
    return problems.unique(problems.load(path, parse, wanted), path)


def _humaneval(row: dict[str, Any]) -> Problem:
    judged = FIND_ZERO if row["entry_point"] == "find_zero" else NEAR
    return _problem(row, "humaneval", [*row["base_input"], *row["plus_input"]], judged)


def _mbpp(row: dict[str, Any]) -> Problem:
    try:
        from evalplus.data.mbpp import mbpp_deserialize_inputs
        from evalplus.eval import _special_oracle
    except ImportError:
        raise InputError(
            "the types of MBPP+'s inputs are in a package that is not installed: pip install evalplus"
        ) from None
    entry = row["entry_point"]
    parts = ("base_input", "plus_input")
    inputs = [given for part in parts for given in mbpp_deserialize_inputs(row["task_id"], row[part])]
    judged = {
        "are_equivalent": "True",
        "sum_div": "found in (expected, 0)",
        "surface_Area": f"{NEAR} or abs(found - _surface_Area(*given)) <= {{atol!r}}",
        "digit_distance_nums": "found in (expected, _digit_distance_nums(*given))",
        **dict.fromkeys(_special_oracle.MBPP_OUTPUT_SET_EQ_TASKS, "set(found) == set(expected)"),
        **dict.fromkeys(_special_oracle.MBPP_OUTPUT_NOT_NONE_TASKS, "bool(found) == bool(expected)"),
    }
    oracles = Path(_special_oracle.__file__).read_text(encoding="utf-8")
    return _problem(row, "mbpp", inputs, judged.get(entry, NEAR), oracles)


def _problem(row: dict[str, Any], benchmark: str, inputs: list[Any], judged: str, oracles: str = "") -> Problem:
    solution, entry = row["prompt"] + row["canonical_solution"], row["entry_point"]
    tests = TESTS.format(
        solution=solution, oracles=f"exec({oracles!r}, globals())", inputs=inputs, entry=entry,
        judged=judged.format(atol=row.get("atol") or 0),
    )  # fmt: skip
    return Problem(row["task_id"], row["prompt"], tests, entry, solution, True, STOPS[benchmark])
