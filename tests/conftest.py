"""Shared by the tests: seeds, one p-value for every statistical test, small models."""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

from cadd_min.checkpoints import file as checkpoint
from cadd_min.dit import Size
from cadd_min.model import Denoiser, ModelConfig

os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network, whether there is one or not
ROOT = Path(__file__).parent.parent
ALPHA = 1e-4  # a correct implementation fails a statistical check at one seed in 10,000; the seeds are fixed
NANO = Size(layers=2, width=32, heads=2, cond=32)
TINY = "--preset nano --length 16 --vocab-size 300 --batch-size 4 --steps 4 --eval-every 2 --sample-every 4"


@pytest.fixture(autouse=True)
def _one_thread_per_test() -> None:
    """Two cores and small tensors: threads cost more than they give."""
    torch.set_num_threads(1)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nano(model: str = "cadd", vocab_size: int = 11, length: int = 12, seed: int = 0, **options: object) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(ModelConfig(vocab_size, length, NANO, model=model, **options))  # type: ignore[arg-type]


def save_untrained(path: Path, config: ModelConfig, spec: dict[str, object], **settings: object) -> Path:
    """A checkpoint of a model that has learned nothing, for text or images by its codec's spec."""
    state = {"ema": Denoiser(config).state_dict(), "step": 1}
    content = {"model_config": checkpoint.model_dict(config), "tokenizer": spec, "trainer": state, "settings": settings}
    checkpoint.save(path, content)
    return path


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run a script in this process: call("sample.py --zhat soft") -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

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
