"""The fixtures that several tests share."""

from __future__ import annotations

import os
import runpy
import shlex
import sys

import pytest
import torch

from tests.toys import ROOT

os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network, whether there is one or not


@pytest.fixture(autouse=True)
def _one_thread_per_test() -> None:
    """Two cores and small tensors: threads cost more than they give."""
    torch.set_num_threads(1)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run a script in this process: call("sample.py --zhat soft") -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def run(command: str) -> tuple[int, str, str]:
        script, *arguments = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question. " * 2000)
    return path


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The fuzzers' files, built once; each case has a copy of its own."""
    from tests.scripts.fuzzing import World

    return World(tmp_path_factory.mktemp("fuzz"))
