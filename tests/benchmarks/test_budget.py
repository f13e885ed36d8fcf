"""benchmarks/budget.py, its tasks and shift.py: true data has no errors, broken data has, and the tables by hand."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import budget, clock, shift, specs, text
from benchmarks.sources import ExactDenoiser
from benchmarks.tasks import TASKS, Chain, open_task
from cadd_min.data import sudoku
from cadd_min.forward import q_sample
from cadd_min.loss import T_MIN, log_probs, stratified_times
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.orders import Sampling
from cadd_min.training.trainer import TrainConfig
from cadd_min.utils.device import seeded
from cadd_min.utils.errors import InputError
from tests.toys import trainer


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Write 2,401 short molecules, and make a small pool of grids. Returns the arguments of `open_task`."""
    parts = ["C", "CC", "O", "N", "CO", "C=C", "CN"]
    lines = [a + b + c + d for a in parts for b in parts for c in parts for d in parts]
    np.random.default_rng(0).shuffle(lines)
    (tmp_path / "m.txt").write_text("\n".join([*lines, "C" * 60]))
    monkeypatch.setattr(sudoku, "POOL", 3)
    return 0, tmp_path, tmp_path / "m.txt"


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """Shuffle the tokens of each sequence: every token is as frequent as it was."""
    return x.gather(1, torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).argsort(1))


@pytest.mark.parametrize("name", TASKS)
def test_true_data_is_right_and_shuffled_data_is_not(small, name):
    task = open_task(name, *small)
    x = task.real(100, 0)
    assert x.shape[1] == task.length and 50 < len(x) <= 100 and x.max() < task.vocab_size
    true, wrong = task.score(x), task.score(shuffled(x))
    assert true["error"] < (15 if name == "digits" else 0.02) and "variety" in true  # FD of 100 images is high
    assert wrong["error"] > true["error"] + 0.15
    batch = task.data(6, 0)(3).x_0
    assert batch.shape == (6, task.length) and torch.equal(batch, task.data(6, 0)(3).x_0)
    assert not torch.equal(batch, task.data(6, 0)(4).x_0) and not torch.equal(batch, task.data(6, 1)(3).x_0)
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    net = task.build("nano", 0, **{k: v for k, v in task.settings.items() if k in fields})
    assert (net.config.length, net.config.vocab_size) == (task.length, task.vocab_size)
    assert net.config.head_bias == (name == "molecules"), "these start as train_text.py starts them"


def test_samples_of_one_kind_have_less_variety(small):
    grids, molecules = (open_task(name, *small) for name in ("sudoku", "molecules"))
    x = grids.real(2000, 0)
    assert abs(grids.score(x)["variety"] - math.log2(9)) < 0.02, "every digit is as likely in every cell"
    assert grids.score(x[:1].repeat(9, 1))["variety"] == 0
    x = molecules.real(5000, 0)
    kinds = x[["O" in molecules._lines(row[None])[0] for row in x]]
    true, narrow = (molecules.score(part) for part in (x, kinds))
    assert true["error"] == narrow["error"] == 0 and true["FD"] < 0.01 < 0.2 < narrow["FD"]
    assert "FD" not in molecules.score(x[:50]), "of 50 molecules it says little"


def test_lines_that_are_too_long_are_counted(small):
    task = open_task("molecules", *small)
    (note,) = task.notes
    assert note.startswith("m.txt, ") and "1 of " in note
    held_out = task.real(5000, 0)
    assert task.data(4, 0).per_epoch + len(held_out) == 2401, "no molecule stands there twice"


def test_a_run_is_trained_sampled_parted_and_kept(tmp_path, monkeypatch, capsys):
    ask = (
        "--tasks chain --train mdlm cadd:drop_latent=0.5,batch_size=8 --minutes 0.02 --preset nano --seeds 2 "
        "--chains soft hard soft:time_grid=cosine soft:strength=0.5,time_grid=cosine"
    )
    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["budget", *ask.split(), *f"--samples 32 --T 2 8 --out {file}".split()])
    budget.main()
    shown = capsys.readouterr().out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(row["job"] for row in rows) == [0, 1, 2, 3]
    for row in rows:
        assert row["updates"] > 0 and row["clock"] >= 1.2 and 0 <= row["true"]["error"] < 0.01
        plain, grids = ["soft", "hard"], ["soft:time_grid=cosine", "soft:strength=0.5,time_grid=cosine"]
        if row["model"] == "mdlm":
            plain, grids = ["hard"], ["hard:time_grid=cosine"]
        expected = [f"{zhat} {T}" for zhat in plain for T in (2, 8, "one")]
        assert list(row["scores"]) == expected + [f"{chain} {T}" for chain in grids for T in (2, 8)]
        assert all(0 < score["error"] <= 1 for score in row["scores"].values())
    assert "| cadd:drop_latent=0.5,batch_size=8 soft |" in shown and "| mdlm hard:time_grid=cosine |" in shown
    assert "0.02 minutes of training with 1 thread(s)" in shown
    monkeypatch.setattr(sys, "argv", ["budget", "--table", str(file)])
    budget.main()
    assert capsys.readouterr().out.strip() == shown.strip()
    file.write_text(file.read_text() + json.dumps(rows[0]) + "\n")
    with pytest.raises(InputError, match=r"has the run chain .* 2 times"):
        budget.main()


def test_the_parts_of_an_error_by_hand():
    """Part the errors .5 and .4 of the masked model at T = 4 and 8, .3 at one token a step, where true data has .1."""

    def row(spec: str, seed: int, by_steps: dict) -> dict:
        zhat = "hard" if spec == "mdlm" else "soft"
        scores = {f"{zhat} {T}": {"error": e, "variety": 1.0} for T, e in by_steps.items()}
        true = {"error": 0.1, "variety": 2.0}
        return {"task": "x", "spec": spec, "model": spec, "seed": seed, "scores": scores, "true": true}

    def rows(*laws: float) -> list[dict]:
        """Make two seeds whose laws differ by much, and the price of few steps by .02."""
        found = []
        for seed, (law, d) in enumerate(zip(laws, (-0.01, 0.01))):
            found.append(row("mdlm", seed, {4: 0.5 + d + law, 8: 0.4 + 10 * d + law, "one": 0.3 + law}))
            found.append(row("cadd", seed, {4: 0.4 + law, 8: 0.4 + law, "one": 0.35 + law}))
        return found

    lines = budget.parted("x", rows(0.0, 0.0)).splitlines()
    assert lines[0] == "| x | network | steps | back: cadd soft |"
    assert lines[2] == "| T = 4 | 0.200 | 0.200 ± 0.014 | 50% |"
    assert lines[3] == "| T = 8 | 0.200 | 0.100 ± 0.141 |  |", "less than two standard errors"
    other = budget.parted("x", rows(0.0, 0.3)).splitlines()
    assert other[2] == "| T = 4 | 0.350 | 0.200 ± 0.014 | 50% |", "another law is another network, not another price"
    alone = budget.parted("x", [*rows(0.0, 0.0), row("mdlm", 2, {4: 9.0, 8: 9.0, "one": 0.3})])
    assert alone.splitlines() == lines, "a seed without its pair is left out"
    shown = budget.errors("x", rows(0.0, 0.0)).splitlines()
    assert shown[0] == "| x | T = 4 | T = 8 | one |"
    assert shown[2] == "| mdlm | 0.500 ± 0.014 (1.00) | 0.400 ± 0.141 (1.00) | 0.300 ± 0.000 (1.00) |"
    assert shown[3].startswith("| cadd soft | 0.400 ± 0.000") and shown[-1].startswith(
        "| true data | 0.100 ± 0.000 (2.00) |"
    )


def test_the_bits_of_text_are_parted_where_a_price_is_large_enough():
    """Part 4.5 and 3.9 bits at T = 2 and 4 of L = 8, 3.8 at T = 8. Held-out text has 2."""

    def row(spec: str, scores: dict) -> dict:
        scores = {name: {"judge_bpc": bits} for name, bits in scores.items()}
        return {"spec": spec, "model": spec, "seed": 0, "length": 8, "real": {"judge_bpc": 2.0}, "scores": scores}

    masked = row("mdlm", {"steps 2": 4.5, "steps 4": 3.9, "steps 8": 3.8})
    other = row("cadd", {f"steps {T}, zhat soft": bits for T, bits in ((2, 4.15), (4, 3.9), (8, 3.9))})
    assert text.parts([masked, other]).splitlines() == [
        "| bits a character | network | steps | back: cadd zhat=soft |",
        "|---|---|---|---|",
        "| T = 2 | 1.800 | 0.700 | 50% |",
        "| T = 4 | 1.800 | 0.100 |  |",
    ]
    assert text.parts([masked, masked, other, other]) == text.parts([masked, other]), "a run counts once"
    assert (
        text.parts([other]) == text.parts([row("mdlm", {"steps 4": 3.9})]) == text.parts([row("mdlm", {"": 3})]) == ""
    )


# ------------------------------------------------------------------------------------------------ shift


def test_the_exact_denoiser_does_not_diverge_from_itself_and_a_doubting_one_does():
    task = Chain(0)
    net = task.build("nano", 0, latent_norm=2.0)
    exact, doubting = (ExactDenoiser(task.source, net.table(), net.schedule, share) for share in (0.0, 0.3))
    states = shift.true_states(task, net, 4, 64, 0)
    assert [float(t[0]) for _, _, t in states] == [0.25, 0.5, 0.75]
    assert shift.divergence(task, exact, exact, states) == (0, 0)
    assert shift.divergence(task, exact, doubting, states)[0] > 0.01
    assert shift.divergence(task, exact, net.eval(), states)[0] > 1
    x, states = shift.visited(net, net, Sampling(4, "soft"), 64, 0)
    assert x.shape == (64, 32) and [float(t[0]) for _, _, t in states] == [0.75, 0.5, 0.25]
    assert shift.divergence(task, exact, net, states)[1] > 0.3, "an untrained network is soon where no sequence is"


def test_a_state_is_possible_where_a_path_of_the_chain_leads_through_its_tokens():
    source = Chain(0, topics=2).source
    x = source.draw(200, torch.Generator().manual_seed(0))
    hidden = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.7, source.mask_id, x)
    assert source.possible(x).all() and source.possible(hidden).all()
    wrong = x.clone()
    never = (source.law.sum(0)[x[:, 3]] == 0).int().argmax(1)
    wrong[:, 4] = never
    assert not source.possible(wrong).any()
    far = torch.full_like(x, source.mask_id)
    far[:, 0], far[:, 2] = x[:, 0], x[:, 2]
    assert source.possible(far).all()


def test_tuning_moves_the_network_towards_the_exact_posterior_and_leaves_the_table():
    task = Chain(0)
    net = task.build("nano", 0)
    table, exact = net.table().clone(), ExactDenoiser(task.source, net.table(), net.schedule)
    states = shift.visited(net, net, Sampling(4, "soft"), 64, 99)[1]
    before = shift.divergence(task, exact, net, states)[0]
    shift.tune(net, task, exact, Sampling(4, "soft"), 60, 0)
    assert torch.equal(net.table(), table)
    assert shift.divergence(task, exact, net, states)[0] < before - 0.05


class Knowing(Denoiser):
    """A model whose logits are the exact posterior of its task."""

    def forward(self, x_t, z_t, t, label=None):
        return ExactDenoiser(Chain(0).source, self.table(), self.schedule)(x_t, z_t, t)


def test_the_loss_of_a_taught_network_has_the_exact_posterior_as_its_target():
    """The exact posterior is calibrated: its cross-entropy to itself is that to the true tokens, but for the draw."""
    task = Chain(0)
    batch, u = task.data(512, 0)(0), stratified_times(512, seeded(0, 0))
    model = Knowing(task.config("nano", latent_norm=2.0))
    by_law = shift.exact_loss(task, model, batch, u, TrainConfig(), seeded(0, 1))
    t = T_MIN + (1 - T_MIN) * u
    states = q_sample(batch.x_0, model.table()[batch.x_0], t, model.schedule, model.mask_id, generator=seeded(0, 1))
    nll = -log_probs(model(*states, t.float()), model.mask_id).gather(-1, batch.x_0[..., None])[..., 0]
    masked = states[0] == model.mask_id
    assert by_law.masked == masked.sum() > 5000
    assert float(by_law.ce / by_law.masked) == pytest.approx(float(nll[masked].mean()), rel=0.05)
    assert float(by_law.total) == pytest.approx(float(by_law.ce) / batch.x_0.numel())


def test_a_taught_network_nears_the_exact_posterior():
    task = Chain(0)
    pupil = shift.taught(task, {"model": "cadd", "options": {}, "preset": "nano", "seed": 0}, 60)
    found = []
    for net in (pupil, task.build("nano", 0).eval()):
        exact = ExactDenoiser(task.source, net.table(), net.schedule)
        found.append(shift.divergence(task, exact, net, shift.true_states(task, net, 4, 64, 0))[0])
    assert found[0] < found[1] - 0.3


def test_the_rows_of_shift(tmp_path, monkeypatch, capsys):
    ask = "--train mdlm cadd --minutes 0.01 --preset nano --samples 16 --teach --tune 3 --jobs 1 --T 3"
    monkeypatch.setattr(sys, "argv", ["shift", *ask.split(), "--out", str(tmp_path / "r.jsonl")])
    shift.main()
    lines = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    expected = [
        *((f"mdlm{kind}", "hard") for kind in ("", ", taught", ", tuned")),
        *((f"cadd{kind}", z) for kind in ("", ", taught", ", tuned") for z in ("soft", "hard")),
    ]
    assert [(name.strip("| "), zhat) for name, zhat in lines] == expected
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    doubts = [[row[kind][zhat]["doubt"] for kind in ("trained", "taught")] for row, zhat in zip(rows, ("hard", "soft"))]
    assert doubts[0] == [0, 0] and doubts[1][0] > 0 == doubts[1][1], "a masked or a taught network has no wrong hints"


# ------------------------------------------------------------------------------------------------ runs


def test_the_learning_rate_ends_its_decay_with_the_seconds(monkeypatch):
    """Train by a clock on which each step takes 1/64 second, and measuring any time at all."""
    ticks = itertools.count()
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 64))
    run, found = trainer(steps=10), []
    for seconds in clock.train_for(run, 1.5, (0.25, 1.0)):
        found.append((run.step, seconds))
        next(ticks)
    assert found == [(24, 0.375), (96, 1.5)] and run.config.steps == 96


def slow_first(job: dict) -> dict:
    """Return the job: the first and those from the fifth on after half a second, and the fourth never."""
    if job["n"] == 0 or job["n"] > 3:
        time.sleep(0.5)
    if job["n"] == 3:
        raise ValueError("the fourth")
    return job


def test_each_run_is_written_when_it_ends_and_returned_in_order(tmp_path):
    rows = specs.run_all(slow_first, [{"n": n} for n in range(3)], 2, tmp_path / "out.jsonl")
    assert [row["n"] for row in rows] == [0, 1, 2]
    written = [json.loads(line)["n"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(written) == [0, 1, 2]
    assert [row["n"] for row in specs.read_rows(tmp_path / "out.jsonl")] == [0, 1, 2]


def test_a_run_that_fails_loses_no_other(tmp_path):
    with pytest.raises(ValueError, match="the fourth"):
        specs.run_all(slow_first, [{"n": n} for n in (3, 0, *range(4, 34))], 2, tmp_path / "out.jsonl")
    written = [json.loads(line)["n"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert 0 in written and len(written) < 30, "a run that had begun is written, and no run begins after a failure"


def beat(job: dict) -> dict:
    """Write a byte every 20 ms, for two minutes."""
    for _ in range(6000):
        with Path(job["file"]).open("a") as file:
            file.write(".")
        time.sleep(0.02)
    return job


def test_runs_end_with_a_parent_that_is_killed(tmp_path):
    """Kill the process that waits for a run. The run's own process would go on for nobody."""
    file = tmp_path / "beats"
    jobs = [{"file": str(file)}]
    parent = multiprocessing.get_context("spawn").Process(target=specs.run_all, args=(beat, jobs, 1, None))
    parent.start()
    while not file.exists():
        time.sleep(0.1)
    parent.kill()
    parent.join()
    for _ in range(60):
        before = file.stat().st_size
        time.sleep(0.5)
        if file.stat().st_size == before:
            return
    pytest.fail("the run still writes after half a minute")


@pytest.mark.parametrize("options, message", [
    ("--tasks molecules", "needs --molecules"), ("--tasks chess", "--tasks must be one of"),
    ("--minutes 0", "must be greater than 0"), ("--train cadd:speed=2", "no field of ModelConfig"),
    ("--train mdlm ar", "--train must be one of"), ("--train cadd:steps=9", "steps is set by the benchmark"),
    ("--train cadd:length=9", "length is set by the benchmark"), ("--chains sotf", "zhat must be one of"),
    ("--preset tny", "--preset must be one of"), ("--train cadd:hint=foo", "hint must be one of"),
    ("--chains soft:T=3", "'T' is no field of Sampling"), ("--chains soft:steps=3", "does not stand behind the colon"),
    ("--chains soft:top_p=2", "top_p must be"), ("--chains soft:time_grid=first-hitting", "first-hitting ignores T"),
    ("--train cadd:strength=2", "no field of ModelConfig or TrainConfig"),
    ("--train cadd:lr=0", "lr must be"), ("--T 0", "steps must be"), ("--out nowhere/rows", "cannot be written"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_a_model_is_trained(options, message, tmp_path, monkeypatch):
    tasks = "" if "--tasks" in options else "--tasks chain"
    monkeypatch.setattr(sys, "argv", ["budget", *options.split(), *tasks.split(), "--cache", str(tmp_path)])
    monkeypatch.setattr(budget, "run_all", None)
    with pytest.raises(InputError, match=message):
        budget.main()
