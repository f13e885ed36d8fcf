"""evaluate.py on models of text, with a stub and with the real judge; and benchmarks/text.py from end to end."""

import argparse
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import text as benchmark
from cadd_min.checkpoints import file as checkpoint
from cadd_min.data.batches import text_batches
from cadd_min.data.corpus import open_corpus
from cadd_min.data.token_folder import prepare
from cadd_min.data.tokenizer import chars, gpt2
from cadd_min.dit import PRESETS
from cadd_min.evaluation import text as assess_text
from cadd_min.evaluation import text_judge
from cadd_min.model import BASELINES, MODELS, Denoiser, ModelConfig
from cadd_min.orders import Sampling
from cadd_min.training.counts import log_frequencies, sequences
from cadd_min.utils.errors import InputError
from tests.toys import ROOT, TINY, save_untrained

SPEC = gpt2(300).spec()
SMALL = "--num 6 --steps 3 --batch-size 4"


def test_the_bound_of_every_model(call, text):
    """Train, sample and evaluate every model. The bound's parts must add up; only cadd and cdm pay for latents."""
    for model in MODELS:
        assert call(f"train_text.py --dataset {text} {TINY} --model {model} --out {model}")[0] == 0
        code, out, _ = call(f"sample.py --ckpt {model} --steps 3")
        assert code == 0 and ("a step for each token" if model == "ar" else "T 3 (uniform)") in out
    code, out, err = call(f"evaluate.py bound --num 6 --repeat 2 --ckpt {' '.join(MODELS)}")
    assert code == 0, err
    for model, part in zip(MODELS, out.split("\n\n")):
        value = {m[0].strip(): float(m[1]) for m in re.findall(r"^(\D+?)  +([\d.]+)$", part, re.M)}
        limit = 1e9 if model == "cdm" else 100
        assert f"model {model} at step 4" in part and 0 < value["bound, nats per token"] < limit
        parts = value["of it tokens"] + value["of it latents"]
        assert parts == pytest.approx(value["bound, nats per token"], abs=2e-4, rel=1e-6)
        assert (value["of it latents"] > 0.001) == (model in ("cadd", "cdm"))
    code, out, _ = call("evaluate.py bound --num 6 --ckpt cadd --T 4")
    assert code == 0 and "T 4," in out


def test_a_new_run_starts_at_the_counts_of_its_corpus(call, text, monkeypatch):
    """Check the head and the embedding after a step that is too small to change them, and after a resumed one."""
    torch.manual_seed(0)
    plain = Denoiser(ModelConfig(300, 16, PRESETS["nano"], head_bias=True))
    assert call(f"train_text.py --dataset {text} {TINY} --steps 1 --lr 1e-12 --weight-decay 0 --out run")[0] == 0
    content = checkpoint.load(Path("run"))
    args = argparse.Namespace(dataset=content["settings"]["dataset"], cache=Path(content["settings"]["cache"]))
    tokens = prepare(open_corpus(args.dataset, args.cache), gpt2(300), args.cache).split("train")
    state, counted = content["trainer"]["model"], sequences(text_batches(tokens, 16, 4, seed=0))
    assert counted.numel() > 0.9 * len(tokens)
    torch.testing.assert_close(state["head.bias"], log_frequencies(counted, 300))
    assert (state["embedding.weight"][:300] - plain.embedding.weight[:300]).norm() > 10
    with monkeypatch.context() as patch:
        patch.setitem(PRESETS, "nano", dataclasses.replace(PRESETS["nano"], gate=0.0))
        assert call(f"train_text.py --dataset {text} {TINY} --steps 1 --lr 1e-12 --weight-decay 0 --out closed")[0] == 0
    start = checkpoint.load(Path("closed"))["trainer"]["model"]
    assert "head.bias" not in start and start["head.weight"].abs().max() < 1e-9, "the gates of `closed` are closed"
    state["head.bias"][5] = 7.0
    checkpoint.save(Path("run") / checkpoint.FILE, content)
    assert call("train_text.py --resume --out run --steps 2")[0] == 0
    assert checkpoint.load(Path("run"))["trainer"]["model"]["head.bias"][5] == pytest.approx(7.0)


def test_the_bounds_units_of_short_documents(monkeypatch):
    """Check bits per character and perplexity on ten documents of two letters and an end each, 30 characters.

    The perplexity of a bound beyond floats is infinite.
    """
    model = Denoiser(ModelConfig(3, 15, PRESETS["nano"], model="mdlm"))
    args = argparse.Namespace(num=2, batch_size=2, T=None, repeat=1, seed=0, dtype="float32")
    held_out = torch.tensor([[0, 1, 2] * 5] * 2)
    for nats, perplexity in ((15.0, math.e), (15 * 800.0, math.inf), (math.inf, math.inf)):
        bound = torch.tensor([[nats, 0.0]], dtype=torch.float64).repeat(2, 1)
        monkeypatch.setattr(assess_text, "held_out_bound", lambda *a, bound=bound, **k: bound)
        row = assess_text.bound_rows(model, chars("ab"), held_out, args)
        assert row["bound, bits per character"] == pytest.approx(nats / 15 / math.log(2))
        assert row["bound, perplexity per token"] == pytest.approx(perplexity)


@pytest.mark.parametrize(
    "script, options, note",
    [
        ("train", "--model mdlm --evidence 0.3 --hint raw", "--evidence, --hint without effect on mdlm"),
        ("train", "--model cdm --discrete cosine", "--discrete without effect on cdm"),
        ("train", "--model ar --weighting elbo", "--weighting without effect on ar"),
        ("train", "--latent-norm 2 --evidence 0.3", "--evidence without effect on cadd"),
        ("train", "--drop-label 0.2", "--drop-label without effect on cadd"),
        ("train", "--evidence 0.3 --hint raw", ""),
        ("train", "--model mdlm --discrete cosine", ""),
        ("sample", "--ckpt mdlm --zhat soft --num-latents 2", "--num-latents, --zhat without effect on mdlm"),
        ("sample", "--ckpt cadd --time-grid first-hitting", ""),
        ("sample", "--ckpt cadd --time-grid first-hitting --steps 3", "--steps without effect on cadd"),
        ("sample", "--ckpt cadd --zhat soft --num-latents 2 --strength 0.5 --steps 3", ""),
        ("infill", "--ckpt cadd mdlm --strength 0.5 --steps 3", "--strength without effect on mdlm"),
    ],
)
def test_an_option_without_effect_is_said(script, options, note, call, text, tmp_path):
    """An option that the model ignores would make a table compare a model with itself."""
    for model in ("cadd", "mdlm"):
        save_untrained(tmp_path / model / "checkpoint.pt", ModelConfig(300, 8, PRESETS["nano"], model=model), SPEC)
    if script == "train":
        code, _, err = call(f"train_text.py --dataset {text} {TINY} --out run {options}")
    elif script == "sample":
        code, _, err = call(f"sample.py {options}")
    else:
        code, _, err = call(f"evaluate.py infill --num 4 --dataset {text} {options}")
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert code == 0 and len(notes) == bool(note), err
    assert not note or notes[0].startswith(f"note: {note}")


class Stub:
    """A judge that gives every text the same scores without reading it."""

    name = "stub"

    def read(self, texts):
        ones = np.ones(len(texts))
        return text_judge.Reading(ones, ones, ones, np.ones((len(texts), 2)))


def first_cells(out: str) -> list[str]:
    """Return the first cell of every row of the printed tables."""
    return [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]


def test_every_checkpoint_has_its_row_and_every_setting_its_name(call, text, monkeypatch):
    """Check the rows' names for files in one folder and for folders of one name. A frontier says what it varied."""
    monkeypatch.setattr(assess_text, "open_judge", lambda *rest: Stub())
    config = ModelConfig(300, 16, PRESETS["nano"], model="cadd")
    for path in ("x/a.pt", "x/b.pt", "y/run/checkpoint.pt", "z/run/checkpoint.pt"):
        save_untrained(Path(path), config, gpt2(300).spec())
    asked = f"--dataset {text} {SMALL} --ckpt"
    for command in ("samples", "infill --masked 0.5"):
        for paths, names in (
            ("x/a.pt x/b.pt", ["x/a.pt", "x/b.pt"]),
            ("y/run z/run x/a.pt", ["y/run/checkpoint.pt", "z/run/checkpoint.pt", "x"]),
        ):
            code, out, err = call(f"evaluate.py {command} {asked} {paths}")
            assert code == 0, err
            assert [re.search(r"\((.*)\)", cell)[1] for cell in first_cells(out) if "cadd" in cell] == names
    code, _, err = call(f"evaluate.py samples {asked} y y/run")
    assert code == 2 and "--ckpt must be different checkpoints, not y y/run" in err
    for options, settings, swept in (
        (
            "--top-ps 0.9 0.5 0.9 --temperature 0.7",
            ["temperature 0.7, top-p 0.5", "temperature 0.7, top-p 0.9"],
            "temperature 0.7, top-p 0.5, 0.9 in turn",
        ),
        (
            "--temperatures 0.5 1 --cosine-temperature 2.5 --top-p 0.8",
            ["temperature 2.5 to 0.5, top-p 0.8", "temperature 2.5 to 1.0, top-p 0.8"],
            "temperature 2.5 to 0.5, 2.5 to 1.0 in turn, top-p 0.8",
        ),
    ):
        code, out, err = call(f"evaluate.py frontier {asked} x/a.pt x/b.pt {options}")
        assert code == 0 and Path("frontier.png").exists(), err
        rows = [f"cadd ({path}), {setting}" for path in ("x/a.pt", "x/b.pt") for setting in settings]
        assert first_cells(out) == ["samples", "held-out text", *rows] and f", {swept}, strength" in out
    code, out, err = call(f"evaluate.py samples {asked} x/a.pt --time-grid first-hitting")
    assert code == 0 and "a step for each token (first-hitting)" in out and "T 3" not in out, err


def test_a_cosine_temperature_is_what_a_frontier_draws_by():
    """Check that a frontier with --cosine-temperature varies where the temperature ends, not where it starts."""
    names = "steps=8 zhat=hard num_latents=1 top_p=1 strength=1 time_grid=uniform order=random block=0 remask=0".split()
    args = benchmark.varied(names)[0] | {"temperature": 1.0, "cosine_temperature": 2.5, "seed": 0}
    points = assess_text.sweep(argparse.Namespace(**args, temperatures=[1.0, 0.5], top_ps=None))
    settings = [assess_text.generate.sampling(point) for point in points]
    assert [(s.temperature_at(1), s.temperature_at(0)) for s in settings] == [(2.5, 0.5), (2.5, 1.0)]


def test_the_table_is_there_when_the_picture_fails(call, text, monkeypatch):
    """Check that the table is printed before the picture is drawn: a failure must not lose an hour's scores."""
    monkeypatch.setattr(assess_text, "open_judge", lambda *rest: Stub())
    save_untrained(Path("a.pt"), ModelConfig(300, 16, PRESETS["nano"], model="mdlm"), gpt2(300).spec())
    Path("f.png").mkdir()
    code, out, err = call(f"evaluate.py frontier --ckpt a.pt --dataset {text} {SMALL} --out f.png")
    assert code == 2 and "f.png" in err and len(first_cells(out)) == 7


@pytest.mark.slow
def test_samples_and_frontier_stand_beside_real_text(call, text):
    """Check with the real judge that held-out text is the first row and scores better than a model of four steps."""
    for model in ("cadd", "ar"):
        assert call(f"train_text.py --dataset {text} {TINY} --model {model} --out {model}")[0] == 0
    code, out, err = call(f"evaluate.py samples --ckpt cadd ar {SMALL}")
    assert code == 0, err
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == ["samples", "held-out text", "cadd (cadd)", "ar (ar)"]
    real, cadd = (float(row.split("|")[2]) for row in rows[1:3])
    assert real < cadd  # four steps of training
    assert "MAUVE is left out: it needs --num 50" in out and "judge smollm2 in float32; 6 samples of 16 tokens" in out
    code, out, err = call(f"evaluate.py frontier --ckpt cadd {SMALL} --temperatures 0.5 1 --out f.png")
    assert code == 0 and Path("f.png").stat().st_size > 5000, err
    assert "temperature 0.5" in out and "temperature 1.0" in out


@pytest.mark.parametrize(
    "command, message",
    [
        ("samples --ckpt text.pt --dataset text.txt --num 0", "--num must be at least 1, not 0"),
        ("samples --ckpt text.pt --dataset text.txt --num 9999", "the held-out text has"),
        (
            "samples --ckpt text.pt --dataset text.txt --num 4 --judge no/such/judge",
            "the judge no/such/judge could",
        ),
        ("samples --ckpt text.pt", "does not say what it was trained on"),
        ("samples --ckpt text.pt --dataset nowhere", "--dataset must be one of"),
        ("frechet --ckpt text.pt", "frechet is for models of images"),
        ("bound --ckpt text.pt --archive x", "--archive is for models of images"),
        ("frontier --ckpt text.pt --dataset text.txt --out f.doc", "--out must be a .png file"),
        ("samples --ckpt text.pt other.pt --dataset text.txt", "must have one tokenizer and one length"),
        ("samples --ckpt udm.pt --dataset text.txt --order entropy --num 2", "order is for cadd, mdlm, cdm and sedd"),
        ("samples --ckpt text.pt --dataset text.txt --order best", "order must be one of random"),
        ("samples --ckpt short.pt --dataset text.txt --num 2", "must have 4 tokens at least"),
        ("infill --ckpt text.pt --dataset text.txt --masked 0.5 0", "--masked must be shares above 0"),
        ("infill --ckpt text.pt --dataset text.txt --num 100000", "--num: the held-out text has"),
        ("samples --ckpt nowhere --temperature=-1", "temperature must be 0 or more, not -1.0"),
        ("samples --ckpt nowhere --cosine-temperature=-1", "temperature must be 0 or more, not -1.0"),
        ("frontier --ckpt nowhere --temperatures 0.5 -1", "temperature must be 0 or more, not -1.0"),
        ("frontier --ckpt nowhere --top-ps 0.5 1.5", "top_p must be in (0, 1], not 1.5"),
        (
            "frontier --ckpt nowhere --top-ps 0.5 --temperatures 1",
            "--temperatures and --top-ps cannot be given together",
        ),
        ("frontier --ckpt nowhere --temperature 0.5", "give --temperatures, not --temperature 0.5"),
        ("frontier --ckpt nowhere --top-p 0.5 --top-ps 0.5 1", "give --top-ps, not --top-p 0.5"),
        (
            "frontier --ckpt nowhere --out nodir/f.png",
            "--out must be a file in a folder that is there, not nodir/f.png",
        ),
        ("frontier --ckpt nowhere --out matplotlib.png", "needs matplotlib: pip install matplotlib"),
        ("bound --ckpt nowhere --T 0", "--T must be at least 1, not 0"),
        ("infill --ckpt ar.pt --dataset text.txt --time-grid cosine", "the time grid cosine is not for ar"),
        ("samples --ckpt cdm.pt --dataset text.txt --time-grid first-hitting", "first-hitting is not for cdm"),
    ],
)
def test_bad_input_is_one_sentence(command, message, call, text, monkeypatch):
    """Check exit code 2 and one line of error, before the judge is loaded, which takes long."""
    if "no/such/judge" not in command:
        monkeypatch.setattr(assess_text, "open_judge", lambda *rest: pytest.fail("the judge was loaded"))
    if "matplotlib" in command:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    models = [
        ("text", 8, "cadd"),
        ("other", 9, "cadd"),
        ("short", 3, "mdlm"),
        *((m, 8, m) for m in ("ar", "udm", "cdm")),
    ]
    for name, length, model in models:
        config = ModelConfig(300, length, PRESETS["nano"], model=model)
        save_untrained(Path(f"{name}.pt"), config, gpt2(300).spec())
    code, _, err = call(f"evaluate.py {command}")
    shown = err.split("\r")[-1].strip().splitlines()
    assert code == 2 and len(shown) == 1 and message in shown[0], err


def test_infill_counts_what_is_put_back(call, text):
    """Check the shares of a model that draws token 5 everywhere: it puts back the masked 5s and no other token."""
    model = Denoiser(ModelConfig(300, 8, PRESETS["nano"], model="mdlm", head_bias=True)).eval()
    model.head.bias.data[5] = 50
    args = argparse.Namespace(seed=0, batch_size=3, dtype="float32")
    x_0 = torch.tensor([[5] * 8, [6] * 8, [5, 6] * 4, [6, 5] * 4])
    shares = assess_text.infilled(model, x_0, 0.5, Sampling(steps=3), args)
    assert shares[:2].tolist() == [1, 0] and torch.all(shares * 4 % 1 == 0)  # four tokens are masked in each
    assert assess_text.infilled(model, x_0, 1.0, Sampling(steps=3), args).tolist() == [1, 0, 0.5, 0.5]
    call(f"train_text.py --dataset {text} {TINY} --out cadd")
    code, out, err = call("evaluate.py infill --ckpt cadd --num 4 --steps 2 --masked 0.25")
    assert code == 0 and "| model | 25% masked |" in out and "4 held-out sequences of 16 tokens" in out, err


def test_baselines_are_for_text(call):
    for model in BASELINES:
        code, _, err = call(f"train_image.py --model {model}")
        assert code == 2 and f"model {model} is for text" in err


def test_what_is_varied():
    """Check that values of --vary are crossed, and that a wrong name, type or value is refused."""
    settings = benchmark.varied(["steps=8,32", "zhat=hard"])
    assert settings == [{"steps": 8, "zhat": "hard"}, {"steps": 32, "zhat": "hard"}]
    for bad, message in (
        (["stepz=8"], "--vary must be one of"),
        (["steps=a"], "of type int"),
        (["steps=0"], "least 1"),
    ):
        with pytest.raises(InputError, match=message):
            benchmark.varied(bad)


@pytest.mark.slow
def test_benchmark_trains_scores_and_goes_on(text, tmp_path, monkeypatch, capsys):
    """Run the benchmark twice. The second run trains nothing and gives the same rows, measured times apart."""
    out, picture = tmp_path / "rows.jsonl", tmp_path / "f.png"
    arguments = (
        f"text --dataset {text} --train mdlm ar:lr=0.001 --vary steps=2 temperature=0.8,1 zhat=soft --preset nano "
        f"--length 16 --batch-size 4 --steps 3 --seeds 1 --num 6 --cache {tmp_path} --runs {tmp_path / 'runs'} "
        f"--out {out} --picture {picture}"
    ).split()
    monkeypatch.setattr(
        benchmark, "run_all", lambda one, jobs, at_once, path: written([one(job) for job in jobs], path)
    )
    for _ in range(2):
        monkeypatch.setattr("sys.argv", arguments)
        benchmark.main()
    printed = capsys.readouterr().out
    assert "| held-out text |" in printed and "| ar:lr=0.001 (1) | steps 2, temperature 0.8 |" in printed
    assert (
        "each 6 samples of 16 tokens, models in float32; judge" in printed and "unless varied, num_latents" in printed
    )
    monkeypatch.setattr("sys.argv", ["text", "--table", str(out)])
    benchmark.main()  # the file has each run twice, and it counts once
    assert "| ar:lr=0.001 (1) | steps 2, temperature 0.8 |" in capsys.readouterr().out
    command = f"text --ckpt {tmp_path / 'runs' / 'mdlm-0'} --vary steps=2 --num 6 --cache {tmp_path}"
    monkeypatch.setattr("sys.argv", command.split())
    benchmark.main()
    assert "runs/mdlm-0 (1) | steps 2 |" in capsys.readouterr().out
    for options, message in (
        ("--length 32", "mdlm-0 was trained with length 16, not 32"),
        ("--ablation loss --ckpt runs", "--ablation loss compares models that it trains"),
    ):
        monkeypatch.setattr("sys.argv", [*arguments, *options.split()])
        with pytest.raises(InputError, match=message):
            benchmark.main()
    first, _, again, _ = (json.loads(line) for line in out.read_text().splitlines())
    for row in (first, again):
        for scores in row["scores"].values():
            scores.pop("seconds")
    assert first["scores"] == again["scores"] and picture.exists()


def figures(line: str) -> list[float]:
    """Read a row's scores, without times and without the bound, and with the log of the perplexity in its place."""
    bits, perplexity, *rest = (float(cell) for cell in line.split("|")[3:12])
    return [bits, math.log(perplexity), *rest]


@pytest.mark.slow
def test_a_row_of_the_results_is_what_its_command_gives(tmp_path, monkeypatch, capsys):
    """Run the smallest experiment of docs/tables/results.md again, and compare every number with the page, to 5%.

    Other cores add in another order, so that trained models differ. The row of held-out text depends on no trained
    model: its numbers must agree but for rounding.
    """
    page = (ROOT / "docs" / "tables" / "results.md").read_text()
    command = re.search(r"python -m benchmarks\.(text --train mdlm:preset=nano.*?)\n\n", page, re.S)[1]
    row, real = smallest_rows(page)
    runs = f" --runs {tmp_path / 'runs'} --cache {tmp_path}"
    monkeypatch.setattr("sys.argv", (command.replace("\\\n", " ") + runs).split())
    monkeypatch.setattr(benchmark, "run_all", lambda one, jobs, at_once, path: [one(job) for job in jobs])
    benchmark.main()
    again, real_again = smallest_rows(capsys.readouterr().out)
    assert figures(again) == pytest.approx(figures(row), rel=0.05, abs=0.002)
    cells, cells_again = (line.split("|")[3:12] for line in (real, real_again))
    assert [float(c) for c in cells_again] == pytest.approx([float(c) for c in cells], rel=0.002, abs=0.0011)
    assert float(row.split("|")[13]) == pytest.approx(float(again.split("|")[13]), rel=0.02)  # the bound


def smallest_rows(page: str) -> tuple[str, str]:
    """Find the row of the smallest experiment, and the row of held-out text above it."""
    lines = page.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("| mdlm:preset=nano"))
    return lines[place], lines[place - 1]


def written(rows, path):
    """Append rows to a file as `run_all` does, without processes, and return the rows."""
    if path is None:
        return rows
    with path.open("a") as file:
        file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
    return rows
