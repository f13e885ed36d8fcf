"""Training learns, is reproducible bit for bit, and loses nothing when it is interrupted."""

import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cadd_min.checkpoints import file as checkpoint
from cadd_min.checkpoints.load import load_denoiser
from cadd_min.loss import token_losses
from cadd_min.objective import Batch
from cadd_min.training.log import MetricsLog, loss_curve, read_metrics
from cadd_min.training.start import restore
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.unet import UNetSize
from cadd_min.utils.device import best_dtype, seeded
from cadd_min.utils.errors import InputError
from tests.toys import batch, images, nano, rng, same, trainer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("model", ["cadd", "mdlm", "cdm"])
@pytest.mark.parametrize("options", [{}, {"weighting": "elbo", "mse": 0.1, "drop_latent": 0.3, "accumulate": 2}])
def test_resume_is_bit_for_bit(model, options, tmp_path):
    straight, first, second = (trainer(model, steps=6, warmup=2, **options) for _ in range(3))
    for _ in range(6):
        straight.train_step()
    for _ in range(3):
        first.train_step()
    checkpoint.save(tmp_path / "c.pt", {"trainer": first.state_dict()})
    restore(second, checkpoint.load(tmp_path / "c.pt"), tmp_path)
    assert second.step == 3
    for _ in range(3):
        second.train_step()
    assert same(straight, second) and not same(straight, first)


def test_resume_with_dropout_is_bit_for_bit(tmp_path):
    """Restore a U-Net with dropout: its masks depend on the micro-batch, not on earlier draws."""
    data = lambda index: Batch(torch.randint(17, (4, 64), generator=rng(index)))
    size = UNetSize(embed=4, channels=8, mults=(1,), blocks=1, attention=(), heads=1, dropout=0.5, cond=8)
    config = TrainConfig(steps=4, batch_size=4, warmup=0, dtype="float32")
    straight, first, second = (Trainer(images(size), data, config) for _ in range(3))
    for a in (straight, straight, straight, straight, first, first):
        a.train_step()
    checkpoint.save(tmp_path / "c.pt", {"trainer": first.state_dict()})
    restore(second, checkpoint.load(tmp_path / "c.pt"), tmp_path)
    for _ in range(2):
        second.train_step()
    assert same(straight, second) and not same(straight, first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_batch_can_be_overfitted(dtype, monkeypatch):
    """Check that the loss goes to zero on one batch with always the same noise.

    Rotary positions are relative. In a sequence without unmasked tokens and without latents, no token can know its
    place. The chosen seed leaves an unmasked token in every sequence.
    """
    import cadd_min.training.trainer as module

    monkeypatch.setattr(module, "seeded", lambda seed, index, device="cpu", use=0: seeded(341, 0))
    fit = trainer("cadd", lambda i: batch(0), steps=400, lr=3e-3, wrong_hints=0.0, dtype=dtype)
    losses = [float(fit.train_step()["ce"]) for _ in range(400)]
    assert losses[0] > 2 and losses[-1] < 0.02
    assert fit.model.head.weight.dtype == torch.float32  # whatever the dtype of the computation


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on a CPU")
def test_compiled_steps_are_the_same_steps():
    plain, compiled = trainer(), trainer(compile=True)
    for _ in range(3):
        a, b = plain.train_step(), compiled.train_step()
    assert float(a["ce"]) == pytest.approx(float(b["ce"]), rel=1e-4)
    assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-3)


def test_logits_never_exist_at_once():
    """Check that the largest tensor of forward and backward at V = 5,000 is far below the logits (N, V)."""
    features = torch.randn(4096, 8, requires_grad=True)
    head, targets = torch.randn(5000, 8, requires_grad=True), torch.zeros(4096, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        ce, _ = token_losses(features, head, targets)
        ce.sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < 4096 * 5000 * 4 / 2


def test_every_seed_and_index_has_its_own_noise():
    draws = {float(torch.rand(1, generator=seeded(s, i))) for s in range(20) for i in range(20)}
    assert len(draws) == 400 and torch.equal(
        torch.rand(3, generator=seeded(2, 5)), torch.rand(3, generator=seeded(2, 5))
    )


def test_dtype_is_measured():
    assert trainer(dtype="auto").dtype == best_dtype(torch.device("cpu")) in ("float32", "bfloat16")


def test_evaluation_is_the_same_each_time_and_bounds_the_entropy():
    fit = trainer(steps=1)
    one, two = (fit.evaluate([batch(100 + i) for i in range(16)]) for _ in range(2))
    # the tokens are uniform, so their entropy is log 11; the error of 16 draws of t is smaller than 0.1
    assert one == two and one["val_bound"] > math.log(11) - 0.1
    assert one["val_bound"] == pytest.approx(one["val_bound_discrete"] + one["val_bound_continuous"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_dtype_of_a_gpu_is_no_matter_of_chance():
    """Ask again and again: a measured product that takes as long as its launch would give either answer."""
    fast = torch.cuda.get_device_capability() >= (8, 0)
    assert {best_dtype(torch.device("cuda")) for _ in range(50)} == {"bfloat16" if fast else "float32"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_step_waits_for_the_gpu_only_to_count_its_masks(where):
    """Check by PyTorch's own warnings that a step waits once, for the number of masks, wherever the data lies."""
    data = lambda index: batch(index).to(torch.device(where))
    fitted = Trainer(nano().cuda(), data, TrainConfig(batch_size=8, dtype="bfloat16"))
    fitted.train_step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as warnings:
            fitted.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in warnings if "synchroniz" in str(w.message)]) == 1


def test_damaged_checkpoints_are_refused_and_nothing_is_unpickled(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"trainer": trainer().state_dict()})
    whole = path.read_bytes()
    evil = tmp_path / "evil.pt"
    checkpoint.save(evil, {"x": Path("/")})  # a pickled object under a correct checksum
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"not a checkpoint", evil.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a checkpoint"):
            checkpoint.load(path)
    path = tmp_path / "other.pt"
    checkpoint.save(path, {"version": 99})
    with pytest.raises(InputError, match="version 99"):
        checkpoint.load(path)
    checkpoint.save(path, {"format": "another"})
    with pytest.raises(InputError, match="not a checkpoint of this project"):
        checkpoint.load(path)
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoint.load(tmp_path / "none.pt")
    with pytest.raises(InputError, match="not a whole checkpoint"):
        checkpoint.save(path, {"trainer": {}})
        load_denoiser(path)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """Imitate a full disk by a limit on a file's size: the error path is the same."""
    code = f"""
import resource, signal, sys, torch
from pathlib import Path
from cadd_min.checkpoints import file as checkpoint
from cadd_min.utils.cli import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path({str(tmp_path / "checkpoint.pt")!r})
checkpoint.save(path, {{"trainer": 1}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
run(lambda: checkpoint.save(path, {{"trainer": torch.zeros(1_000_000)}}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "could not save" in result.stderr and "(File too large)" in result.stderr
    assert checkpoint.load(tmp_path / "checkpoint.pt")["trainer"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000  # only the child was limited


def test_metrics_drop_what_a_resumed_run_does_again(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.write(step, ce=1.0 / step, latent_norm=1.0, val_bound=2.0)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "ce"')  # as a crash cuts it short
    MetricsLog(tmp_path, 20).close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20]
    assert loss_curve(tmp_path / "metrics.jsonl").stat().st_size > 5000


@pytest.mark.slow
def test_tensorboard_gets_the_same_values(tmp_path):
    """Read the values back by TensorBoard's own reader."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0)
    for step in (10, 20):
        log.write(step, ce=2.0 / step)
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("ce")
    assert [(e.step, pytest.approx(e.value)) for e in events] == [(10, 0.2), (20, 0.1)]


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_continues_as_if_nothing_had_happened(tmp_path):
    """Interrupt a run by Ctrl-C, resume it, interrupt it by SIGTERM, resume it: it must end as an undisturbed run."""
    text = tmp_path / "t.txt"
    text.write_text("To be, or not to be, that is the question. " * 400)
    common = ["--preset", "nano", "--length", "16", "--vocab-size", "300", "--batch-size", "4", "--steps", "60",
              "--dtype", "float32", "--eval-every", "0", "--sample-every", "0", "--log-every", "1",
              "--cache", str(tmp_path / "cache"), "--dataset", str(text)]  # fmt: skip

    def start(*options: str) -> subprocess.Popen:
        command = [sys.executable, "train_text.py", *options]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    assert start(*common, "--out", str(tmp_path / "a")).wait() == 0
    metrics, before = tmp_path / "b" / "metrics.jsonl", 0
    for number, options in ((signal.SIGINT, common), (signal.SIGTERM, ["--resume"])):
        process = start(*options, "--out", str(tmp_path / "b"))
        while not metrics.exists() or metrics.read_text().count("\n") < before + 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 130 and re.search(r"stopped after step \d+, saved", stderr)
        stopped = checkpoint.load(tmp_path / "b")["trainer"]["step"]
        assert before < stopped < 60
        before = stopped
    assert start("--resume", "--out", str(tmp_path / "b")).wait() == 0
    one, two = (checkpoint.load(tmp_path / name)["trainer"] for name in "ab")
    assert one["step"] == two["step"] == 60
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][key], two[part][key]) for key in one[part])
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 61))
