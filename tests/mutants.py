"""Change the code in thousands of small ways, one at a time, and count the changes that the fast tests catch.

    make mutants                     run all, then print the score of each file and what no test caught
    python tests/mutants.py NAME...  run some: cadd_min.loss*, say. See mutmut's own documentation

mutmut changes the files that pyproject.toml names, and runs the tests that reach the changed function. It leaves out
every decorated function. Here it also changes those under `torch.no_grad()`: the chain, the bound, the evaluation.
docs/mutants.md lists each change that no test catches, under a heading that says why.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import libcst
import libcst.matchers as m
from mutmut.__main__ import cli
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import MutationVisitor
from mutmut.runners.harness import PytestRunner
from mutmut.state import state

NO_GRAD = m.FunctionDef(decorators=[m.Decorator(m.Call(func=m.Attribute(m.Name("torch"), m.Name("no_grad"))))])
MISSED = {0: "", 33: " (no test reaches it)", None: " (not run)"}  # by the exit code; all other codes: caught
PARTS = (0, 10, 50, 200)  # where the list of tests is cut
LONGEST = 1.0  # seconds of a test: what no faster test catches is not counted as caught
PAGE = Path("docs/mutants.md")


def change_no_grad_functions() -> None:
    """Let mutmut change a function whose only decorator is torch.no_grad()."""
    skips = MutationVisitor._skip_node_and_children

    def skips_others(self: MutationVisitor, node: libcst.CSTNode) -> bool:
        return not m.matches(node, NO_GRAD) and skips(self, node)

    MutationVisitor._skip_node_and_children = skips_others  # type: ignore[method-assign]


def run_fastest_first() -> None:
    """Let mutmut run the tests that reach a change in the order of their time, and none beyond LONGEST but the first.

    mutmut's own order is by chance where a server forks its processes. pytest takes a second to find 800 tests, so it
    gets a few at a time: most changes are caught by the first.
    """
    run_tests = PytestRunner.run_tests

    def in_order(self: PytestRunner, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        if mutant_name is None:  # all tests, on the code as it is
            return run_tests(self, mutant_name=mutant_name, tests=tests)
        seconds = state().duration_by_test
        names = sorted(tests, key=seconds.__getitem__)
        some = names[:1] + [name for name in names[1:] if seconds[name] < LONGEST]
        parts = [some[start:end] for start, end in itertools.pairwise((*PARTS, None))]
        codes = (run_tests(self, mutant_name=mutant_name, tests=part) for part in parts if part)
        return next((code for code in codes if code), 0)

    PytestRunner.run_tests = in_order  # type: ignore[method-assign]


def changed_lines(name: str, path: Path) -> str:
    """Describe a change in one line: the function, the old code, an arrow, the new code."""
    diff = get_diff_for_mutant(name, path=path).splitlines()[2:]
    old, new = (" ".join(line[1:].strip() for line in diff if line[0] == sign) for sign in "-+")
    function = name.rpartition(".")[2].removeprefix("x_").split("__mutmut_")[0].replace("xǁ", "").replace("ǁ", ".")
    return f"{function}: `{old}` → `{new}`"


def missed(meta: Path) -> Iterator[str]:
    """Yield each change of a file that no test caught, in one line."""
    source = meta.relative_to("mutants").with_suffix("")
    for name, code in json.loads(meta.read_text())["exit_code_by_key"].items():
        if code in MISSED:
            yield f"{source.relative_to('cadd_min')} {changed_lines(name, source)}{MISSED[code]}"


def explanations() -> dict[str, str]:
    """Read docs/mutants.md: the heading over each line that begins with a dash."""
    heading, found = "", {}
    for line in PAGE.read_text().splitlines() if PAGE.exists() else ():
        if line.startswith("#"):
            heading = line.strip("# ")
        elif line.startswith("- "):
            found[line[2:]] = heading
    return found


def report() -> int:
    """Print the score of each file, and every change that is neither caught nor explained. Returns their number."""
    explained, unexplained = explanations(), []
    print(f"{'file':24}{'changes':>8}{'equivalent':>11}{'caught':>8}{'score':>8}")
    for meta in sorted(Path("mutants").rglob("*.meta")):
        total = len(json.loads(meta.read_text())["exit_code_by_key"])
        if total == 0:
            continue
        lines = list(missed(meta))
        same = sum(explained.get(line, "").startswith("Equivalent") for line in lines)
        caught, source = total - len(lines), str(meta.relative_to("mutants/cadd_min").with_suffix(""))
        print(f"{source:24}{total:8}{same:11}{caught:8}{caught / max(1, total - same):8.1%}")
        unexplained += [line for line in lines if line not in explained]
    print(*unexplained, f"{len(unexplained)} changes are neither caught nor explained in {PAGE}", sep="\n")
    return len(unexplained)


if __name__ == "__main__":
    change_no_grad_functions()
    run_fastest_first()
    if sys.argv[1:] != ["report"]:
        cli(["run", "--max-children", "2", *sys.argv[1:]], standalone_mode=False)
    sys.exit(min(1, report()))
