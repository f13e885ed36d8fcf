"""Change the code in thousands of small ways, and count the changes that the fast tests catch: python -m tests.mutants.

mutmut makes the changes, one at a time, and runs the tests that reach the changed function. pyproject.toml names the
files and the tests. mutmut leaves out every decorated function. Here a function under `torch.no_grad()` is changed as
well: the chain, the bound and the evaluation are such functions.
"""

from __future__ import annotations

import libcst
import libcst.matchers as m
from mutmut.__main__ import cli
from mutmut.mutation.file_mutation import MutationVisitor

NO_GRAD = m.FunctionDef(decorators=[m.Decorator(m.Call(func=m.Attribute(m.Name("torch"), m.Name("no_grad"))))])
CAUGHT, SURVIVED = {1, 3}, 0  # exit codes of pytest; a time-out is counted as neither


def into_no_grad() -> None:
    """Let mutmut change functions whose only decorator is torch.no_grad()."""
    skips = MutationVisitor._skip_node_and_children

    def skips_others(self: MutationVisitor, node: libcst.CSTNode) -> bool:
        return not m.matches(node, NO_GRAD) and skips(self, node)

    MutationVisitor._skip_node_and_children = skips_others


if __name__ == "__main__":
    into_no_grad()
    cli()
