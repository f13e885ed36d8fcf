"""Shared parts of the fuzzers: a world of small valid files, commands run in it, and what must hold afterwards.

A case is one command line. It runs in this process, in a fresh copy of the world, which is its working folder. A
command must end with exit code 0, or with 2 and one sentence, in time, without a traceback and without harm to a file.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import resource
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from safetensors.torch import save_file

from cadd_min.checkpoints import file as checkpoint
from cadd_min.checkpoints import mdlm
from cadd_min.checkpoints.folder import save_pretrained
from cadd_min.checkpoints.load import load_denoiser
from cadd_min.data import shards
from cadd_min.data.corpus import open_corpus
from cadd_min.data.images import open_images
from cadd_min.data.tokenizer import gpt2
from cadd_min.dit import Size
from cadd_min.evaluation import image_judge
from cadd_min.model import ModelConfig
from cadd_min.reverse import ZHATS
from cadd_min.training import log
from cadd_min.unet import UNET_PRESETS
from cadd_min.utils.errors import InputError
from tests.codebench import test_codebench as test_code
from tests.toys import ROOT, save_untrained
from tests.upgrade.test_upgrade import write

MORE = int(os.environ.get("FUZZ", 0))
SECONDS = 120.0  # for one command; the slowest takes about two on an idle core
MEMORY = 4 << 30  # bytes that a command may take beyond what this process has
OF_RUN = {"checkpoint.pt", "checkpoint.previous.pt", "metrics.jsonl", "loss.png", "run.json", "forward.png"}
OF_CODE = {"generations.jsonl", "programs.jsonl", "results.jsonl", "settings.json"}
TEXT = "--dataset text.txt --cache cache --preset nano --length 8 --vocab-size 300 --batch-size 2 --dtype float32"
IMAGE = "--dataset images.npz --cache cache --preset nano --batch-size 2 --dtype float32"
TUNE = "--dataset text.txt --cache cache --length 8 --batch-size 2 --dtype float32"
RUN = "--steps 2 --eval-every 0 --sample-every 0 --log-every 1"
BASE = {  # the arguments of a valid and quick call of each script
    "train_text.py": f"{TEXT} {RUN} --out new",
    "train_image.py": f"{IMAGE} {RUN} --out new",
    "sample.py": "--ckpt text.pt --steps 2 --num 2",
    "evaluate.py bound": "--ckpt text.pt --dataset text.txt --cache cache --num 2 --repeat 1",
    "evaluate.py infill": "--ckpt text.pt --dataset text.txt --cache cache --num 2 --steps 2",
    "evaluate.py frechet": "--ckpt image.pt --cache cache --num 10 --steps 2",
    "export.py folder": "text.pt new",
    "export.py from-mdlm": "mdlm.safetensors new",
    "export.py to-mdlm": "mdlm.pt new.safetensors --time 0.5",
    "cadd_min/data/token_folder.py": "tokens",
    "finetune.py": f"--from masked {TUNE} {RUN} --out new",
    "evaluate.py code": "--benchmark humaneval --problems human.jsonl --reference --out new",
}


class Hang(BaseException):
    """The end of a command's time. No `except Exception` catches it."""


@dataclass(frozen=True)
class Outcome:
    """The end of a command: its exit code, or None and the traceback of an exception that escaped; and its output."""

    code: int | None
    out: str
    err: str
    escaped: str = ""


@contextlib.contextmanager
def limits(seconds: float) -> Iterator[None]:
    """Limit time and memory: raise Hang after `seconds`, and MemoryError beyond MEMORY."""

    def stop(*_: object) -> None:
        raise Hang(f"not finished after {seconds} seconds")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)


def run(main: Callable[[], object], seconds: float = SECONDS) -> Outcome:
    """Call `main` as a command, with streams that encode like a terminal's. No exception leaves this function."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    code: int | None = 0
    escaped = ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with limits(seconds):
                main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:
            code, escaped = None, traceback.format_exc()
    texts = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err)]  # type: ignore[attr-defined]
    return Outcome(code, *texts, escaped)


def call(script: str, *arguments: str) -> Outcome:
    """Run a script of the project with arguments, as `python script ...` does."""
    script, *subcommand = script.split()  # "evaluate.py code"
    with mock.patch.object(sys, "argv", [script, *subcommand, *arguments]):
        return run(lambda: runpy.run_path(str(ROOT / script), run_name="__main__"))


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Make `folder` the working folder meanwhile."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def contents(folder: Path) -> dict[Path, object]:
    """Read every file of a folder. Of a checkpoint, which is never written in place, take inode and time instead."""
    files: dict[Path, object] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            status = path.stat()
            large = path.suffix == ".pt"
            files[path.relative_to(folder)] = (status.st_ino, status.st_mtime_ns) if large else path.read_bytes()
    return files


def link_or_copy(source: str, target: str) -> None:
    """Copy a file. A checkpoint is linked, which is quick."""
    (os.link if source.endswith(".pt") else shutil.copy2)(source, target)


def faults(outcome: Outcome, before: dict[Path, object], folder: Path, may_write: Callable[[Path], bool]) -> list[str]:
    """List what is wrong with a command's outcome, and with its folder, whose contents were `before`.

    An empty list is the property that the fuzzers test. may_write: whether the command may change a file.
    """
    if outcome.escaped:
        return [outcome.escaped]
    wrong = []
    last = outcome.err.strip().splitlines()[-1:] or [""]
    if outcome.code not in (0, 2, 130):
        wrong.append(f"exit code {outcome.code}: {last[0]}")
    usage = outcome.err.startswith("usage: ") and ": error: " in outcome.err  # argparse repeats hostile arguments
    if outcome.code == 2 and not (last[0].startswith("error: ") or usage):
        wrong.append(f"exit code 2 without a sentence, but {last[0]!r}")
    if "Traceback" in outcome.err or "Traceback" in outcome.out:
        wrong.append(f"a traceback is printed: {outcome.err}")
    after = contents(folder)
    wrong += [f"harmed: {path}" for path, was in before.items() if after.get(path) != was and not may_write(path)]
    wrong += [f"left behind: {path}" for path in after.keys() - before.keys() if _unfinished(path)]
    return wrong


def _unfinished(path: Path) -> bool:
    """Tell whether a file or its folder has a name of something half written."""
    return any(".tmp" in name or ".part" in name or name.startswith(".") for name in path.parts[-2:])


def many(cases: int) -> settings:
    """Set the number of cases. They are the same in every run; FUZZ=n takes n times as many, new in every run."""
    return settings(
        max_examples=cases * max(1, MORE),
        derandomize=not MORE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# ------------------------------------------------------------------------------------------------ the world


def build_world(folder: Path) -> None:
    """Write one file of each kind that a command reads, all small and valid."""
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text("To be, or not to be, that is the question.<|endoftext|>\n" * 60)
    (folder / "empty.txt").write_bytes(b"")
    (folder / "lines.jsonl").write_text('{"text": "Whether it is nobler in the mind to suffer, or not."}\n' * 60)
    _write_parquet(folder / "table.parquet")
    images = rng.integers(0, 256, (20, 4, 4, 1), np.uint8)
    np.savez(folder / "images.npz", x_train=images, y_train=np.arange(20) % 3)
    for number, image in enumerate(images):
        (folder / "photos" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / "photos" / "ab"[number % 2] / f"{number}.png")
    for name in ("image.png", "mask.png"):
        Image.fromarray(images[0, ..., 0]).save(folder / name)
    with inside(folder):
        _write_models(folder)


def _write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["The slings and arrows of outrageous fortune."] * 60}), path)


def _write_models(folder: Path) -> None:
    torch.manual_seed(0)
    small = Size(layers=1, width=8, heads=1, cond=8)
    text = ModelConfig(300, 8, small)
    trained = {"dtype": "float32", "dataset": "text.txt"}
    save_untrained(folder / "text.pt", text, gpt2(300).spec(), **trained)
    save_untrained(folder / "ar.pt", ModelConfig(300, 8, small, model="ar"), gpt2(300).spec(), **trained)
    save_untrained(folder / "mdlm.pt", ModelConfig(300, 8, small, model="mdlm"), gpt2(300).spec(), **trained)
    data = open_images("images.npz", Path("cache"))
    image = ModelConfig(256, 16, UNET_PRESETS["nano"], image=(4, 4, 1), classes=3)
    save_untrained(folder / "image.pt", image, data.pixels().spec(), dtype="float32", dataset="images.npz")
    model, codec, _ = load_denoiser(folder / "text.pt")
    save_pretrained(model, codec, folder / "exported", settings=trained, step=1)
    masked = load_denoiser(folder / "mdlm.pt")[0]
    state = mdlm.to_mdlm(masked, 0.5)
    save_file(state, folder / "mdlm.safetensors")
    torch.save(state, folder / "theirs.pt")
    tokens = folder / "tokens"
    tokens.mkdir()
    shards.write_folder(open_corpus("text.txt", folder), gpt2(300), tokens)
    with mock.patch.object(image_judge, "train_judge", functools.partial(image_judge.train_judge, steps=3)):
        image_judge.open_judge(data, Path("cache"))
    for kind in ("text", "image"):
        name = f"runs/{kind}"
        done = call(f"train_{kind}.py", *BASE[f"train_{kind}.py"].replace("new", name).split(), "--save-every", "1")
        assert done.code == 0, done
    write("bert", folder / "masked")
    write("llama", folder / "causal", mask=False)
    test_code.write(folder / "human.jsonl", test_code.HUMAN)
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 9)
    tune = BASE["finetune.py"].replace("new", "runs/tuned").replace("cache cache", "cache made")
    done = call("finetune.py", *tune.split())
    assert done.code == 0, done
    shutil.rmtree("made")
    os.utime(folder / "runs" / "text" / "checkpoint.pt")  # make it the newest run


class World:
    """The files of `build_world`, and fresh copies of them for the cases."""

    def __init__(self, folder: Path):
        self.template = folder / "template"
        self.template.mkdir()
        with mock.patch.dict(os.environ, {"HOME": str(self.template)}):
            build_world(self.template)
        self.before = contents(self.template)

    @contextlib.contextmanager
    def case(self) -> Iterator[Path]:
        """Make a fresh copy of the world, the working folder meanwhile. The home folder is the folder around it."""
        with tempfile.TemporaryDirectory(dir=self.template.parent) as name:
            folder = Path(name) / "world"
            shutil.copytree(self.template, folder, copy_function=link_or_copy)
            with inside(folder), mock.patch.dict(os.environ, {"HOME": name, "HF_HUB_OFFLINE": "1"}):
                yield folder

    def check(self, script: str, *arguments: str) -> list[str]:
        """List what is wrong with a command in a fresh world."""
        with self.case() as folder:
            return self.check_in(folder, self.before, script, *arguments)

    def check_in(self, folder: Path, before: dict[Path, object], script: str, *arguments: str) -> list[str]:
        """List what is wrong with a command in a world that a test has changed, whose contents are now `before`."""
        with _quick():
            outcome = call(script, *arguments)
        outputs = _outputs(script, arguments)
        began = script.startswith(("train", "fine")) and ", run in " in outcome.out

        def may_write(path: Path) -> bool:
            if path.parts[0] == "cache" or str(path) in outputs:
                return True
            if script == "evaluate.py code" and path.name in OF_CODE:
                return True
            return began and (path.name in OF_RUN or path.name.startswith(("samples", "events")))

        wrong = faults(outcome, before, folder, may_write)
        return wrong + _lost(Path("runs")) if began else wrong


def _lost(runs: Path) -> list[str]:
    """List the runs without a checkpoint that loads. The previous checkpoint counts."""
    lost = []
    for folder in runs.iterdir():
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                checkpoint.load(folder)
        except InputError as error:
            lost.append(f"a run is lost: {error}")
    return lost


def _outputs(script: str, arguments: tuple[str, ...]) -> set[str]:
    """Return the names of the files that a command line asks to be written, and of the scripts' default outputs."""
    named = [a.partition("=")[2] for a in arguments if a.startswith(("--out=", "--gif=", "--html="))]
    grids = ["samples.png", *(a.partition("=")[2] for a in arguments if a.startswith("--out=") and Path(a).suffix)]
    named += [str(Path(grid).with_stem(f"{Path(grid).stem}-{zhat}")) for grid in grids for zhat in ZHATS]
    return {"samples.png", "frontier.png", *(os.path.normpath(name) for name in named if name)} - {"image.png"}


@contextlib.contextmanager
def _quick() -> Iterator[None]:
    """Leave out what takes long and reads no damaged file.

    These are git, loss curves, TensorBoard, the network, and most of the judge's training.
    """
    with (
        mock.patch.object(image_judge, "train_judge", functools.partial(image_judge.train_judge, steps=3)),
        mock.patch.object(log, "_tensorboard", lambda out: None),
        mock.patch.object(log, "loss_curve", log.read_metrics),
        mock.patch.object(log, "commit", lambda: None),
        mock.patch.object(socket.socket, "connect", mock.Mock(side_effect=OSError("there is no network here"))),
    ):
        yield


# ------------------------------------------------------------------------------------------------ the parsers


class _Parsed(BaseException):
    pass


def options(script: str) -> list[argparse.Action]:
    """List the arguments of a script by running it up to its own parser."""
    actions: list[argparse.Action] = []

    def parse_args(parser: argparse.ArgumentParser, *_: object) -> None:
        for action in parser._actions:
            commands = isinstance(action, argparse._SubParsersAction) and subcommand
            actions.extend(action.choices[subcommand[0]]._actions if commands else [action])
        raise _Parsed

    script, *subcommand = script.split()
    patches = (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
        mock.patch.object(sys, "argv", [script, *subcommand]),
    )
    with patches[0], patches[1], contextlib.suppress(_Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return [action for action in actions if action.dest != "help"]
