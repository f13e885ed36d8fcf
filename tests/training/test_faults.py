"""A run that dies loses nothing: killed at any moment, a damaged file, not a number, out of memory, a full disk."""

import importlib.metadata
import json
import math
import os
import random
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cadd_min.checkpoints import file as checkpoint
from cadd_min.training import log
from cadd_min.training.log import read_metrics
from cadd_min.training.loop import LIMIT, FitConfig, Run, fit
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import remove_leftovers
from tests.toys import batch, same, trainer

ROOT = Path(__file__).parents[2]


def run_of(out: Path) -> Run:
    return Run(out, [], lambda trainer, folder: "", {"tokenizer": {}})


def state(step: int) -> dict:
    return {"trainer": {"step": step, "weights": torch.arange(1000.0) * step}}


# ------------------------------------------------------------------------------------------------- kill -9

# One process imports everything and forks the training script again and again, until the given number of kills.
# A fifth of the runs is killed before the first step. The others are killed at a random moment after it, and half of
# them as soon as a file is half written.
LIVES = """
import os, random, runpy, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import matplotlib.pyplot, torch.utils.tensorboard
from cadd_min.checkpoints import file as checkpoint
from cadd_min.data import tokenizer
from cadd_min.sampling import text
from cadd_min.training import start
tokenizer.gpt2(300)
out, kills, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
rng, killed, writing = random.Random(0), 0, 0

def steps():
    return (out / "metrics.jsonl").read_text().count("step") if (out / "metrics.jsonl").exists() else 0

while killed <= kills:
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.argv = ["train_text.py", *arguments, *(["--resume"] if checkpoint.holds_run(out) else [])]
        try:
            runpy.run_path("train_text.py", run_name="__main__")
        finally:
            os._exit(0)
    if killed == kills:
        os.waitpid(pid, 0)
        break
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0, 0.3))  # before the first step
    else:
        before = steps()
        while steps() <= before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))
        until = time.time() + 5
        while killed % 2 and not list(out.glob("*.tmp")) and time.time() < until:
            pass
    os.kill(pid, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    writing += bool(list(out.glob("*.tmp")))
print(killed, writing)
"""


@pytest.mark.slow
def test_a_run_killed_at_21_random_moments_ends_bit_for_bit_where_the_undisturbed_one_does(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("To be, or not to be, that is the question. " * 400)
    common = ["--preset", "nano", "--length", "16", "--vocab-size", "300", "--batch-size", "4", "--steps", "150",
              "--dtype", "float32", "--eval-every", "0", "--sample-every", "0", "--log-every", "1", "--save-every", "1",
              "--cache", str(tmp_path / "cache"), "--dataset", str(text)]  # fmt: skip
    results = {}
    for name, kills in (("killed", 21), ("undisturbed", 0)):
        out = tmp_path / name
        command = [sys.executable, "-c", LIVES, str(out), str(kills), *common, "--out", str(out)]
        lives = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
        assert lives.returncode == 0, lives.stderr
        results[name] = [int(n) for n in lives.stdout.split()]
        assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == list(range(1, 151))
        assert not list(out.glob("*.tmp"))
    killed, while_writing = results["killed"]
    assert killed == 21 and while_writing >= 5  # these kills left a half-written file
    one, two = (checkpoint.load(tmp_path / name)["trainer"] for name in ("killed", "undisturbed"))
    assert one["step"] == two["step"] == 150
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][key], two[part][key]) for key in two[part])
    losses = [[row["ce"] for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in results]
    assert losses[0] == losses[1]
    assert len(json.loads((tmp_path / "killed" / "run.json").read_text())["starts"]) > 10


# ------------------------------------------------------------------------------------------------- damaged files


def test_every_cut_and_every_flipped_bit_is_found_and_the_checkpoint_before_is_used(tmp_path, capsys):
    """Check 30 cuts and 300 flipped bits at random places. torch.load alone misses more than 100 of them."""
    path = tmp_path / checkpoint.FILE
    for step in (1, 2):
        checkpoint.save(path, state(step))
    assert checkpoint.load(tmp_path)["trainer"]["step"] == 2
    content, rng, unnoticed = path.read_bytes(), random.Random(0), 0
    damaged = [content[: rng.randrange(len(content))] for _ in range(30)]
    for _ in range(300):
        place = rng.randrange(len(content))
        damaged.append(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
    for data in damaged:
        path.write_bytes(data)
        assert checkpoint.load(tmp_path)["trainer"]["step"] == 1
        assert checkpoint.load(path)["trainer"]["step"] == 1
        warning = capsys.readouterr().err
        assert "it is damaged" in warning and "using the one before it" in warning and "of step 1" in warning
        try:
            torch.load(path, weights_only=True)
            unnoticed += 1
        except Exception:
            pass
    assert unnoticed > 100  # so the checksum is needed
    checkpoint.save(path, state(3))  # the damaged file must not replace the good previous checkpoint
    path.unlink()
    assert checkpoint.load(tmp_path)["trainer"]["step"] == 1


def test_the_checkpoint_before_the_last_is_of_an_earlier_step(tmp_path):
    """Run steps that save_every divides: the last step must not be saved twice, once in the loop and once after it."""
    fit(trainer(steps=4), run_of(tmp_path), FitConfig(log_every=0, eval_every=0, sample_every=0, save_every=2))
    steps = [checkpoint.load(tmp_path / name)["trainer"]["step"] for name in (checkpoint.FILE, checkpoint.PREVIOUS)]
    assert steps == [4, 2]


def test_leftovers_are_removed_files_and_folders_alike(tmp_path):
    (tmp_path / ".model.7.tmp").mkdir()
    for name in (".model.7.tmp/weights", ".checkpoint.pt.7.tmp", "checkpoint.pt"):
        (tmp_path / name).write_text("half")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_run_that_died_between_two_renames_has_its_checkpoint(tmp_path, capsys):
    path = tmp_path / "run" / checkpoint.FILE
    checkpoint.save(path, state(7))
    path.rename(path.with_name(checkpoint.PREVIOUS))
    assert checkpoint.load(tmp_path / "run")["trainer"]["step"] == 7 and "of step 7" in capsys.readouterr().err
    assert checkpoint.find(tmp_path) == path  # also as the newest run in a folder of runs


def test_without_one_before_a_damaged_checkpoint_is_an_error(tmp_path):
    path = tmp_path / checkpoint.FILE
    checkpoint.save(path, state(1))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged"):
        checkpoint.load(tmp_path)


def test_a_checkpoint_is_still_an_archive_that_torch_and_unzip_read(tmp_path):
    import zipfile

    checkpoint.save(tmp_path / "c.pt", state(3))
    assert torch.load(tmp_path / "c.pt", weights_only=True)["trainer"]["step"] == 3
    with zipfile.ZipFile(tmp_path / "c.pt") as archive:
        assert archive.testzip() is None and len(archive.comment) == checkpoint.DIGEST


# ------------------------------------------------------------------------------------------- NaN, memory, disk space


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted():
    straight, disturbed = trainer(), trainer()
    for fitted in (straight, disturbed):
        fitted.train_step()
    before = trainer()
    before.load_state_dict(disturbed.state_dict())
    loss = disturbed.training_loss
    disturbed.training_loss = lambda *args: (lambda value: value._replace(total=value.total * math.nan))(loss(*args))
    disturbed.train_step()
    for p, q in zip(disturbed.model.parameters(), before.model.parameters()):
        assert torch.equal(p, q)
    moments, unchanged = (fitted.optimizer.state_dict()["state"] for fitted in (disturbed, before))
    assert all(torch.equal(moments[n][key], unchanged[n][key]) for n in unchanged for key in unchanged[n])
    assert (int(disturbed.skipped), int(disturbed.in_a_row), disturbed.step) == (1, 1, 2)
    disturbed.training_loss = loss
    disturbed.train_step()
    assert (int(disturbed.skipped), int(disturbed.in_a_row)) == (1, 0)
    assert disturbed.state_dict()["skipped"] == 1 and not same(disturbed, before)


def test_a_run_of_skipped_steps_stops_and_keeps_what_it_had(tmp_path):
    fitted, bad_from = trainer(steps=100), 7
    loss = fitted.training_loss

    def fails(*args):
        value = loss(*args)
        return value._replace(total=value.total * (math.inf if fitted.step >= bad_from else 1))

    fitted.training_loss = fails
    with pytest.raises(InputError, match=r"not finite in \d+ steps in a row, to step \d+: lower --lr"):
        fit(fitted, run_of(tmp_path), FitConfig(log_every=2, eval_every=0, sample_every=0, save_every=5))
    assert bad_from + LIMIT <= fitted.step <= bad_from + LIMIT + 5
    saved = checkpoint.load(tmp_path)["trainer"]
    assert all(torch.isfinite(value).all() for value in saved["ema"].values())
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["skipped"] >= LIMIT and all(math.isfinite(v) for row in rows for v in row.values())


@pytest.mark.parametrize("script, help", [("train_text.py", "--vocab-size"), ("finetune.py", "--lora 16")])
def test_out_of_memory_names_what_would_help(script, help, tmp_path):
    """Run out of memory by an allocation of 4 EiB, and check that the error names the script's own options."""
    fitted = trainer(steps=2)
    fitted.training_loss = lambda *args: torch.empty(2**60)
    run = run_of(tmp_path)
    run.contents["settings"] = {"script": script}
    with pytest.raises(InputError, match=f"out of memory: lower --batch-size and raise --acc.* {help}.* --shard"):
        fit(fitted, run, FitConfig())


def test_a_read_only_folder_is_named(tmp_path, text, call):
    """Check a read-only folder as --out. Root may write there, so for root a file stands in the folder's place."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    target = folder / "run" if not os.access(folder, os.W_OK) else text / "run"
    code, _, err = call(
        f"train_text.py --preset nano --steps 1 --dataset {text} --vocab-size 300 --length 16 --out {target}"
    )
    assert code == 2 and "--out" in err and ("cannot be made" in err or "must be a folder" in err)


def test_a_full_disk_in_the_middle_of_a_run_is_a_sentence_and_the_checkpoint_stays(tmp_path):
    """Imitate a full disk by a limit on a file's size. metrics.jsonl meets the limit soon after a checkpoint."""
    code = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from cadd_min.checkpoints import file as checkpoint
save = checkpoint.save
def then_full(*args):
    save(*args)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
checkpoint.save = then_full
runpy.run_path("train_text.py", run_name="__main__")
"""
    text = tmp_path / "t.txt"
    text.write_text("To be, or not to be, that is the question. " * 400)
    tiny = "--preset nano --length 16 --vocab-size 300 --dtype float32 --log-every 1 --eval-every 0 --sample-every 0"
    command = [sys.executable, "-c", code, *tiny.split(), "--save-every", "5", "--cache", str(tmp_path / "cache"),
               "--dataset", str(text), "--out", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.fullmatch(
        r"error: --out .* cannot be written to \(File too large\); the last checkpoint is untouched", last
    )
    assert checkpoint.load(tmp_path / "run")["trainer"]["step"] == 5 and not list((tmp_path / "run").glob("*.tmp"))


def test_a_run_folder_says_what_made_it_and_the_same_seed_makes_the_same_curve(tmp_path, text, call):
    command = f"train_text.py --preset nano --steps 4 --log-every 1 --dataset {text} --vocab-size 300 --length 16 --eval-every 0 --sample-every 0"  # noqa: E501
    for name in "ab":
        assert call(f"{command} --out {tmp_path / name}")[0] == 0
    recorded = json.loads((tmp_path / "a" / "run.json").read_text())
    assert recorded["settings"]["seed"] == 0 and recorded["model_config"]["vocab_size"] == 300
    (start,) = recorded["starts"]
    assert (
        start["packages"]["torch"] == importlib.metadata.version("torch")
        and start["processes"] == 1
        and "cpu" in start["device"]
    )
    assert start["commit"] is None or len(start["commit"].rstrip("+")) == 40
    one, two = ([row["ce"] for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in "ab")
    assert one == two and len(one) == 4


def test_run_json_names_the_gpu_and_the_libraries_that_hold_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the one at {device}")
    for device in ("cuda:1", "cpu"):
        log.record(tmp_path, {}, {"device": device})
    on_gpu, on_cpu = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert (on_gpu["gpu"], on_cpu["gpu"]) == ("the one at cuda:1", None)
    for name in ("transformers", "tokenizers", "peft", "safetensors"):
        assert on_cpu["packages"][name] == pytest.importorskip(name).__version__


def test_a_batch_is_read_ahead_and_in_order():
    asked = []
    fitted = trainer(data=lambda index: (asked.append(index), batch(index))[1], accumulate=2)
    for _ in range(3):
        fitted.train_step()
    until = time.time() + 60
    while len(asked) < 7 and time.time() < until:
        time.sleep(0.01)
    time.sleep(0.1)  # for an eighth, which must not come
    assert asked == [0, 1, 2, 3, 4, 5, 6]
