"""The commands of images: training, sampling, inpainting and evaluation, and one sentence for bad input."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cadd_min.checkpoints import file as checkpoint
from cadd_min.checkpoints.load import load_denoiser
from cadd_min.data.pixels import Pixels
from cadd_min.data.tokenizer import gpt2
from cadd_min.dit import PRESETS
from cadd_min.model import ModelConfig
from cadd_min.unet import UNET_PRESETS
from tests.toys import save_untrained

NANO = "--preset nano --batch-size 8 --steps 4 --eval-every 2 --sample-every 4"


@pytest.fixture
def npz(tmp_path):
    """Write fifty images of 6 x 5 pixels in colour, and labels of three classes."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "my.npz", x_train=rng.integers(0, 256, (50, 6, 5, 3), np.uint8), y_train=np.arange(50) % 3)
    return tmp_path / "my.npz"


@pytest.mark.parametrize("model", ["cadd", "mdlm", "cdm"])
def test_train_then_sample_by_changing_one_word(model, call):
    """Train each of the paper's models, sample a picture and a GIF, and check their sizes. One seed, one picture."""
    code, out, err = call(f"train_image.py --model {model} {NANO}")
    assert code == 0 and f"trained: runs/digits-{model}" in out, err
    folder = Path("runs") / f"digits-{model}"
    files = {"checkpoint.pt", "metrics.jsonl", "loss.png", "forward.png", "samples-000004.png"}
    assert {p.name for p in folder.iterdir()} >= files
    code, out, err = call(
        "sample.py --steps 4 --num 6 --gif path.gif --time-grid cosine --cosine-temperature --num-latents 2"
    )
    assert code == 0, err
    assert re.search(rf"model {model} at step 4 .* zhat soft, T 4 \(cosine\), K 2, temperature 2.5 to 1.0", out)
    with Image.open("samples.png") as picture, Image.open("path.gif") as gif:
        assert picture.size == (3 * 50 + 2, 2 * 50 + 2) and gif.size == (2 * 152, 102)
        assert gif.n_frames == 4 or model == "cdm"  # all is masked to the end, and equal frames become one
    first = Path("samples.png").read_bytes()
    call("sample.py --steps 4 --num 6 --time-grid cosine --cosine-temperature --num-latents 2")
    assert Path("samples.png").read_bytes() == first


def test_classes_resume_and_the_other_backbone(call, npz):
    """Train with classes, sample with guidance, resume, and train the other backbone. train_text.py refuses the run."""
    assert call(f"train_image.py --dataset {npz} --classes --flip {NANO} --out a")[0] == 0
    code, out, _ = call("sample.py --ckpt a --steps 3 --classes 2 0 --guidance 2.5 --num 4 --out b/x.png")
    assert code == 0 and "classes 2, 0, guidance 2.5" in out
    with Image.open("b/x.png") as picture:
        assert picture.size == (2 * (5 * 8 + 2) + 2, 2 * (6 * 8 + 2) + 2)
    code, _, err = call("train_image.py --resume --out a --steps 6")
    assert code == 0, err
    content = checkpoint.load(Path("a"))
    assert content["trainer"]["step"] == 6 and content["model_config"]["classes"] == 3
    code, _, err = call("train_text.py --resume --out a --steps 8")
    assert code == 2 and "was trained by train_image.py" in err
    assert call(f"train_image.py --backbone dit --preset tiny {NANO.replace('--preset nano', '')} --out c")[0] == 0
    assert call("sample.py --ckpt c --steps 2 --num 2 --watch")[0] == 0


def test_inpainting_never_changes_a_given_pixel(call, npz):
    """Compare the samples with the image outside the mask, pixel by pixel. Inside the mask something must change."""
    assert call(f"train_image.py --dataset {npz} {NANO} --out a")[0] == 0
    rng = np.random.default_rng(1)
    image, hole = rng.integers(0, 256, (6, 5, 3), np.uint8), np.zeros((6, 5), np.uint8)
    hole[1:4, 2:] = 255
    Image.fromarray(image).save("image.png"), Image.fromarray(hole).save("hole.png")
    for zhat in ("soft", "hard"):
        code, _, err = call(f"sample.py --ckpt a --steps 3 --inpaint image.png --mask hole.png --num 5 --zhat {zhat}")
        assert code == 0, err
        picture = np.asarray(Image.open("samples.png"))
        for i in range(5):
            top, left = 2 + 50 * (i // 3), 2 + 42 * (i % 3)
            painted = picture[top : top + 48 : 8, left : left + 40 : 8]
            assert np.array_equal(painted[hole == 0], image[hole == 0]) and (painted != image)[hole == 255].any()


def test_evaluate_says_what_it_measured(call, npz):
    """Check that the bound's parts add up, and that the output names its settings and never calls its distance FID."""
    assert call(f"train_image.py --dataset {npz} --classes {NANO} --out a")[0] == 0
    code, out, err = call("evaluate.py bound --ckpt a --repeat 1")
    assert code == 0, err
    bits = {name: float(value) for name, value in re.findall(r"^(.*?)  +(\S+)$", out, re.M)}
    assert bits["images"] == 10 and bits["of it tokens"] > 7  # of noise in 256 levels
    parts = bits["of it tokens"] + bits["of it latents"]
    assert parts == pytest.approx(bits["bound, bits per dimension"], abs=2e-4)
    code, out, _ = call("evaluate.py bound --ckpt a --repeat 1 --T 4")
    assert code == 0 and "T 4" in out
    code, out, err = call("evaluate.py frechet --ckpt a --num 12 --steps 2")
    assert code == 0 and "not FID" in out and "zhat soft, T 2" in out and "FID " not in out.replace("not FID", ""), err


def checkpoints(folder: Path) -> dict[str, Path]:
    """Save two untrained models of images, with classes and without. Returns their paths by name."""
    pixels, paths = Pixels((8, 8, 1), 17), {}
    for name, classes in (("classes", 3), ("plain", 0)):
        config = ModelConfig(17, 64, UNET_PRESETS["nano"], pixels.shape, classes)
        paths[name] = save_untrained(folder / f"{name}.pt", config, pixels.spec())
    return paths


@pytest.mark.parametrize(
    "command, message",
    [
        (
            "train_image.py --dataset nowhere",
            "--dataset must be one of digits, fashion-mnist, cifar10, imagenet32 or a",
        ),
        ("train_image.py --dataset {text}", "is not an .npz file that can be read"),
        ("train_image.py --dataset empty", "is a folder without .png, .jpg, .jpeg files"),
        ("train_image.py --dataset imagenet32", "--dataset imagenet32 needs --archive"),
        ("train_image.py --dataset cifar10 --archive none.tar.gz", "--archive none.tar.gz does not exist"),
        ("train_image.py --dataset cifar10 --archive {text}", "has the MD5 checksum"),
        ("train_image.py --dataset unlabelled.npz --classes", "--classes needs labels"),
        ("train_image.py --preset huge", "--preset must be one of nano, tiny, cifar10, imagenet32"),
        ("train_image.py --backbone mlp", "--backbone must be one of unet, dit"),
        ("train_image.py --dataset {npz} --backbone dit --preset cifar10", "patches of 2 must tile the images"),
        ("train_image.py --drop-label 2", "drop_label must be between 0 and 1"),
        ("sample.py --ckpt {plain} --guidance 2", "--guidance needs a model of classes"),
        ("sample.py --ckpt {plain} --classes 1", "--classes needs a model of classes"),
        ("sample.py --ckpt {classes} --classes 3", "--classes must be from 0 to 2, not 3"),
        ("sample.py --ckpt {classes} --guidance nan", "--guidance must be 0 or more"),
        ("sample.py --ckpt {plain} --prompt x", "--prompt is for models of text"),
        ("sample.py --ckpt {plain} --out x.bmp", "--out must be a file that ends in .png"),
        ("sample.py --ckpt {plain} --gif x.png", "--gif must be a file that ends in .gif"),
        ("sample.py --ckpt {plain} --gif no/x.gif", "--gif no/x.gif cannot be written: No such file"),
        ("sample.py --ckpt {plain} --html no/x.html", "--html no/x.html cannot be written: No such file"),
        ("sample.py --ckpt {plain} --html x.png", "--html must be a file that ends in .html, not x.png"),
        ("sample.py --ckpt {plain} --inpaint grey.png", "--inpaint and --mask go together"),
        ("sample.py --ckpt {plain} --inpaint grey.png --mask small.png", "--mask must be 8 x 8 pixels, not 8 x 7"),
        ("sample.py --ckpt {plain} --inpaint none.png --mask grey.png", "--inpaint none.png cannot be read"),
        ("sample.py --ckpt {plain} --inpaint {text} --mask grey.png", "is not an image that can be read"),
        ("evaluate.py frechet --ckpt {plain} --num 3", "--num must be at least 10"),
        ("evaluate.py frechet --ckpt {plain} --guidance 2", "--guidance needs a model of classes"),
        ("evaluate.py bound --ckpt {plain} --repeat 0", "--repeat must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(command, message, call, npz, tmp_path):
    """Check exit code 2, one line of error that names the mistake, and that no file is written."""
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "unlabelled.npz", x_train=np.zeros((10, 3, 3, 1), np.uint8))
    for name, width in (("grey", 8), ("small", 7)):
        Image.fromarray(np.zeros((8, width), np.uint8)).save(tmp_path / f"{name}.png")
    before = set(tmp_path.rglob("*")) | set(checkpoints(tmp_path).values())
    code, _, err = call(command.format(text=tmp_path / "text.txt", npz=npz, **checkpoints(tmp_path)))
    assert code == 2 and len(err.splitlines()) == 1 and message in err
    assert not {p for p in tmp_path.rglob("*") if p.is_file()} - before


def test_image_options_are_refused_for_text(call, tmp_path):
    save_untrained(tmp_path / "text.pt", ModelConfig(300, 8, PRESETS["nano"]), gpt2(300).spec())
    for option in ("--out x.png", "--classes 1", "--guidance 1", "--inpaint x.png"):
        code, _, err = call(f"sample.py --ckpt text.pt {option}")
        assert code == 2 and f"{option.split()[0]} is for models of images" in err


def test_checkpoints_of_images_load_as_they_were_saved(tmp_path):
    for path in checkpoints(tmp_path).values():
        model, pixels, _ = load_denoiser(path)
        assert isinstance(pixels, Pixels) and isinstance(model.config.size, type(UNET_PRESETS["nano"]))
        assert torch.equal(model.embedding.weight, checkpoint.load(path)["trainer"]["ema"]["embedding.weight"])


def test_without_pillow_it_says_so_before_it_trains(call, monkeypatch):
    """Check that a missing package is found before the training, not at its first picture."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    code, _, err = call("train_image.py")
    assert code == 2 and err == "error: pictures need their package: pip install pillow\n" and not Path("runs").exists()
