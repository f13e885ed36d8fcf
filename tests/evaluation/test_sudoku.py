"""evaluate.py sudoku, and prompts that are puzzles: what is given stays, and what is broken is counted."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from cadd_min.checkpoints import file as checkpoint
from cadd_min.data import sudoku as game
from cadd_min.data.tokenizer import chars
from cadd_min.dit import PRESETS
from cadd_min.evaluation import sudoku
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.sampling.text import TextTask
from cadd_min.utils.errors import InputError
from tests.toys import save_untrained

CODEC = chars("123456789")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Save an untrained model of sudoku as run.pt, beside a small file of grids."""
    monkeypatch.setattr(game.write, "__defaults__", (400, 3))
    config = ModelConfig(CODEC.vocab_size, 82, PRESETS["nano"], model="mdlm", rows=True)
    return save_untrained(tmp_path / "run.pt", config, CODEC.spec(), dataset="sudoku")


def test_clues_are_random_cells_of_the_grid():
    grids = game.full_grids(6, np.random.default_rng(0))
    x_0 = torch.tensor([[*(grid - 1), CODEC.eot_id] for grid in grids])
    for clues in (0, 30, 80):
        kept = sudoku.given(x_0, clues, CODEC.mask_id, 0) != CODEC.mask_id
        assert (kept.sum(1) == clues).all() and not kept[:, 81].any()
    assert not torch.equal(sudoku.given(x_0, 30, 10, 0), sudoku.given(x_0, 30, 10, 1))
    where = (sudoku.given(x_0, 30, CODEC.mask_id, 0) == x_0)[:, :81]
    assert not torch.equal(where[0], where[1])


def test_a_row_of_the_table_by_hand():
    right = game.full_grids(2, np.random.default_rng(0))
    wrong = right[0].copy()
    wrong[40] = 0
    row = sudoku.row("some", "5", np.stack([right[0], right[0], right[1], wrong]))
    assert row == "| some | 5 | 75.0% ± 21.7 | 0.75 ± 0.65 | 66.7% |"
    assert sudoku.row("none", "", wrong[None]).endswith("| 0.0% ± 0.0 | 3.00 ± 0.00 |  |")


def test_grids_are_measured_from_clues(call, model):
    code, out, err = call("evaluate.py sudoku --ckpt run.pt --num 12 --steps 2 --clues 0 80 --cache cache")
    assert code == 0, err
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert rows[1][2:4] == ["100.0% ± 0.0", "0.00 ± 0.00"], "held-out grids"
    assert [row[1] for row in rows[2:]] == ["0", "80"] and rows[2][2] == "0.0% ± 0.0"
    assert float(rows[3][3].split()[0]) <= 3, "one cell of 81 is the model's"
    assert "12 grids each, ± the standard error" in out


@pytest.mark.parametrize("command, message", [
    ("evaluate.py sudoku --ckpt run.pt --num 4 --clues 81", "--clues must be from 0 to 80, not [81]"),
    ("evaluate.py sudoku --ckpt text.pt --num 4", "sudoku is for models of lines, trained by"),
    ("sample.py --ckpt run.pt --steps 2 --prompt 55", "5 stands in row 1, column 1 and row 1, column 2"),
    ("sample.py --ckpt run.pt --steps 2 --prompt 12345678[9]9", "a sudoku without a solution"),
])  # fmt: skip
def test_what_is_wrong_is_one_sentence(call, model, tmp_path, command, message):
    (tmp_path / "few.txt").write_text("123456789\n" * 300)
    config = ModelConfig(CODEC.vocab_size, 8, PRESETS["nano"], model="mdlm")
    save_untrained(tmp_path / "text.pt", config, CODEC.spec(), dataset="few.txt")
    code, _, err = call(f"{command} {'--cache cache' if command.startswith('evaluate') else ''}")
    assert code == 2 and message in err


@pytest.mark.parametrize("puzzle", ["53..7....6..195...", "530070000600195", "53[2]7[10].....1"])
def test_a_puzzle_is_a_prompt_with_dots_or_zeros_or_gaps(model, puzzle):
    net = Denoiser(ModelConfig(CODEC.vocab_size, 82, PRESETS["nano"], model="mdlm", rows=True))
    args = argparse.Namespace(**dict.fromkeys(("out", "classes", "guidance", "inpaint", "mask", "gif", "chat")))
    args.prompt = puzzle
    ids = TextTask(net, CODEC, args, "sudoku").prompt(2)
    given = puzzle.replace("0", ".") if "[" not in puzzle else "53..7" + "." * 15 + "1"
    expected = [CODEC.mask_id if c == "." else CODEC.encode(c)[0] for c in given.ljust(82, ".")]
    assert ids.tolist() == [expected, expected]
    args.prompt = "." * 81 + "1"
    with pytest.raises(InputError, match="more than the 81 cells"):
        TextTask(net, CODEC, args, "sudoku").prompt(1)
    args.prompt = "55" + "." * 79
    with pytest.raises(InputError, match="breaks a rule"):
        TextTask(net, CODEC, args, "sudoku").prompt(1)
    with pytest.raises(InputError, match="not in the alphabet"):
        TextTask(net, CODEC, args, "digits.txt").prompt(1)  # of other data a dot is a dot


def test_the_data_set_decides_that_it_has_lines_and_how_long_they_are(call, monkeypatch):
    monkeypatch.setattr(game.write, "__defaults__", (400, 3))
    nano = "--preset nano --steps 2 --batch-size 4 --model mdlm --cache cache"
    code, out, err = call(f"train_text.py --dataset sudoku {nano} --out run")
    assert code == 0 and "left out" not in out, err
    config = checkpoint.load(Path("run"))["model_config"]
    assert (config["length"], config["rows"], config["vocab_size"]) == (82, True, 10)
    assert call("train_text.py --resume --out run --steps 3")[0] == 0
    code, _, err = call(f"train_text.py --dataset sudoku {nano} --length 40 --out short")
    assert code == 2 and "fits --length 40" in err
    code, _, err = call(f"train_text.py --dataset sudoku {nano} --length 0 --out none")
    assert code == 2 and "length" in err
