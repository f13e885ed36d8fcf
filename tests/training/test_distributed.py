"""Two processes do what one does: the same gradients, the same run, the same checkpoints. Over gloo on the CPU."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

import finetune
from cadd_min.checkpoints import file as checkpoint
from cadd_min.loss import stratified_times
from cadd_min.objective import Loss
from cadd_min.training.distributed import World, can_shard, unsharded, world
from cadd_min.training.log import read_metrics
from cadd_min.training.loop import Fit, FitConfig, Run
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.utils.cli import leave
from cadd_min.utils.device import launched, seeded
from cadd_min.utils.errors import InputError
from tests.toys import TINY, batch, nano
from tests.training.plain import plain_loss
from tests.upgrade.test_upgrade import write

ROOT = Path(__file__).parents[2]
OPTIONS = {"batch_size": 8, "dtype": "float32", "steps": 8, "warmup": 2, "drop_latent": 0.2, "lr": 1e-3}


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def made(processes, model: str = "cadd", **options) -> Trainer:
    """Make a trainer. To share weights, the first process alone has them, and the others have their shapes."""
    with torch.device("meta" if options.get("shard") and processes and not processes.first else "cpu"):
        network = nano(model)
    return Trainer(network, batch, TrainConfig(**(OPTIONS | options)), processes)


def gradients(processes, model: str, accumulate: int, shard: bool = False) -> list[torch.Tensor]:
    fit = made(processes, model, accumulate=accumulate, shard=shard)
    fit.backward()
    return [unsharded(p.grad) for p in fit.model.parameters()]


def plain_gradients(model: str, accumulate: int) -> tuple[torch.Tensor, ...]:
    """Compute the first step's gradients by the plain loss."""
    fit = made(None, model, accumulate=accumulate)
    u = stratified_times(accumulate * 8, seeded(0, 0, use=1)).view(accumulate, 8)
    losses = [plain_loss(fit.model, batch(i), u[i], fit.config, seeded(0, i))[0] for i in range(accumulate)]
    return torch.autograd.grad(sum(losses) / accumulate, [*fit.model.parameters()], materialize_grads=True)


def goes_on(processes, shard: bool, state: dict) -> dict:
    """Make three steps from a saved state. Returns the new state and what is measured of the sharded weights."""
    fit = made(processes, accumulate=2, shard=shard)
    fit.load_state_dict(state)
    for _ in range(3):
        fit.train_step()
    held_out = fit.evaluate([batch(100), batch(101)])
    return {"state": fit.state_dict(), "held_out": held_out, "norm": fit.latent_norm()}


def shown(processes, accumulate: int = 2) -> list[tuple[torch.Tensor, ...]]:
    """Record what the loss of each micro-batch gets: tokens, times, the first numbers of the noise."""
    fit, seen = made(processes, accumulate=accumulate), []

    def loss(model, batch, u, objective, generator):
        seen.append((batch.x_0, u, torch.rand(3, generator=generator)))
        zero = sum(p.sum() for p in model.parameters()) * 0
        return Loss(zero, *[zero.detach()] * 3)

    fit.training_loss = loss
    fit.backward()
    return seen


def refused(processes) -> str:
    """Return the sentence that each process hears where the first process finds bad input."""

    def find():
        raise InputError(f"bad in {processes.rank}")

    try:
        return str(processes.in_first(find))
    except InputError as error:
        return str(error)


CASES = [("cadd", 2), ("cadd", 4), ("mdlm", 2), ("ar", 2)]
CAN_SHARD = can_shard(torch.device("cpu"))
NEEDS_FSDP2 = pytest.mark.skipif(not CAN_SHARD, reason="this torch has no FSDP2 on a CPU: 2.7 has")
SHARD = pytest.mark.parametrize("shard", [False, pytest.param(True, marks=NEEDS_FSDP2)], ids=["ddp", "fsdp2"])


def in_process(rank: int, port: str, folder: Path) -> None:
    """Compute everything that the tests below need of two processes, once, because starting them is slow."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    state = torch.load(folder / "three.pt", weights_only=True)
    with world("cpu") as processes:
        results = {
            "gradients": {(*case, s): gradients(processes, *case, s) for case in CASES for s in {False, CAN_SHARD}},
            "resumed": {s: goes_on(processes, s, state) for s in {False, CAN_SHARD}},
            "shown": shown(processes),
            "any": [processes.any(rank == 1), processes.any(False)],
            "mean": processes.mean(torch.tensor(2.0 * rank)),
            "told": [processes.tell(f"{rank}: é {'x' * 100 * rank}"), processes.tell("")],
            "first": [processes.in_first(lambda: rank), refused(processes)],
        }
        torch.save(results, folder / f"{rank}.pt")
    leave(0)


@pytest.fixture(scope="module")
def three_steps() -> Trainer:
    torch.set_num_threads(1)
    fit = made(None, accumulate=2)
    for _ in range(3):
        fit.train_step()
    return fit


@pytest.fixture(scope="module")
def two(three_steps, tmp_path_factory) -> list[dict]:
    """Run two processes. Returns the results of each."""
    folder = tmp_path_factory.mktemp("two")
    torch.save(three_steps.state_dict(), folder / "three.pt")
    mp.spawn(in_process, (free_port(), folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@SHARD
@pytest.mark.parametrize("model, accumulate", CASES)
def test_gradients_of_two_processes_are_those_of_one_on_the_joined_batch(model, accumulate, shard, two):
    joined = gradients(None, model, accumulate)
    for results in two:
        for expected, gradient in zip(joined, results["gradients"][model, accumulate, shard]):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    if model != "ar":  # a fixed point that does not come from the trainer
        for gradient, expected in zip(joined, plain_gradients(model, accumulate)):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    half = gradients(None, model, 1)  # the check is not empty: half of the batch has different gradients
    assert any(not torch.allclose(a, b, rtol=1e-2, atol=1e-4) for a, b in zip(joined, half))


@SHARD
def test_a_run_goes_on_in_another_number_of_processes(shard, two, three_steps):
    """Compare three steps of one process, three of two and three of one with nine steps of one.

    Half-way, one process must evaluate the state of the two as they did.
    """
    straight, mixed = made(None, accumulate=2), made(None, accumulate=2)
    straight.load_state_dict(three_steps.state_dict())
    middle = two[0]["resumed"][shard]
    mixed.load_state_dict(middle["state"])
    assert (mixed.step, mixed.sequences) == (6, 96) and mixed.optimizer.state_dict()["state"][0]["step"] == 6
    assert mixed.evaluate([batch(100), batch(101)]) == pytest.approx(middle["held_out"], rel=1e-5)
    assert mixed.latent_norm() == pytest.approx(middle["norm"], rel=1e-5)
    for _ in range(6):
        straight.train_step()
    for _ in range(3):
        mixed.train_step()
    for key, value in straight.state_dict()["ema"].items():
        torch.testing.assert_close(mixed.state_dict()["ema"][key], value, rtol=1e-2, atol=1e-3)


def test_each_process_has_its_own_data_times_and_noise_and_together_they_are_one_process(two):
    alone, together = shown(None), [results["shown"][0] for results in two]
    for expected, given in zip(alone, together):
        assert all(torch.equal(a, b) for a, b in zip(expected, given))
    assert not torch.equal(together[0][2], together[1][2]) and not torch.equal(together[0][0], together[1][0])
    times = torch.cat([together[0][1], together[1][1]])
    assert len((times * 16).ceil().unique()) == 16  # stratified over both processes: one time in each sixteenth


def test_what_holds_in_one_process_all_of_them_hear_of(two):
    assert [results["any"] for results in two] == [[True, False]] * 2
    assert [results["mean"] for results in two] == [1.0, 1.0]


def test_what_the_first_process_does_alone_all_of_them_hear_of(two):
    assert [results["told"] for results in two] == [["0: é ", ""]] * 2
    assert [results["first"] for results in two] == [[0, "bad in 0"], [None, "bad in 0"]]


@pytest.mark.parametrize("options", [["--lora", "2"], ["--freeze-embedding"], []])
def test_with_shard_the_first_process_alone_opens_the_weights(options, tmp_path, monkeypatch):
    write("llama", tmp_path / "m", mask=False)
    words = ["--from", str(tmp_path / "m"), "--mask-token", "<mask>", "--length", "16", *options]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
    said = []
    first, other = World(torch.device("cpu")), World(torch.device("cpu"), rank=1)
    monkeypatch.setattr(World, "tell", lambda self, text: said.append(text) or text if self.first else said.pop(0))
    args, *_ = finetune.parse_args()
    args.shard = True
    model, tokenizer = finetune.open_shared(args, None, None, first)
    monkeypatch.setattr(finetune.families, "open_source", None)
    shape, same_tokenizer = finetune.open_shared(args, None, None, other)
    assert tokenizer.spec() == same_tokenizer.spec() and model.config == shape.config
    for part in ("named_parameters", "named_buffers"):
        given, empty = [{n: v for n, v in getattr(m, part)()} for m in (model, shape)]
        described = [[(n, v.shape, v.dtype, v.requires_grad) for n, v in values.items()] for values in (given, empty)]
        assert described[0] == described[1] and all(v.is_meta for v in empty.values())
    assert not any(v.is_meta for v in model.state_dict().values())


def torchrun(
    tmp_path: Path, *arguments: str, processes: int = 2, script: str = "train_text.py"
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port",
               free_port(), script, *arguments]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("rank, late", [({"RANK": "1"}, ""), ({}, "late")], ids=["torchrun's", "alone"])
def test_a_process_of_torchruns_ends_before_the_interpreter_does(rank, late):
    """Check that `leave` skips the interpreter's end, where a thread of gloo may abort the process.

    The output before it must appear, and the exit code must stay.
    """
    script = """import atexit; from cadd_min.utils.errors import InputError; from cadd_min.utils.cli import run
def main():
    atexit.register(print, "late", end="")
    print("said ", end="")
    raise InputError("x")
run(main)"""
    environment = {key: value for key, value in os.environ.items() if key != "RANK"} | rank
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "said " + late) and "x" in done.stderr


@pytest.fixture
def alone(monkeypatch):
    """Make this process the only process of a torchrun."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, value)
    with world("cpu") as processes:
        yield processes


@NEEDS_FSDP2
def test_a_sharded_model_is_compiled_a_block_at_a_time(alone, monkeypatch):
    """Compare steps of the compiled model with steps of the plain model. The tracer runs without code generation."""
    traced, real = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, fullgraph=True: traced.append(f) or real(f, fullgraph=fullgraph, backend="eager")
    )
    norms = []
    for compiled in (False, True):
        fitted = made(alone, accumulate=2, shard=True, compile=compiled)
        norms.append([float(fitted.train_step()["grad_norm"]) for _ in range(3)])
        state = fitted.state_dict()["ema"]
    assert len(traced) == len(nano().blocks()) + 1 and norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert state.keys() == nano().state_dict().keys()


class Dispatched(TorchDispatchMode):
    """A mode that records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@NEEDS_FSDP2
def test_accumulation_shares_gradients_once_a_step(alone, monkeypatch):
    """Count how often FSDP2 packs gradients to share them: as often for four micro-batches as for one.

    It packs once for each block and once for the other parameters. The twin shares after each micro-batch.
    """
    counts = []
    for accumulate, twin in ((1, False), (4, False), (4, True)):
        if twin:
            monkeypatch.setattr("cadd_min.training.trainer.accumulate_only", lambda through, only: None)
        fitted = made(alone, accumulate=accumulate, shard=True)
        with Dispatched() as dispatched:
            fitted.backward()
        counts.append(sum("chunk_cat" in name for name in dispatched.names))
    assert counts[0] == counts[1] == len(nano().blocks()) + 1 and counts[2] == 4 * counts[0]


@pytest.mark.parametrize("seconds, looks", [(0.001, 10), (0.3, 3), (60.0, 1)])
def test_long_steps_are_looked_at_one_by_one(seconds, looks, monkeypatch, tmp_path):
    """Check the steps between two looks at an interrupt, for steps of three lengths.

    torchrun kills its processes 30 seconds after SIGTERM, so a run with long steps has to look after each.
    """

    class Two(World):
        mean = staticmethod(float)

    fitted, clock, asked = made(None), [0.0], []
    fitted.world = Two(torch.device("cpu"), 0, 2)
    monkeypatch.setattr("cadd_min.training.loop.time.monotonic", lambda: clock[0])
    running = Fit(fitted, Run(tmp_path, [], lambda *_: "", {}), FitConfig())
    monkeypatch.setattr(Two, "any", lambda self, here: asked.append(fitted.step) or here)
    for fitted.step in range(40):
        assert not running._stopping([])
        clock[0] += seconds
    assert asked[:2] == [0, 1] and {b - a for a, b in zip(asked[1:], asked[2:])} == {looks}
    fitted.step += looks
    assert running._stopping([signal.SIGTERM])


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_once_and_says_so_once(text, tmp_path):
    out = tmp_path / "run"
    command = (
        f"-m torch.distributed.run --nproc-per-node=2 --master-port {free_port()} train_text.py {TINY} --steps 100000"
    )
    command += f" --dataset {text} --cache {tmp_path} --out {out} --dtype float32 --log-every 1 --eval-every 0"
    with subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
        until = time.time() + 300
        while time.time() < until and not (out / "metrics.jsonl").exists():
            time.sleep(0.1)
        time.sleep(1)
        running.send_signal(signal.SIGTERM)
        errors = running.communicate(timeout=300)[1]
    assert len(re.findall(r"stopped after step \d+, saved in", errors)) == 1
    assert checkpoint.load(out)["trainer"]["step"] >= 1 and not list(out.glob("*.tmp"))


@pytest.mark.slow
@SHARD
def test_torchrun_trains_samples_and_goes_on_alone(shard, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("To be, or not to be, that is the question. " * 400)
    out = tmp_path / "run"
    common = ["--preset", "nano", "--length", "16", "--vocab-size", "300", "--batch-size", "4", "--dtype", "float32",
              "--log-every", "1", "--eval-every", "4", "--sample-every", "4", "--cache", str(tmp_path / "cache"),
              "--dataset", str(text), "--out", str(out)]  # fmt: skip
    done = torchrun(tmp_path, *common, "--steps", "6", *(["--shard"] if shard else []))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained:") == 1 and "in 2 processes" in done.stdout  # only the first process prints
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl") if "ce" in row] == [1, 2, 3, 4, 5, 6]
    saved = checkpoint.load(out)
    assert saved["settings"]["accumulate"] == 2 and saved["trainer"]["seen"] == 48
    done = torchrun(tmp_path, "--resume", "--out", str(out), "--steps", "7")
    assert done.returncode == 0, done.stderr
    alone = [sys.executable, "train_text.py", "--resume", "--out", str(out), "--steps", "8", "--no-shard"]
    assert subprocess.run(alone, cwd=ROOT, capture_output=True).returncode == 0
    assert checkpoint.load(out)["trainer"]["seen"] == 64  # the steps are as large as before


@pytest.mark.slow
@pytest.mark.parametrize(
    "shard, lora", [(False, "2"), (True, "2"), (True, "0")], ids=["ddp, lora", "fsdp2, lora", "fsdp2"]
)
def test_an_upgraded_model_is_tuned_by_two_processes_as_by_one(shard, lora, tmp_path):
    write("llama", tmp_path / "m", mask=False)  # its head is its embedding
    (tmp_path / "t.txt").write_text("the dog and the cat of the hill " * 400)
    common = ["--from", str(tmp_path / "m"), "--mask-token", "<mask>", "--dataset", str(tmp_path / "t.txt"), "--cache",
              str(tmp_path), "--lora", lora, "--length", "16", "--batch-size", "4", "--accumulate", "2", "--steps", "4",
              "--lr", "1e-2", "--warmup", "1", "--log-every", "1", "--eval-every", "4", "--sample-every", "4",
              "--dtype", "float32", "--checkpointing"]  # fmt: skip
    both = [*common, "--out", str(tmp_path / "both"), *(["--shard"] if shard else [])]
    done = torchrun(tmp_path, *both, script="finetune.py")
    assert done.returncode == 0, done.stderr
    alone = [sys.executable, "finetune.py", *common, "--out", str(tmp_path / "one")]
    assert subprocess.run(alone, cwd=ROOT, capture_output=True).returncode == 0
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("both", "one")]
    for both_row, one_row in zip(*rows):
        for name in ("grad_norm", "val_bound"):  # the CE that is logged is a mean of the processes' own
            if name in one_row:
                assert both_row[name] == pytest.approx(one_row[name], rel=2e-4), name
    sizes = [(tmp_path / name / checkpoint.FILE).stat().st_size for name in ("both", "one")]
    assert sizes[0] < 1.05 * sizes[1]  # what is frozen or tied is there once
    states = [checkpoint.load(tmp_path / name)["trainer"]["ema"] for name in ("both", "one")]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], atol=2e-5, rtol=1e-3)


@pytest.mark.slow
def test_bad_input_under_torchrun_is_said_in_a_sentence(tmp_path):
    done = torchrun(
        tmp_path, "--dataset", "sotu", "--preset", "nano", "--accumulate", "3", "--out", str(tmp_path / "r")
    )
    assert done.returncode != 0
    # torchrun ends the other process as soon as the first has ended: either may say it
    assert re.search("error( in process 1)?: accumulate 3: must be a multiple of the 2 processes", done.stderr)
    assert not (tmp_path / "r" / checkpoint.FILE).exists()


def test_sharding_alone_is_refused():
    assert not launched()
    with pytest.raises(InputError, match="torchrun"):
        made(None, shard=True)
