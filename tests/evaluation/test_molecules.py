"""Molecules under RDKit: known SMILES, valid and not, the same and different, and the commands around them."""

import random
from pathlib import Path

import numpy as np
import pytest

from cadd_min.checkpoints import file as checkpoint
from cadd_min.data import corpus
from cadd_min.data.token_folder import prepare
from cadd_min.data.tokenizer import chars
from cadd_min.dit import PRESETS
from cadd_min.evaluation import molecules
from cadd_min.evaluation.molecules import Reference, canonical, descriptors
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.utils.errors import InputError

ETHANOL, BENZENE, ASPIRIN = "CCO", "c1ccccc1", "CC(=O)Oc1ccccc1C(=O)O"
ALKANES = ["C" * n for n in range(1, 40)]


@pytest.mark.parametrize("line, expected", [
    ("OCC", ETHANOL), ("C(O)C", ETHANOL), ("C1=CC=CC=C1", BENZENE), ("", None), (" ", None), ("C1CC", None),
    ("C(C)(C)(C)(C)C", None), ("CC(", None), ("hello", None), ("CCO hello", None), ("C C(", None), ("CCO ", None),
])  # fmt: skip
def test_known_lines_are_valid_or_not_and_written_in_one_way(line, expected):
    assert canonical(line) == expected


def test_descriptors_of_known_molecules():
    rows = dict(zip((ETHANOL, BENZENE, ASPIRIN), descriptors([ETHANOL, BENZENE, ASPIRIN])))
    of = lambda name: {k: round(float(v[molecules.DESCRIPTORS.index(name)]), 2) for k, v in rows.items()}
    assert of("MolWt") == {ETHANOL: 46.07, BENZENE: 78.11, ASPIRIN: 180.16}
    assert of("NumHDonors") == {ETHANOL: 1, BENZENE: 0, ASPIRIN: 1}
    assert of("RingCount") == {ETHANOL: 0, BENZENE: 1, ASPIRIN: 1}


def test_measures_are_counts_of_what_they_say():
    reference = Reference([*ALKANES, ETHANOL], [BENZENE])
    row = reference.measure(["OCC", "CCO", "C1=CC=CC=C1", ASPIRIN, "C1CC", "", "CCCC", "CC("])
    assert row == {"lines": 8, "valid": 5, "different": 4, "new": 2, "held-out": 1}, "ethanol, benzene, aspirin, butane"
    shown = molecules.table({"some": row, "none": reference.measure(["C1CC", ""])}).splitlines()
    assert shown[2] == "| some | 62.5% ± 17.1 | 80.0% ± 17.9 | 50.0% ± 25.0 | 25.0% ± 21.7 |  |"
    assert shown[3] == "| none | 0.0% ± 0.0 |  |  |  |  |"
    with pytest.raises(InputError, match="has 1 molecules that RDKit reads"):
        Reference(["C"], [])


def test_fd_is_zero_of_the_data_itself_and_finite_of_what_the_data_never_has():
    """Measure alkanes, which have no rings. A descriptor that is constant in the data is not divided by its spread."""
    reference = Reference(ALKANES, [])
    same = reference.measure(ALKANES * 3)["FD"]
    halves = [reference.measure(half * 6)["FD"] for half in (ALKANES[:20], ALKANES[10:])]
    assert abs(same) < 0.1 < min(halves) and "FD" not in reference.measure(ALKANES)
    assert max(halves) < reference.measure([ASPIRIN, BENZENE] * 50)["FD"] < 1e7


def test_lines_of_a_stream_are_those_of_the_file(tmp_path):
    lines = [f"{'abc' * (n % 5)}{'cab'[n % 3]}" for n in range(500)]
    (tmp_path / "x.txt").write_text("\n".join(lines))
    tokens = prepare(corpus.open_corpus(str(tmp_path / "x.txt"), tmp_path, True), chars("abc"), tmp_path / "cache")
    for block in (7, 1 << 20):
        found = [
            line for side in ("train", "val")
            for line in molecules.data_lines(tokens.split(side, whole=True), tokens.tokenizer(), block)
        ]  # fmt: skip
        assert sorted(found) == sorted(lines)


@pytest.fixture
def smiles(tmp_path):
    """Write 900 molecules, and ten lines that are none."""
    parts = ["C", "O", "N", "CC", "C=C", "CO", "C#C", "CN", "C(C)", "c1ccccc1"]
    lines = sorted({a + b + c for a in parts for b in parts for c in parts})
    lines = [line for line in lines if canonical(line)][:900] + [f"C({'C' * n}" for n in range(10)]
    random.Random(0).shuffle(lines)
    (tmp_path / "smiles.txt").write_text("\n".join(lines))
    return len(lines)


@pytest.fixture
def saved(tmp_path, smiles):
    """Save carbon.pt, which writes carbon alone, new.pt, which has learned nothing, and text.pt of running text."""
    codec = chars("".join((tmp_path / "smiles.txt").read_text().split()))
    for name, rows, carbon in (("carbon", True, 50.0), ("new", True, 0.0), ("text", False, 0.0)):
        config = ModelConfig(codec.vocab_size, 12, PRESETS["nano"], model="mdlm", rows=rows, head_bias=True)
        net = Denoiser(config)
        net.head.bias.data.zero_()[codec.encode("C")[0]] = carbon
        state = {"ema": net.state_dict(), "step": 1}
        content = {"model_config": checkpoint.model_dict(config), "tokenizer": codec.spec(), "trainer": state}
        checkpoint.save(tmp_path / f"{name}.pt", content | {"settings": {"dataset": "smiles.txt"}})


def test_models_are_measured_beside_held_out_molecules(call, saved):
    ask = "evaluate.py molecules --num 20 --steps 4 --cache cache --ckpt"
    code, out, err = call(f"{ask} carbon.pt new.pt --out grid.svg")
    assert code == 0, err
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in out.splitlines() if " | " in line}
    assert rows["mdlm (carbon.pt)"][:3] == ["100.0% ± 0.0", "5.0% ± 4.9", "100.0% ± 0.0"], "one chain of 12 carbons"
    assert float(rows["held-out text"][0].split("%")[0]) > 80 and rows["held-out text"][3] == "100.0% ± 0.0"
    assert "mdlm (new.pt)" in rows and "20 samples each, ± the standard error" in out
    broken = sum(int(line.split()[1].replace(",", "")) for line in out.splitlines() if line.startswith("note"))
    assert broken == 10, "of the training set and the held-out set together"
    assert out.endswith("molecules in grid.svg\n") and Path("grid.svg").read_text().count("<svg") == 1
    assert len(list(Path("cache").glob("canonical-*"))) == 2
    code, again, _ = call(f"{ask} carbon.pt new.pt")
    assert code == 0 and out.startswith(again), "the molecules of the data are read once and kept"
    code, out, err = call(f"{ask} new.pt --temperature 50 --out none.svg")
    assert "| mdlm" in out, "the table is there even if nothing can be drawn"
    assert code == (0 if Path("none.svg").exists() else 2)


@pytest.mark.parametrize("options, message", [
    ("--ckpt new.pt --num 0", "--num must be at least 1"),
    ("--ckpt new.pt --out grid.png", "--out must be an .svg file, not grid.png"),
    ("--ckpt new.pt --out nowhere/grid.svg", "--out nowhere/grid.svg cannot be written"),
    ("--ckpt new.pt --num 5000", "5000 are needed: they stand beside the samples"),
    ("--ckpt text.pt --num 4", "molecules is for models of lines"),
])  # fmt: skip
def test_what_is_wrong_is_one_sentence(call, saved, options, message):
    code, _, err = call(f"evaluate.py molecules --cache cache {options}")
    assert code == 2 and message in err


def test_without_rdkit_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rdkit", None)
    with pytest.raises(InputError, match="pip install rdkit"):
        canonical("CCO")


def test_a_drawing_is_one_svg_and_needs_a_molecule(tmp_path):
    molecules.draw([ETHANOL, BENZENE] * 20, tmp_path / "grid.svg")
    picture = (tmp_path / "grid.svg").read_text()
    assert picture.lstrip().startswith("<?xml") and picture.count("<svg") == 1 and "NH" not in picture
    (tmp_path / "grid.svg").unlink()
    with pytest.raises(InputError, match="no valid molecule"):
        molecules.draw([], tmp_path / "x.svg")
    assert not list(tmp_path.iterdir())


def test_moses_is_read_from_its_package(tmp_path):
    source = corpus.open_corpus("moses", tmp_path, lines=True)
    sides: dict[bool, list[str]] = {True: [], False: []}
    for part in source.parts():
        for piece in corpus.read(part):
            sides[bool(piece.held_out)].append(piece.text)
    assert (len(sides[False]), len(sides[True])) == (1_584_663, 176_074) and source.tokenizer == "chars"
    assert sides[False][0] == "CCCS(=O)c1ccc2[nH]c(=NC(=O)OC)[nH]c2c1"
    assert max(map(len, sides[False] + sides[True])) == corpus.LINES["moses"] - 1
    some = np.random.default_rng(0).choice(sides[True], 200)
    assert all(canonical(line) for line in some)


def test_a_damaged_package_of_moses_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "dataset" / "data").mkdir(parents=True)
    monkeypatch.setattr(corpus, "_package", lambda name, install: tmp_path)
    for content in (b"SMILES\nCCO\n", b"\x1f\x8b\x08\x00cut"):
        (tmp_path / "dataset" / "data" / "train.csv.gz").write_bytes(content)
        with pytest.raises(InputError, match="install molsets again"):
            corpus.open_corpus("moses", tmp_path / "cache")
        assert not [*(tmp_path / "cache").glob("*moses*")]
