"""The commands on a model of lines: trained, resumed, sampled, measured, and refused in one sentence."""

import argparse
import itertools
from pathlib import Path

import pytest
import torch

from cadd_min.checkpoints import file as checkpoint
from cadd_min.checkpoints.load import load_denoiser
from cadd_min.data.tokenizer import chars
from cadd_min.dit import PRESETS
from cadd_min.evaluation import text as assess_text
from cadd_min.evaluation.held_out import written
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.orders import Sampling
from cadd_min.sampling.text import TextTask
from tests.scripts.test_cli_text import Stub
from tests.toys import save_untrained

NANO = "--lines --tokenizer chars --preset nano --length 9 --batch-size 8 --steps 4 --eval-every 2 --sample-every 2"
NAMES = ["".join(parts) for parts in itertools.product(["ka", "lo", "mi", "su"], ["n", "ri", "ta"], ["do", "e", "u"])]
CODEC = chars("abc")


@pytest.fixture
def names(tmp_path):
    """Write 300 short lines, and ten that are too long for 9 tokens."""
    lines = [a + b for a, b in itertools.product(NAMES, ["", *"aeiounrs"])][:300]
    path = tmp_path / "names.txt"
    path.write_text("\n".join([*lines, *(f"{'kalo' * 4}{vowel}{letter}" for vowel in "ae" for letter in "aeiou")]))
    return path


@pytest.fixture
def saved(tmp_path):
    """Save untrained models of lines, of running text, and with neighbours as lines.pt, text.pt and near.pt."""
    for name, options in (("lines", {"rows": True}), ("text", {}), ("near", {"neighbours": True})):
        config = ModelConfig(4, 8, PRESETS["nano"], model="mdlm", **options)
        save_untrained(tmp_path / f"{name}.pt", config, CODEC.spec(), dataset="few.txt")
    (tmp_path / "few.txt").write_text("\n".join("".join(line) for line in itertools.product("abc", repeat=5)))


def args_of(**values) -> argparse.Namespace:
    missing = dict.fromkeys(("out", "classes", "guidance", "inpaint", "mask", "gif", "prompt", "html", "watch"))
    return argparse.Namespace(**missing | {"ckpt": "lines.pt", "chat": False} | values)


def test_a_model_of_lines_is_trained_resumed_sampled_and_measured(call, names):
    code, out, err = call(f"train_text.py --dataset {names} {NANO} --out run")
    assert code == 0, err
    assert "lines longer than 8 tokens are left out" in out and " lines, run in run" in out
    counts = [int(line.split(": ")[1].split()[0]) for line in out.splitlines() if line.endswith("are left out")]
    assert sum(counts) == 10  # of the training lines and of the held-out lines together
    config = checkpoint.load(Path("run"))["model_config"]
    assert config["rows"] and config["neighbours"], "characters are an alphabet"
    code, out, err = call("train_text.py --resume --out run --steps 6")
    content = checkpoint.load(Path("run"))
    assert code == 0 and content["trainer"]["step"] == 6 and content["model_config"] == config, err
    code, out, err = call("sample.py --ckpt run --num 5 --steps 4")
    *lines, blank, settings = out.splitlines()
    assert code == 0 and blank == "" and settings.startswith("model cadd at step 6"), err
    assert len(lines) == 5 and not any("endoftext" in line or len(line) > 9 for line in lines)
    assert all(set(line) <= set("kalomisunrtdeu") for line in lines)
    code, out, err = call('sample.py --ckpt run --steps 3 --prompt "ka[2]do"')
    assert code == 0 and out.startswith("ka"), err
    code, out, err = call("sample.py --ckpt run --steps 3 --watch")
    assert code == 0 and "endoftext" not in out and "step 3/3" in out, err
    code, out, err = call("evaluate.py bound --ckpt run --num 9 --repeat 1")
    assert code == 0, err
    found = dict(line.rsplit("  ", 1) for line in out.splitlines()[:-1])
    found = {name.strip(): float(value) for name, value in found.items()}
    assert found["bound, nats per line"] == pytest.approx(9 * found["bound, nats per token"], abs=1e-3)
    assert found["lines of held-out text"] == 9
    code, out, err = call("evaluate.py infill --ckpt run --num 9 --steps 2 --masked 0.5")
    assert code == 0 and "9 held-out sequences of 9 tokens" in out, err
    code, _, err = call("train_text.py --resume --out run --steps 8 --length 10")
    assert code == 2 and "another shape" in err
    code, _, err = call(f"train_text.py --dataset {names} {NANO.replace('--lines', '')} --out text")
    assert code == 0 and not checkpoint.load(Path("text"))["model_config"]["rows"], err
    code, _, err = call("train_text.py --resume --out text --lines --steps 8 --anyway")
    assert code == 2 and len(err.splitlines()[-1:]) == 1 and ("other tokens" in err or "another shape" in err)
    for command in ("sample.py --ckpt run --length 30", 'sample.py --ckpt run --prompt "[10]"'):
        code, _, err = call(command)
        assert code == 2 and len(err.splitlines()) == 1, err


@pytest.mark.parametrize("model", ["mdlm", "cdm", "ar", "udm", "sedd"])
def test_every_model_may_be_one_of_lines(model, call, names):
    assert call(f"train_text.py --dataset {names} {NANO} --model {model} --out run")[0] == 0
    code, out, err = call("sample.py --ckpt run --num 3 --steps 4")
    assert code == 0 and len(out.splitlines()) == 5, err


def test_a_token_folder_of_documents_gives_lines(call, tmp_path):
    """Check that the documents of a folder of tokens, each ended by EOT, are taken as lines."""
    (tmp_path / "d.txt").write_text("<|endoftext|>".join(f"{n:o}" for n in range(1, 400)))
    assert call(f"train_text.py --dataset d.txt {NANO.replace('--lines', '')} --cache c --out text")[0] == 0
    (folder,) = (path for path in Path("c").iterdir() if path.is_dir())
    code, out, err = call(f"train_text.py --dataset {folder} {NANO.replace('--tokenizer chars', '')} --out lines")
    assert code == 0 and " lines, run in lines" in out, err


def test_what_is_printed_ends_at_the_first_end(capsys):
    """Check rows with an end, with two, with none, and with an end first. Those without are counted."""
    model = Denoiser(ModelConfig(4, 4, PRESETS["nano"], model="mdlm", rows=True))
    task = TextTask(model, CODEC, args_of())
    task.show(torch.tensor([[0, 1, 3, 3], [0, 3, 2, 3], [0, 1, 2, 0], [3, 1, 1, 1]]))
    captured = capsys.readouterr()
    assert captured.out == "ab\na\nabca\n\n\n"
    assert captured.err == "note: 1 of 4 lines have no end within 4 tokens\n"
    task.show(torch.tensor([[0, 1, 3, 3]]))
    captured = capsys.readouterr()
    assert captured.out == "ab\n\n" and captured.err == ""


def test_padding_is_no_text_to_the_measures():
    """Check the characters of a line, what is masked of it, and what a judge reads of it."""
    x_0 = torch.tensor([[0, 1, 3, 3, 3, 3], [0, 1, 2, 0, 1, 3], [3, 3, 3, 3, 3, 3]])
    assert written(x_0, 3).sum(1).tolist() == [3, 6, 1] and written(x_0, None).all()
    model = Denoiser(ModelConfig(4, 6, PRESETS["nano"], model="mdlm", rows=True, head_bias=True)).eval()
    args = argparse.Namespace(num=2, batch_size=2, T=None, repeat=1, seed=0, dtype="float32")
    found = assess_text.bound_rows(model, CODEC, x_0[:2], args)
    nats = found["bound, nats per line"]
    assert nats == pytest.approx(6 * found["bound, nats per token"]) and found["lines of held-out text"] == 2
    bits = nats / torch.tensor(2.0).log()
    assert found["bound, bits per character"] == pytest.approx(float(bits / 4.5))  # 2 + 5 characters, two ends, by two
    model.head.bias.data[3] = 50  # a model that draws ends alone puts back the ends alone
    shares = assess_text.infilled(model, x_0, 1.0, Sampling(steps=2), args, pad=3)
    assert shares.tolist() == pytest.approx([1 / 3, 1 / 6, 1])
    assert assess_text.infilled(model, x_0, 1.0, Sampling(steps=2), args).tolist() == pytest.approx([4 / 6, 1 / 6, 1])
    reader = assess_text.Reader(CODEC, Stub(), x_0, lines=True)
    assert reader.texts(torch.tensor([[0, 3, 1, 3], [3, 0, 0, 0]])) == ["a", "<|endoftext|>"]


def test_samples_are_scored_beside_held_out_lines(call, saved, monkeypatch):
    read: list[str] = []

    class Reads(Stub):
        def read(self, texts):
            read.extend(texts)
            return super().read(texts)

    monkeypatch.setattr(assess_text, "open_judge", lambda *rest: Reads())
    code, out, err = call("evaluate.py samples --ckpt lines.pt --num 4 --steps 2")
    assert code == 0 and "of which it reads the lines" in out, err
    assert len(read) == 12 and all(len(text) == 5 for text in read[:8])
    assert not any("<|endoftext|>" in text and text != "<|endoftext|>" for text in read)


@pytest.mark.parametrize(
    "command, message",
    [
        (
            "train_text.py --dataset few.txt --lines --tokenizer chars --length 5",
            "none of its 230 lines fits --length 5",
        ),
        ("evaluate.py bound --ckpt lines.pt --num 999", "has 13 lines of at most 7 tokens, and 999 are needed"),
        ("evaluate.py samples --ckpt lines.pt text.pt --num 2", "of lines and of running text cannot be compared"),
        ("export.py to-mdlm lines.pt out.safetensors --time 0.5", "MDLM's form has no absolute positions"),
        ("export.py to-mdlm near.pt out.safetensors --time 0.5", "MDLM's form has no pairs of neighbours"),
        ("finetune.py --from lines.pt --dataset few.txt", "--from must be a model of running text"),
        ("sample.py --ckpt lines.pt --length 9", "--length goes with --from"),
    ],
)
def test_what_is_refused(command, message, call, saved):
    code, out, err = call(command)
    shown = err.split("\r")[-1].strip().splitlines()
    assert code == 2 and len(shown) == 1 and message in shown[0], (out, err)


def test_a_folder_for_others_stays_a_model_of_lines(call, saved):
    assert call("export.py folder lines.pt others")[0] == 0
    assert load_denoiser(Path("others"))[0].config.rows
    code, out, err = call("sample.py --ckpt others --num 3 --steps 2")
    assert code == 0 and len(out.splitlines()) == 5, err
    assert not load_denoiser(Path("text.pt"))[0].config.rows
