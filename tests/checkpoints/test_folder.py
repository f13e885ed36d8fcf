"""Folders for others: models come back unchanged, a failed save leaves nothing, and only tensors and JSON are read."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cadd_min.checkpoints import file as checkpoint
from cadd_min.checkpoints import folder as pretrained
from cadd_min.checkpoints.folder import save_pretrained
from cadd_min.checkpoints.load import from_pretrained
from cadd_min.data.pixels import Pixels
from cadd_min.data.tokenizer import chars, gpt2
from cadd_min.dit import PATCH_PRESETS
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.unet import UNET_PRESETS
from cadd_min.utils.errors import InputError
from tests.toys import ROOT, TINY, nano, rng, save_untrained

LETTERS = chars("abcdefghij")  # 11 tokens, as a nano model has
FILES = {"model.safetensors", "config.json", "codec.json"}


def trained(**options: object) -> Denoiser:
    """Make a small model with random weights: the head of a new model is zero, and its logits test nothing."""
    model = nano(**options)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=rng(3))
    return model


def logits(model: Denoiser) -> torch.Tensor:
    """Compute logits (2, L, V) of masked positions with random latents."""
    x, length = torch.full((2, model.config.length), model.mask_id), model.config.length
    return model(x, torch.randn(2, length, model.latent.dim, generator=rng(1)), torch.tensor([0.3, 0.8]))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"model": "mdlm", "head_bias": True}, {"latent_table": "fixed"},
                                     {"latent_dim": 5, "fusion": "concat", "bayes_head": True, "head_bias": True},
                                     {"model": "ar"}])  # fmt: skip
def test_a_model_of_text_comes_back_as_it_was(options, tmp_path):
    """Check the configuration, logits and tokenizer that come back, and the folder's files and metadata.

    A tensor that is not saved, or a field lost in JSON, would change them.
    """
    model = trained(**options)
    save_pretrained(model, LETTERS, tmp_path / "new" / "folder", settings={"dtype": "bfloat16", "lr": 1.0}, step=7)
    opened, letters = from_pretrained(tmp_path / "new" / "folder")
    assert opened.config == model.config and torch.equal(logits(opened), logits(model)) and not opened.training
    assert letters.spec() == LETTERS.spec()
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == FILES
    config = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert config["settings"] == {"dtype": "bfloat16"} and config["step"] == 7 and config["version"] == 1
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt", "writer": "cadd_min", "version": "1"}


@pytest.mark.parametrize("size", [PATCH_PRESETS["tiny"], UNET_PRESETS["nano"]])
def test_a_model_of_images_too(size, tmp_path):
    """Check the configuration and the codec of pixels that come back, for both backbones of images."""
    pixels = Pixels((8, 8, 1), 17)
    model = Denoiser(ModelConfig(17, 64, size, image=(8, 8, 1), classes=2, latent_table="ordered"))
    save_pretrained(model, pixels, tmp_path / "images")
    opened, codec = from_pretrained(tmp_path / "images")
    assert opened.config == model.config and codec == pixels


def test_names_are_those_of_the_model_itself_whatever_wraps_it(tmp_path):
    """Check the names and dtypes in the file for models that are in float64, compiled, or in DataParallel."""
    model = trained()
    names = set(model.state_dict())
    compiled_inside = trained()
    compiled_inside.backbone = torch.compile(compiled_inside.backbone)
    assert any("_orig_mod." in name for name in compiled_inside.state_dict())
    models = (model.double(), torch.compile(model), torch.nn.DataParallel(model), compiled_inside)
    for n, wrapped in enumerate(models):
        save_pretrained(wrapped, LETTERS, tmp_path / str(n))
        weights = load_file(tmp_path / str(n) / "model.safetensors")
        assert set(weights) == names and all(value.dtype == torch.float32 for value in weights.values())


def test_a_folder_is_whole_or_as_it_was(tmp_path, monkeypatch):
    """Check that a failed save leaves the target as it was, and that neither a file nor a full folder is replaced."""
    model, folder = trained(), tmp_path / "folder"
    folder.mkdir()
    for broken in ("os.replace", "json.dumps"):

        def fails(*args, **options):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left"):
            patch.setattr(broken, fails)
            save_pretrained(model, LETTERS, folder)
        assert list(tmp_path.iterdir()) == [folder] and not list(folder.iterdir())
    save_pretrained(model, LETTERS, folder)  # an empty folder may be filled
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="folder exists: name a new folder"):
        save_pretrained(trained(seed=1), LETTERS, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file exists"):
        save_pretrained(model, LETTERS, tmp_path / "file")
    with pytest.raises(InputError, match="could not save"):
        save_pretrained(model, LETTERS, tmp_path / "file" / "in" / "a" / "file")


def test_a_full_disk_leaves_nothing(tmp_path):
    """Check that a failed save leaves no file. A limit on the size of files stands for a full disk."""
    code = f"""
import resource, signal
from cadd_min.utils.cli import run
from cadd_min.checkpoints.folder import save_pretrained
from tests.checkpoints.test_folder import LETTERS, trained
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
run(lambda: save_pretrained(trained(), LETTERS, {str(tmp_path / "folder")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "could not save" in done.stderr and "nothing was changed" in done.stderr, done
    assert not list(tmp_path.iterdir())


def rewrite(path: Path, **change: object) -> None:
    """Change values in a JSON file. None removes a value."""
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_what_is_wrong_with_a_folder_is_one_sentence(tmp_path):
    """Check that each kind of damage raises an InputError of one line that says what is wrong."""
    good, size = nano().config, {"layers": 2, "width": 32, "heads": 2, "cond": 32, "kind": "Size"}

    def model_config(**change):
        return lambda folder: rewrite(folder / "config.json", model_config=checkpoint.model_dict(good) | change)

    def weights(change):
        def damage(folder):
            state = load_file(folder / "model.safetensors")
            save_file(change(state), folder / "model.safetensors")

        return damage

    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def pickled(folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    for n, (damage, message) in enumerate((
        (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
        (lambda folder: (folder / "codec.json").unlink(), "it has no codec.json"),
        (pickled, "it has no model.safetensors"),
        (cut, "is not a safetensors file, or it is damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is not a safetensors file"),
        (lambda folder: (folder / "config.json").write_text('{"format": '), "is not an object in JSON"),
        (lambda folder: (folder / "codec.json").write_text("[1]"), "is not an object in JSON"),
        (lambda folder: rewrite(folder / "config.json", version=2), "has version 2, expected 1"),
        (lambda folder: rewrite(folder / "config.json", format=None), "is not of this project"),
        (lambda folder: rewrite(folder / "config.json", model_config=None), "'size' is missing"),
        (lambda folder: rewrite(folder / "config.json", settings={"dtype": "int3"}), "its dtype one of float32"),
        (lambda folder: rewrite(folder / "codec.json", kind=None), "kind must be bpe, chars or hf, not None"),
        (lambda folder: rewrite(folder / "codec.json", alphabet="ab"), "the tokenizer has 3 tokens, the model 11"),
        (model_config(colour="red"), "another version of this project"),
        (model_config(size=size | {"width": 64}), r"another shape .* has the shape \(12, 32\), expected \(12, 64\)"),
        (model_config(size=size | {"width": 33}), "width must be a multiple"),
        (model_config(fusion="mul"), "fusion must be one of"),
        (weights(lambda state: state | {"extra": torch.ones(1)}), "extra has no place"),
        (weights(lambda state: {k: v for k, v in state.items() if k != "head.weight"}), "head.weight is missing"),
        (weights(lambda state: {f"_orig_mod.{k}": v for k, v in state.items()}), "is missing"),
    )):  # fmt: skip
        folder = tmp_path / str(n)
        save_pretrained(nano(), LETTERS, folder)
        damage(folder)
        with pytest.raises(InputError, match=message) as error:
            from_pretrained(folder)
        assert "\n" not in str(error.value)


def test_what_is_neither_a_folder_nor_at_the_hub_is_one_sentence(tmp_path, monkeypatch):
    """Check that without a network the error names the folder and the hub, in one line."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("owner/name", "hf:owner/name", str(tmp_path / "none"), "no name"):
        with pytest.raises(InputError, match=rf"there is no folder {name}, nor can .* be downloaded") as error:
            from_pretrained(name)
        assert "\n" not in str(error.value)


def cached(home: Path, name: str, source: Path) -> None:
    """Move a folder into the hub client's cache, as if owner/name had been downloaded."""
    folder = home / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots").mkdir()
    source.rename(folder / "snapshots" / ("0" * 40))


def test_the_hub_by_its_clients_cache(call, tmp_path, monkeypatch):
    """Check that owner/name opens from the client's cache, in Python and by --ckpt, and another name is refused."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = trained()
    save_pretrained(model, LETTERS, tmp_path / "source", step=5)
    cached(tmp_path / "hub", "owner/name", tmp_path / "source")
    opened, _ = from_pretrained("owner/name")
    assert torch.equal(logits(opened), logits(model))
    code, out, err = call("sample.py --ckpt hf:owner/name --steps 2")
    assert code == 0 and "model cadd at step 5 (hf:owner/name/model.safetensors)" in out, err
    code, _, err = call("sample.py --ckpt hf:owner/other --steps 2")
    assert code == 2 and "nor can the hub's owner/other be downloaded" in err
    with pytest.raises(InputError, match="nor can"):
        from_pretrained("owner/name", revision="another")


def test_the_methods_of_the_hubs_mixin(tmp_path, monkeypatch):
    """Check from_pretrained, save_pretrained and push_to_hub, the last with a client that only records the upload.

    The mixin alone would delete a config.json before it saves.
    """
    from huggingface_hub import HfApi

    from cadd_min.checkpoints import hub

    model = trained()
    save_pretrained(model, LETTERS, tmp_path / "a")
    opened = hub.Denoiser.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(opened), logits(model)) and opened.codec.spec() == LETTERS.spec() and not opened.training
    opened.save_pretrained(tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == FILES | {"README.md"}
    assert "2510.01329" in (tmp_path / "b" / "README.md").read_text()
    assert torch.equal(logits(from_pretrained(tmp_path / "b")[0]), logits(model))
    with pytest.raises(InputError, match="exists"):
        opened.save_pretrained(tmp_path / "a")
    assert from_pretrained(tmp_path / "a")[0].config == model.config  # its config.json was left alone
    with pytest.raises(InputError, match="it has no"):
        hub.Denoiser.from_pretrained(tmp_path)
    uploaded = []

    def upload(self, **options):
        uploaded.append(from_pretrained(options["folder_path"])[0])
        return "url"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: type("Url", (), {"repo_id": repo_id}))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert opened.push_to_hub("owner/name") == "url" and torch.equal(logits(uploaded[0]), logits(model))


def test_the_core_needs_neither_package(tmp_path):
    """Check that checkpoints load without huggingface_hub and safetensors.

    Opening or saving a folder must say what to install, and leave nothing behind.
    """
    save_pretrained(trained(), LETTERS, tmp_path / "folder")
    save_untrained(tmp_path / "checkpoint.pt", nano().config, LETTERS.spec())
    code = f"""
import sys
sys.modules["huggingface_hub"] = sys.modules["safetensors"] = None
from pathlib import Path
from cadd_min.checkpoints import folder as pretrained, mdlm
from cadd_min.checkpoints.load import load_denoiser
from cadd_min.utils.errors import InputError
folder = Path({str(tmp_path)!r})
model, letters, _ = load_denoiser(folder / "checkpoint.pt")
for call in (
    lambda: load_denoiser(folder / "folder"),
    lambda: load_denoiser(Path("hf:owner/name")),
    lambda: pretrained.save_pretrained(model, letters, folder / "new"),
    lambda: __import__("cadd_min.checkpoints.hub"),
):
    try:
        call()
    except InputError as error:
        assert "pip install huggingface_hub safetensors" in str(error), error
    else:
        raise AssertionError
assert not (folder / "new").exists()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_is_exported_sampled_and_measured_like_the_run(call, text):
    """Compare an exported folder with its run: the averaged weights, and the output of sample.py and evaluate.py."""
    assert call(f"train_text.py --dataset {text} {TINY} --model mdlm --dtype bfloat16 --out runs/a")[0] == 0
    code, out, err = call("export.py folder runs/a shared")
    assert code == 0 and "written: shared, mdlm at step 4" in out, err
    state, weights = checkpoint.load(Path("runs/a"))["trainer"], load_file("shared/model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in state["ema"].items())  # the averaged weights
    assert not torch.equal(weights["embedding.weight"], state["model"]["embedding.weight"])
    for command in ("sample.py --steps 3 --num 2", "evaluate.py bound --num 6 --T 2"):
        of_run, of_folder = (call(f"{command} --ckpt {folder}") for folder in ("runs/a", "shared"))
        assert of_folder[0] == 0 and "bfloat16" in of_folder[1], of_folder[2]
        assert of_folder[1].replace("shared/model.safetensors", "runs/a/checkpoint.pt") == of_run[1]
    code, _, err = call("export.py folder runs/a shared")
    assert code == 2 and "shared exists" in err
    code, _, err = call("train_text.py --resume --out shared")
    assert code == 2 and "there is no checkpoint in shared" in err


def test_images_are_measured_too_where_the_folder_says_which(call, tmp_path):
    """Check that the bound is measured on the data set that the folder names, and refused where it names none."""
    pixels, model = Pixels((8, 8, 1), 17), Denoiser(ModelConfig(17, 64, PATCH_PRESETS["tiny"], image=(8, 8, 1)))
    save_pretrained(model, pixels, tmp_path / "digits", settings={"dataset": "digits"})
    save_pretrained(model, pixels, tmp_path / "unknown")
    code, out, err = call("evaluate.py bound --num 4 --T 2 --ckpt digits")
    assert code == 0 and "bits per dimension" in out, err
    code, _, err = call("evaluate.py bound --num 4 --T 2 --ckpt unknown")
    assert code == 2 and "does not say which images" in err
    assert call("sample.py --num 4 --steps 2 --ckpt unknown")[0] == 0
    from PIL import Image

    assert np.asarray(Image.open("samples.png")).ndim in (2, 3)


def test_gpt2s_tokens_too(tmp_path):
    """Check that a vocabulary of GPT-2 comes back, and that wrappers' names are stripped from a weight's name."""
    words = gpt2(300)
    save_pretrained(nano(vocab_size=300), words, tmp_path / "words")
    assert from_pretrained(tmp_path / "words")[1].fingerprint() == words.fingerprint()
    assert pretrained.plain("module._orig_mod.backbone._orig_mod.ada.weight") == "backbone.ada.weight"
