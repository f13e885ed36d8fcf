"""The house: imports go one way, every room says what it is for, and a built wheel holds every room."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.toys import ROOT

PACKAGE = ROOT / "cadd_min"
PAPER = "the paper"  # the loose files of cadd_min/
FLOORS = (  # a room may import itself and every room of an earlier floor
    ("utils",),
    ("kernels",),
    (PAPER,),
    ("data", "baselines"),
    ("upgrade",),
    ("checkpoints",),
    ("training", "sampling"),
    ("evaluation", "codebench"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
REFERENCE = ("forward", "posterior", "loss")  # what the kernels are tested against


def modules(package: Path) -> dict[str, Path]:
    """Find every module of a package by its name without the package's."""
    files = (f for f in package.rglob("*.py") if f.name != "__init__.py")
    return {".".join(f.relative_to(package).with_suffix("").parts): f for f in files}


def room_of(module: str) -> str:
    return module.partition(".")[0] if "." in module else PAPER


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """List the package's modules that a file imports, and whether the import stands at the top of the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith(f"{PACKAGE.name}."):
                name = name.removeprefix(f"{PACKAGE.name}.")
                found = name if name in known else name.rpartition(".")[0]
                if found in known:
                    yield found, node in tree.body


def faults(package: Path) -> list[str]:
    """Say what breaks the rule of imports in a package."""
    known = modules(package)
    graph: dict[str, set[str]] = {}
    found = []
    for module, path in known.items():
        room, graph[module] = room_of(module), set()
        if room not in FLOOR:
            found.append(f"{module}: no floor for the room {room}")
            continue
        for other, top in imports(path, known):
            graph[module].add(other)
            allowed = room_of(other) == room or FLOOR[room_of(other)] < FLOOR[room]
            if not allowed or (module in REFERENCE and other == "ops"):
                found.append(f"{module} imports {other}")
            if not top:
                found.append(f"{module} imports {other} inside a function or a condition")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"a circle: {' imports '.join(error.args[1])}")
    return found


def test_imports_go_one_way():
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(
    "path, line, fault",
    [
        ("utils/errors.py", "from cadd_min.data import corpus", "utils.errors imports data.corpus"),
        ("forward.py", "from cadd_min import ops", "forward imports ops"),
        ("schedule.py", "from cadd_min import sampler", "a circle"),
        ("sampling/text.py", "from cadd_min.training import trainer", "sampling.text imports training.trainer"),
        ("evaluation/fid.py", "def f():\n    from cadd_min.utils import cli", "inside a function"),
        ("evaluation/fid.py", "if TYPE_CHECKING:\n    from cadd_min.utils import cli", "or a condition"),
        ("cellar/wine.py", "import math", "no floor for the room cellar"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, path, line, fault):
    copy = tmp_path / "cadd_min"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (copy / path).parent.mkdir(exist_ok=True)
    with (copy / path).open("a") as file:
        file.write(f"\n{line}\n")
    before = faults(PACKAGE)
    assert any(fault in one for one in faults(copy) if one not in before)


def test_every_room_is_one_docstring():
    rooms = {path.parent.name: path for path in PACKAGE.glob("*/__init__.py")}
    assert set(rooms) == set(FLOOR) - {PAPER}
    for path in rooms.values():
        body = ast.parse(path.read_text()).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{path}: a docstring and nothing else"


def test_a_built_wheel_holds_every_module(tmp_path):
    """An editable install sees the whole checkout; a wheel has what the packaging names."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("cadd_min", "setup.py", "pyproject.toml", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    for leftover in [*source.rglob("__pycache__"), *source.rglob("*.so")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    alone = {**os.environ, "CADD_BUILD": "0", "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source], check=True, env=alone
    )
    wheel = next(tmp_path.glob("*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, env=alone)
    for path in PACKAGE.rglob("*.html"):  # what is no module must be named in pyproject.toml
        assert (site / "cadd_min" / path.relative_to(PACKAGE)).is_file()
    names = [f"cadd_min.{name}" for name in modules(PACKAGE)]
    code = (
        f"import importlib, pathlib\nfor name in {names!r}:\n"
        f"    assert pathlib.Path(importlib.import_module(name).__file__).is_relative_to({str(site)!r}), name"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=alone, cwd=tmp_path)
