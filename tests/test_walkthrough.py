"""The notebook docs/walkthrough.ipynb: each cell runs, its assertions hold, and its stored text is what it prints."""

import ast
import contextlib
import io
import json
import re

import matplotlib
import pytest

from tests.toys import ROOT

matplotlib.use("agg")
PAGE = ROOT / "docs" / "walkthrough.ipynb"
CELLS = [cell for cell in json.loads(PAGE.read_text())["cells"] if cell["cell_type"] == "code"]
NUMBER = re.compile(r"\d+\.?\d*")


def source(cell: dict) -> str:
    return "".join(cell["source"])


def stored_text(cell: dict) -> str:
    return "".join(line for out in cell["outputs"] if out["output_type"] == "stream" for line in out["text"])


def function(name: str) -> ast.FunctionDef:
    """Find a function among all cells."""
    found = [node for cell in CELLS for node in ast.walk(ast.parse(source(cell))) if isinstance(node, ast.FunctionDef)]
    return next(node for node in found if node.name == name)


def test_it_is_short_and_imports_the_paper_alone():
    """Check the number of cells and lines, and that all imports are loose files of the package or the toy source."""
    assert len(CELLS) <= 12 and PAGE.stat().st_size < 1e6
    loose = {f"cadd_min.{path.stem}" for path in (ROOT / "cadd_min").glob("*.py")} - {"cadd_min.ops"}
    allowed = loose | {"sys", "pathlib", "torch", "torch.nn.functional", "matplotlib.pyplot", "benchmarks.sources"}
    for cell in CELLS:
        for node in ast.walk(ast.parse(source(cell))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert set(names) <= allowed, names
    assert not {"Trainer", "ops"} & {node.id for cell in CELLS for node in ast.walk(ast.parse(source(cell)))
                                     if isinstance(node, ast.Name)}  # fmt: skip
    for name, most in (("train", 25), ("sample", 15)):
        assert function(name).end_lineno - function(name).lineno < most


def test_every_figure_and_text_is_stored():
    for cell in CELLS:
        kinds = [out["output_type"] for out in cell["outputs"]]
        assert ("print(" in source(cell)) == ("stream" in kinds) and ("fig.show()" in source(cell)) == (
            "display_data" in kinds
        )
        assert "assert " in source(cell) or "def train" in source(cell)


def test_the_leak_is_what_was_measured():
    """Compare the numbers of the leak's cell with the means in docs/tables/leak.md."""
    text = next(source(cell) for cell in CELLS if source(cell).startswith("leak = {"))
    shown = ast.literal_eval(text.partition("=")[2].partition("fig,")[0].strip())
    for name, rows in shown.items():
        for step, values in rows.items():
            norm, ce, bad = values
            row = re.compile(rf"\| {name} \| {step} \| {norm:.2f} ± [\d.]+ \| {ce:.3f} ± [\d.]+ \| {bad:.3f} ± ")
            assert row.search((ROOT / "docs/tables/leak.md").read_text()), (name, step)


def agrees(stored: str, printed: str) -> bool:
    """Tell whether two texts agree but for numbers, and their numbers to 0.05. Other cores add in another order."""
    values = [[float(number) for number in NUMBER.findall(text)] for text in (stored, printed)]
    same = NUMBER.sub("#", stored) == NUMBER.sub("#", printed)
    return same and all(abs(a - b) <= 0.05 + 0.05 * abs(a) for a, b in zip(*values))


def test_another_text_or_number_does_not_agree():
    """Power: the comparison of the next test notices a changed word and a changed number."""
    assert agrees("a 0.31", "a 0.33") and not agrees("a 0.31", "b 0.31") and not agrees("a 0.31", "a 0.41")


@pytest.mark.slow
def test_every_cell_runs_and_prints_what_is_stored(monkeypatch):
    """Run all cells in one process. Their own assertions hold, and what they print is what the page shows."""
    monkeypatch.chdir(PAGE.parent)
    monkeypatch.setattr("matplotlib.figure.Figure.show", lambda figure: None)
    scope: dict = {"__name__": "__main__"}
    for cell in CELLS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source(cell), "a cell", "exec"), scope)
        assert agrees(stored_text(cell), printed.getvalue()), (stored_text(cell), printed.getvalue())
        matplotlib.pyplot.close("all")
