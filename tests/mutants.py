"""Change the code in thousands of small ways, one at a time, and count the changes that the fast tests catch.

    make mutants                     run all, then print the score of each file and what no test caught
    python tests/mutants.py NAME...  run some: cadd_min.loss*, say. See mutmut's own documentation

mutmut changes the files that pyproject.toml names, and runs the tests that reach the changed function. It leaves out
every decorated function. Here it also changes those under `torch.no_grad()`: the chain, the bound, the evaluation.
docs/mutants.md says of each change that no test catches why that is so.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import libcst
import libcst.matchers as m
from mutmut.__main__ import cli
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import MutationVisitor

NO_GRAD = m.FunctionDef(decorators=[m.Decorator(m.Call(func=m.Attribute(m.Name("torch"), m.Name("no_grad"))))])
MISSED = {0: "no test fails", 33: "no test reaches it", None: "not run"}  # by the exit code; other codes: caught
PAGE = Path("docs/mutants.md")


def change_no_grad_functions() -> None:
    """Let mutmut change a function whose only decorator is torch.no_grad()."""
    skips = MutationVisitor._skip_node_and_children

    def skips_others(self: MutationVisitor, node: libcst.CSTNode) -> bool:
        return not m.matches(node, NO_GRAD) and skips(self, node)

    MutationVisitor._skip_node_and_children = skips_others  # type: ignore[method-assign]


def changed_lines(name: str, path: Path) -> str:
    """Describe a change in one line: the function, the old code, an arrow, the new code."""
    diff = get_diff_for_mutant(name, path=path).splitlines()[2:]
    old, new = (" ".join(line[1:].strip() for line in diff if line[0] == sign) for sign in "-+")
    function = name.rpartition(".")[2].removeprefix("x_").split("__mutmut_")[0].replace("xǁ", "").replace("ǁ", ".")
    return f"{function}: `{old}` → `{new}`"


def missed(meta: Path) -> Iterator[tuple[str, str]]:
    """Yield each change of a file that no test caught, in one line, and why no test caught it."""
    source = meta.relative_to("mutants").with_suffix("")
    for name, code in json.loads(meta.read_text())["exit_code_by_key"].items():
        if code in MISSED:
            yield changed_lines(name, source), MISSED[code]


def report() -> int:
    """Print the score of each file, and every change that is neither caught nor explained. Returns their number."""
    explained, unexplained = PAGE.read_text() if PAGE.exists() else "", []
    print(f"{'file':32}{'changes':>8}{'caught':>8}{'score':>8}{'without equivalent changes':>30}")
    for meta in sorted(Path("mutants").rglob("*.meta")):
        codes = Counter(json.loads(meta.read_text())["exit_code_by_key"].values())
        if not codes:
            continue
        lines, total = list(missed(meta)), sum(codes.values())
        same = sum(f"| {line} | equivalent" in explained for line, _ in lines)
        caught = total - len(lines)
        source = str(meta.relative_to("mutants/cadd_min").with_suffix(""))
        print(f"{source:32}{total:8}{caught:8}{caught / total:8.1%}{caught / max(1, total - same):30.1%}")
        unexplained += [f"{source} {line}: {why}" for line, why in lines if f"| {line} |" not in explained]
    print(*unexplained, f"{len(unexplained)} changes are neither caught nor explained in {PAGE}", sep="\n")
    return len(unexplained)


if __name__ == "__main__":
    change_no_grad_functions()
    if sys.argv[1:] != ["report"]:
        cli(["run", "--max-children", "2", *sys.argv[1:]], standalone_mode=False)
    sys.exit(min(1, report()))
