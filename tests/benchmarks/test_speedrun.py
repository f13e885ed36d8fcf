"""benchmarks/speedrun.py for a few seconds: the shape of what it measures, not its speed."""

import json
import sys

import pytest
import torch

from benchmarks import speedrun
from cadd_min.data import corpus
from cadd_min.data.batches import text_batches
from cadd_min.utils.errors import InputError

MOLECULES = ["CC", "CCO", "C1CC1", "CC=O", "N", "OCC#N", "CCN", "C=C"] * 60


def measured(tmp_path, monkeypatch, *options: str) -> list[dict]:
    """Run the benchmark for two seconds a row, and return the rows that it wrote."""
    (tmp_path / "small.txt").write_text("".join(f"{m}{'C' * (i % 7)}\n" for i, m in enumerate(MOLECULES)))
    monkeypatch.setattr(speedrun, "HELD_OUT", 256)
    common = f"--molecules {tmp_path / 'small.txt'} --cache {tmp_path} --preset nano --seconds 2 --seeds 1 --threads 1"
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["speedrun", *common.split(), "--out", str(out), *options])
    speedrun.main()
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def test_the_rows_of_ten_seconds(tmp_path, monkeypatch, capsys):
    rows = measured(tmp_path, monkeypatch, *"--tracks lines --models mdlm ar --rows before third".split())
    assert [(r["model"], r["row"]) for r in rows] == [(m, row) for m in ("mdlm", "ar") for row in ("before", "third")]
    for r in rows:
        assert r["updates"] > 1 and r["tokens"] == r["updates"] * 32 * 32
        times, bounds = zip(*r["curve"])
        assert list(times) == sorted(times) and bounds[-1] == r["bound"] and 0 < r["bound"] < 10
        assert ("by_t" in r) == (r["model"] == "mdlm")
    assert [r["budget"] for r in rows] == [2, 2 / 3] * 2
    shown = capsys.readouterr().out
    assert shown.count("| lines |") == 4 and "(n): seeds" in shown
    monkeypatch.setattr(sys, "argv", ["speedrun", "--table", str(tmp_path / "rows.jsonl")])
    speedrun.main()
    assert capsys.readouterr().out.strip() == shown.strip()


def test_a_change_that_is_undone_is_gone(tmp_path, monkeypatch):
    """Check what each row's untrained model is: gates, and a head that knows the law of the corpus."""
    files = corpus._sotu_files()[:12]
    monkeypatch.setattr(corpus, "_sotu_files", lambda: files)
    job = {"track": "text-4096", "preset": "nano", "model": "mdlm", "seed": 0, "cache": str(tmp_path)}
    tokens = speedrun.open_track("text-4096", job)
    data = text_batches(tokens.split("train"), 128, 8)
    rows = ("before", "now", "no-gates", "no-counts")
    nets = {row: speedrun.build(job | {"row": row}, 4096, data) for row in rows}
    for row, net in nets.items():
        gates = net.blocks()[0].ada.bias.view(6, -1)[2]
        assert bool((gates == 1).all()) == (row in ("now", "no-counts"))
        knows = row in ("now", "no-gates")
        assert (net.head.bias is not None) == knows and bool(net.head.weight.any()) == knows
    x_t, z_t = torch.full((1, 128), 4096), torch.zeros(1, 128, 0)
    val = torch.from_numpy(tokens.split("val")[0:4000].astype("int64"))
    ce = {row: -nets[row](x_t, z_t, torch.ones(1)).log_softmax(-1)[0, 0, val].mean() for row in ("before", "no-gates")}
    assert ce["no-gates"] < ce["before"] - 1, "the unigram law costs less than log V"


@pytest.mark.parametrize(
    "options, message",
    [
        ("--tracks molecules", "needs --molecules"),
        (
            "--tracks lines --molecules nothere.txt",
            "needs --molecules, a file with one molecule a line, not nothere.txt",
        ),
        ("--models gpt2", "--models must be one of"),
        ("--seconds 0", "must be greater than 0"),
    ],
)
def test_what_is_wrong_is_said_at_once(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["speedrun", *options.split(), "--cache", str(tmp_path)])
    with pytest.raises(InputError, match=message):
        speedrun.main()
