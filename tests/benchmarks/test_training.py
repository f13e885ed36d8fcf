"""The parts of a training step in benchmarks/training.py, for the models that docs/scaling.md compares."""

import argparse
import json

import pytest
import torch

from benchmarks import specs, training
from benchmarks.specs import parse
from cadd_min.utils.errors import InputError

MODELS = ["ar", "gpt2", "mdlm", "cadd:mse=1"]
PARTS = ["forward noising", "network", "head and loss", "clip, AdamW", "EMA", "not in a part", "step"]


@pytest.fixture
def models():
    pytest.importorskip("transformers")
    args = {"preset": "nano", "unet": None, "vocab_size": 300, "length": 256, "batch_size": 1, "dtype": "float32"}
    args |= {"device": "cpu", "compile": False}
    return {spec: training.build(spec, argparse.Namespace(**args)) for spec in MODELS}


def test_parts_and_the_rest_add_up_to_the_step(models, capsys):
    """Check the printed table: its parts, which model has which, and that times and shares add up to the step."""
    training.report_parts(models, 2, torch.device("cpu"))
    header, _, *lines = [line[2:-2].split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert header == ["part", *(word for spec in MODELS for word in (f"{spec} ms", "share"))]
    table = {name: [cell.strip() for cell in cells] for name, *cells in lines}
    assert list(table) == PARTS
    for n, spec in enumerate(MODELS):
        ms, share = ({part: cells[2 * n + k] for part, cells in table.items() if cells[2 * n + k]} for k in range(2))
        absent = {"ar": {"forward noising"}, "gpt2": {"forward noising", "EMA"}}.get(spec, set())
        assert ms.keys() == share.keys() == set(PARTS) - absent
        assert sum(map(float, ms.values())) == pytest.approx(2 * float(ms["step"]), abs=0.5)
        assert sum(float(v[:-1]) for v in share.values()) == pytest.approx(200, abs=4)


@pytest.mark.parametrize("spec", MODELS)
def test_parts_do_what_the_step_does(spec, models, monkeypatch):
    """Check that the update finds gradients, that the two passes leave them alone, and how many rows the head meets.

    Otherwise a part would be timed while it does nothing. The rows are all of them for ar, and about half for others.
    """
    rows, token_losses = [], training.token_losses
    monkeypatch.setattr(training, "token_losses", lambda h, *a, **k: rows.append(len(h)) or token_losses(h, *a, **k))
    model = models[spec]
    model.step()
    parts = model.parts()
    model.backward()
    before = [p.detach().clone() for p in model.net.parameters()]
    gradients = [p.grad.clone() for p in model.net.parameters() if p.grad is not None]
    for part in ("network", "head and loss"):
        assert any(g is not None and g.any() for g in parts[part]())
    after = [p.grad for p in model.net.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, after, strict=True))
    parts["clip, AdamW"]()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.net.parameters(), strict=True))
    if spec != "gpt2":
        assert rows == [256] if spec == "ar" else 100 < rows[0] < 156


def test_rows_of_unlike_runs_are_no_table(tmp_path):
    rows = [{"spec": "cadd", "seed": seed, "steps": 100, "num": 8} for seed in range(3)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert specs.read_rows(file) == rows
    file.write_text(file.read_text() + json.dumps(rows[0] | {"num": 16}) + "\n")
    with pytest.raises(InputError, match="rows of different num, 8 and 16"):
        specs.read_rows(file)


def test_the_values_of_a_spec_are_heeded_or_refused():
    assert parse("cadd:bayes_head=true,compile=False") == ("cadd", {"bayes_head": True, "compile": False})
    with pytest.raises(InputError, match="bayes_head must be of type bool, not 'yes'"):
        parse("cadd:bayes_head=yes")
