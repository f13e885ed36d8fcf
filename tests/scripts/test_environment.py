"""Check the scripts in environments that lack what most have: a home, a compiler, locks, a backend for plots."""

import errno
import os
import subprocess
import sys
import types
from pathlib import Path

import matplotlib
import pytest

from cadd_min.data import token_folder
from cadd_min.data.corpus import open_corpus
from cadd_min.data.token_folder import TokenFolder, is_folder, prepare
from cadd_min.data.tokenizer import gpt2
from cadd_min.training import log
from cadd_min.utils import files
from cadd_min.utils.files import cache_folder
from tests.toys import ROOT

TINY = "--preset nano --vocab-size 300 --length 32 --steps 4 --batch-size 4 --warmup 1 --dtype float32"


def script(command: str, cwd: Path, before: str = "", **environment: str | None) -> subprocess.CompletedProcess:
    """Run a script in a process of its own. before: Python that runs first; None removes a variable."""
    start = (
        f"import runpy, sys; sys.argv = {command.split()!r}; {before}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    env = {name: value for name, value in env.items() if value is not None}
    return subprocess.run([sys.executable, "-c", start], cwd=cwd, env=env, capture_output=True, text=True)


def one_line(done: subprocess.CompletedProcess, *words: str) -> bool:
    return done.returncode == 2 and "Traceback" not in done.stderr and all(word in done.stderr for word in words)


@pytest.mark.parametrize("backend", ["inline", "module://matplotlib_inline.backend_inline"])
def test_a_notebooks_backend_is_no_matter(backend, text):
    done = script(f"{ROOT}/train_text.py --dataset {text} {TINY} --cache c --out run", text.parent, MPLBACKEND=backend)
    assert done.returncode == 0 and "trained: run" in done.stdout, done.stderr
    assert (text.parent / "run" / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("broken", ["matplotlib.figure", "torch.utils.tensorboard"])
def test_an_ornament_that_fails_is_said_once_and_the_run_goes_on(broken, text):
    """Break a module as another version of numpy breaks it: by an AttributeError while it is imported."""
    before = f"""
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == {broken!r}:
            raise AttributeError("_ARRAY_API not found")
sys.meta_path.insert(0, Broken())"""
    done = script(f"{ROOT}/train_text.py --dataset {text} {TINY} --cache c --out run", text.parent, before)
    assert done.returncode == 0 and "trained: run" in done.stdout, done.stderr
    what = "loss.png" if "matplotlib" in broken else "TensorBoard"
    assert done.stderr.count(f"warning: {what} is left out (AttributeError: _ARRAY_API not found)") == 1


def test_a_board_that_fails_in_the_middle_is_said_once(tmp_path, monkeypatch, capsys):
    class Board:
        def add_scalar(self, *args):
            raise TypeError("Descriptors cannot be created directly.")

    monkeypatch.setattr(log, "_tensorboard", lambda out: Board())
    written = log.MetricsLog(tmp_path, 0)
    for step in range(3):
        written.write(step, ce=1.0)
    written.close()
    assert capsys.readouterr().err.count("TensorBoard is left out (TypeError: Descriptors") == 1
    assert len(log.read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_plots_leave_the_notebooks_backend_alone(monkeypatch):
    from cadd_min.utils.plots import pyplot

    monkeypatch.setenv("MPLBACKEND", "inline")
    assert pyplot().get_backend().lower() == "agg" and os.environ["MPLBACKEND"] == "inline"
    assert matplotlib.get_backend().lower() == "agg"


def test_without_a_home_folder_help_and_cache_work_and_the_rest_is_one_sentence(text):
    """The system knows no user of this number, as in many containers."""
    become = "import os, pwd; os.getuid = lambda: 23456"
    for name in ("train_text.py", "finetune.py", "evaluate.py"):
        done = script(f"{ROOT}/{name} --help", text.parent, become, HOME=None)
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr
    train = f"{ROOT}/train_text.py --dataset {text} {TINY} --out run"
    assert one_line(script(train, text.parent, become, HOME=None), "--cache: ~/.cache/cadd_min needs a home folder")
    assert script(f"{train} --cache c", text.parent, become, HOME=None).returncode == 0


def test_the_cache_is_where_the_system_says(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == "~/.cache/cadd_min"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert (cache_folder(), cache_folder("evalplus")) == ("/somewhere/cadd_min", "/somewhere/evalplus")


def test_a_tilde_is_the_home_folder_in_every_path_option(call, tmp_path, text):
    """The shell leaves a tilde alone behind an equals sign. `call` makes tmp_path the home folder."""
    code, _, err = call(f"train_text.py --dataset=~/{text.name} {TINY} --cache=~/cache --out=~/run")
    assert code == 0 and (tmp_path / "run" / "checkpoint.pt").exists() and (tmp_path / "cache").is_dir(), err
    code, _, err = call("sample.py --ckpt=~/run --steps 2 --gif=~/a.gif --html=~/a.html")
    assert code == 0 and (tmp_path / "a.gif").exists() and (tmp_path / "a.html").exists(), err
    assert not (tmp_path / "~").exists()
    code, _, err = call("export.py folder ~/run ~/folder")
    assert code == 0 and (tmp_path / "folder" / "model.safetensors").exists(), err


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_without_locks_the_work_goes_on_and_a_line_says_so(error, text, tmp_path, monkeypatch, capsys):
    """errno: of a file system without locks; None: a system without the module fcntl, where files have no pread."""

    def flock(*args):
        raise OSError(error, os.strerror(error))

    fake = None if error is None else types.SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4)
    monkeypatch.setattr(files, "fcntl", fake)
    if error is None:
        monkeypatch.delattr(os, "pread")
    tokens = prepare(open_corpus(str(text), tmp_path), gpt2(300), tmp_path / "cache")
    assert "cannot be locked" in capsys.readouterr().out
    assert gpt2(300).decode(tokens.split("train")[:9].tolist()).startswith("To be, or")


def test_a_lock_that_fails_for_another_reason_is_an_error(text, tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "fcntl", types.SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    with pytest.raises(token_folder.InputError, match=r"cannot write the tokens to .*Input/output error"):
        prepare(open_corpus(str(text), tmp_path), gpt2(300), tmp_path / "cache")


def test_compile_without_a_compiler_is_one_sentence_before_the_run_has_a_folder(text, tmp_path):
    for name in ("env", "uname"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(f"/usr/bin/{name}")
    done = script(
        f"{ROOT}/train_text.py --dataset {text} {TINY} --cache c --out run --compile",
        text.parent,
        PATH=str(tmp_path / "bin"),
        CXX=None,
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
    )
    assert one_line(done, "--compile does not work here (") and not (text.parent / "run").exists(), done.stderr


ENTRIES = [path.name for path in ROOT.glob("*.py") if path.name != "setup.py"] + [
    f"-m benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("[a-z]*.py")
]


@pytest.mark.parametrize("entry", [*ENTRIES, "-m benchmarks.figures", "-m tests.toys", "-m cadd_min.ops"])
@pytest.mark.parametrize("chosen, spins", [({}, "1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
                                           ({"GOMP_SPINCOUNT": "7"}, "7")])  # fmt: skip
def test_threads_wait_without_spinning_long_unless_the_user_chose_otherwise(entry, chosen, spins):
    """End each program where it loads torch, which loads OpenMP, and look at what OpenMP reads there."""
    code = f"""
import os, runpy, sys
class AtTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("spins", os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, AtTorch())
module, name = {"-m " in entry}, {entry.removeprefix("-m ")!r}
(runpy.run_module if module else runpy.run_path)(name, run_name="__main__")"""
    unset = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=unset | chosen, capture_output=True, text=True)
    assert done.stdout == f"spins {spins}\n", done.stderr


@pytest.mark.parametrize("index", ['{"shards": [], "version": 2}', '{"pages": ["a.html"]}', "[]", "not JSON"])
def test_a_folder_of_texts_may_have_an_index_of_its_own(index, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "index.json").write_text(index)
    (tmp_path / "texts" / "a.txt").write_text("To be, or not to be. " * 50)
    assert not is_folder(str(tmp_path / "texts"))
    corpus = open_corpus(str(tmp_path / "texts"), tmp_path)
    assert "left out: 1 .json" in corpus.note
    tokens = prepare(corpus, gpt2(300), tmp_path / "cache")
    assert is_folder(str(tokens.path)) and isinstance(TokenFolder(tokens.path), TokenFolder)
    (tokens.path / "index.json").write_text("damaged")
    assert is_folder(str(tokens.path))  # and TokenFolder says that it is damaged
