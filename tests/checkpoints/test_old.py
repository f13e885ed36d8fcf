"""Checkpoints that an older version wrote: they load, draw the tokens that they drew then, and training goes on.

old/text.pt and old/digits.pt are the bytes that commit 83933e8 wrote after six steps of training. Beside each, a .json
file has the tokens that the same commit drew from it, by the settings in each key.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from cadd_min.checkpoints import file as checkpoint
from cadd_min.checkpoints.folder import save_pretrained
from cadd_min.checkpoints.load import build_model, load_denoiser
from cadd_min.dit import PRESETS
from cadd_min.model import Model
from cadd_min.orders import Sampling
from cadd_min.sampling import generate
from cadd_min.training.start import network, restore
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.utils.errors import InputError
from tests.toys import batch

OLD = Path(__file__).parent / "old"
DRAWN = {name: json.loads((OLD / f"{name}.json").read_text()) for name in ("text", "digits")}


def draw(model: Model, settings: str) -> list[list[int]]:
    zhat, _, options = settings.partition(" ")
    how = Sampling(steps=6, zhat=zhat, **json.loads(options))
    return generate.samples(model, how, 2, seed=3, dtype="float32").tolist()


@pytest.mark.parametrize("name, settings", [(name, key) for name, drawn in DRAWN.items() for key in drawn])
def test_an_old_checkpoint_draws_the_same_tokens(name, settings):
    model, codec, _ = load_denoiser(OLD / f"{name}.pt")
    assert codec.vocab_size == model.config.vocab_size
    assert draw(model, settings) == DRAWN[name][settings]


def test_other_weights_draw_other_tokens():
    """Power: the weights of the last step in place of their average, after six steps, are already another model."""
    content = checkpoint.load(OLD / "text.pt")
    model = build_model(content, OLD)
    model.load_state_dict(content["trainer"]["model"])
    assert any(draw(model.eval(), settings) != tokens for settings, tokens in DRAWN["text"].items())


def test_a_renamed_schedule_is_found_under_its_old_name(tmp_path):
    content = checkpoint.load(OLD / "text.pt")
    content["model_config"]["discrete"] = content["settings"]["discrete"] = "gone"
    checkpoint.save(tmp_path / "old.pt", content)
    model, codec, found = load_denoiser(tmp_path / "old.pt")
    assert model.schedule.discrete == found["settings"]["discrete"] == "all-at-once"
    save_pretrained(model, codec, tmp_path / "folder")
    config = tmp_path / "folder" / "config.json"
    config.write_text(config.read_text().replace("all-at-once", "gone"))
    assert load_denoiser(tmp_path / "folder")[0].schedule.discrete == "all-at-once"


def test_a_resumed_run_keeps_a_size_that_has_no_name_today(tmp_path):
    """Check that a resumed run keeps its size, head and neighbours, and that another --preset is looked up by name."""
    content = checkpoint.load(OLD / "text.pt")
    content["settings"]["preset"] = "medium"
    content["model_config"] |= {"head_bias": True, "neighbours": True, "vocab_size": 20}
    checkpoint.save(tmp_path / checkpoint.FILE, content)
    args = argparse.Namespace(out=tmp_path, preset="medium")
    own = network(args, PRESETS, content)
    size = content["model_config"]["size"] | {"gate": 0.0}  # older than gates that start open
    assert dataclasses.asdict(own["size"]).items() <= size.items() and own["head_bias"] and own["neighbours"]
    assert network(argparse.Namespace(out=tmp_path, preset="tiny"), PRESETS, content) == {"size": PRESETS["tiny"]}
    with pytest.raises(InputError, match="--preset"):
        network(args, PRESETS, None)


def test_training_goes_on_from_an_old_checkpoint():
    content = checkpoint.load(OLD / "text.pt")
    trainer = Trainer(build_model(content, OLD), batch, TrainConfig(steps=7, batch_size=4, dtype="float32"))
    restore(trainer, content, OLD)
    assert (trainer.step, trainer.sequences) == (6, 24)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.data = lambda index: batch(index)._replace(x_0=batch(index).x_0[:4] % 9)
    assert all(torch.isfinite(value) for value in trainer.train_step().values()) and trainer.step == 7
    assert any(not torch.equal(p, q) for p, q in zip(before, trainer.model.parameters()))
