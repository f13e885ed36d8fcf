"""Pictures have the right size and format, and show the right values."""

import numpy as np
import pytest
import torch
from PIL import Image

from cadd_min.data.pixels import Pixels
from cadd_min.data.tokenizer import gpt2
from cadd_min.orders import Sampling
from cadd_min.sampler import sample
from cadd_min.sampling import text_film
from cadd_min.sampling.generate import samples
from cadd_min.sampling.page import pieces
from cadd_min.sampling.pictures import MASKED, Film, blocks, frame, grid, save, shown, strip
from cadd_min.sampling.text_film import TextFilm
from cadd_min.utils.errors import InputError
from tests.test_unet import NANO
from tests.toys import images, nano, rng

GREY, COLOURED = Pixels((8, 8, 1), 17), Pixels((4, 6, 3))


def test_the_grid_has_the_right_size_and_every_image_in_its_place(tmp_path):
    images = torch.randint(256, (5, 72), generator=rng(0)).to(torch.uint8).view(5, 4, 6, 3).numpy()
    picture = grid(images, columns=3, scale=2, gap=1)
    assert picture.shape == (2 * (8 + 1) + 1, 3 * (12 + 1) + 1, 3)
    for i, image in enumerate(images):
        top, left = 1 + 9 * (i // 3), 1 + 13 * (i % 3)
        assert np.array_equal(picture[top : top + 8 : 2, left : left + 12 : 2], image)
    assert (picture[10:19, 28:] == 255).all()  # the empty place of the sixth image
    with Image.open(save(tmp_path / "new" / "grid.png", picture)) as file:
        assert file.format == "PNG" and np.array_equal(np.asarray(file), picture)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--gif .*file/x\.gif cannot be written"):
        save(tmp_path / "file" / "x.gif", np.zeros((4, 4, 3), np.uint8), option="--gif")


def test_masked_values_are_blue_in_grey_images_and_by_colour_in_others():
    x = torch.full((1, 64), 16)
    x[0, 3] = GREY.mask_id
    picture = shown(x, GREY)
    assert tuple(picture[0, 0, 3]) == MASKED and (picture[0, 1:] == 255).all()
    x = torch.full((1, 72), 200)
    x[0, 1] = COLOURED.mask_id  # the green of the first pixel
    assert shown(x, COLOURED)[0, 0, 0].tolist() == [200, MASKED[1], 200]


@pytest.mark.parametrize("model, zhat", [("cadd", "soft"), ("cadd", "hard"), ("cadd", "sample"), ("mdlm", "hard")])
def test_the_film_shows_masks_and_beliefs(model, zhat, tmp_path):
    """Check the GIF's size and length, and that its last frame is the sample. A belief must not change known tokens."""
    net, film = images(NANO, model=model, latent_dim=2), Film(GREY, 6, images=4)
    steps = []
    x = sample(net, (5, 64), net.table(), net.schedule, 17, steps=6, zhat=zhat, num_latents=2, generator=rng(0),
               callback=lambda step: (film(step), steps.append(step)))  # fmt: skip
    for step in steps:
        belief, masked = step.belief(), step.x == net.mask_id
        assert (belief < net.mask_id).all()
        known = ~masked & ~step.fresh
        assert torch.equal(belief[known], step.x[known])
    width = grid(shown(x[:4], GREY)).shape[1]
    with Image.open(save(tmp_path / "x.gif", *film.frames(), option="--gif")) as gif:
        assert (gif.format, gif.n_frames) == ("GIF", 6) and gif.size == (2 * width, film.frames()[0].shape[0])
    assert np.array_equal(film.frames()[-1][:, :width], grid(GREY.decode(x[:4])))
    assert frame(steps[0], GREY).count("▀") == 4 * (8 + 2 + 8)


def test_beliefs_are_those_of_the_logits():
    """Check every belief under a denoiser that is sure of token 9, for each estimate z0_hat."""
    net = images(NANO, latent_dim=2)

    def oracle(x, z, t):
        return torch.where(torch.arange(17) == 9, 50.0, 0.0).expand(*x.shape, 17)

    for zhat in ("hard", "soft", "sample"):
        beliefs = []
        sample(oracle, (1, 64), net.table(), net.schedule, 17, steps=4, zhat=zhat, generator=rng(0),
               callback=lambda step, beliefs=beliefs: beliefs.append(step.belief()))  # fmt: skip
        assert len(beliefs) == 4 and all((belief == 9).all() for belief in beliefs)


def test_terminal_blocks_are_two_pixels_each():
    image = np.arange(3 * 2 * 3, dtype=np.uint8).reshape(3, 2, 3)
    lines = blocks(image).splitlines()
    assert len(lines) == 2 and lines[0].startswith("\x1b[38;2;0;1;2m\x1b[48;2;6;7;8m▀") and lines[1].endswith("\x1b[0m")
    assert "\x1b[48;2;0;0;0m" in lines[1]  # the missing fourth row is black


@pytest.mark.parametrize("model", ["cadd", "mdlm"])
def test_the_strip_goes_from_the_image_to_all_masked(model):
    net = images(NANO, model=model, latent_dim=2)
    x_0 = torch.randint(17, (1, 64), generator=rng(0))
    picture = strip(net, x_0, GREY, times=5)
    side, rows = 8 * 6 + 2, 2 if model == "cadd" else 1
    assert picture.shape == (rows * side + 2, 5 * side + 2, 3)
    first, last = picture[2:50, 2:50], picture[2:50, 4 * side + 2 : 5 * side]
    assert np.array_equal(first[::6, ::6], shown(x_0, GREY)[0]) and (last == np.array(MASKED)).all()


def test_a_chain_that_ends_early_is_shown_to_its_end():
    """Check that the last frame is the sample where the chain ends between two of the steps that are kept."""
    net, film = images(NANO, latent_dim=2), Film(GREY, 200, images=1, most=3)
    x = sample(net, (1, 64), net.table(), net.schedule, 17, steps=200, generator=rng(0), callback=film)
    assert film.last.number not in film.kept
    width = grid(shown(x, GREY)).shape[1]
    assert np.array_equal(film.frames()[-1][:, :width], grid(GREY.decode(x)))


def test_a_text_is_written_in_a_gif_in_which_nothing_moves(tmp_path):
    """Draw a chain of 64 tokens and 64 steps: under 1 MB, no bar in the last frame, and every token in its place."""
    net, codec = nano(vocab_size=512, length=64), gpt2(512)
    film = TextFilm(net, codec, 64)
    samples(net, Sampling(64, "soft"), 1, seed=0, dtype="float32", callback=film)
    assert str(tmp_path / "t.gif") == film.save(tmp_path / "t.gif") and (tmp_path / "t.gif").stat().st_size < 1e6
    with Image.open(tmp_path / "t.gif") as gif:  # equal frames are one, shown for longer
        assert gif.format == "GIF" and 40 < gif.n_frames <= 64
    frames = film.frames()
    bars = [int((np.abs(frame.astype(int) - text_film.BAR).sum(-1) < 12).sum()) for frame in frames]
    assert 60 < len(frames) <= 65 and bars[0] > bars[20] > bars[40] > 20 * bars[-1]
    words = pieces(film.x.tolist(), codec)
    places, height = text_film.layout(words, text_film.load_font(text_film.SIZE))
    assert height == len(frames[0]) and all(left + width <= text_film.WIDTH for left, _, width in places)
    settled = [n for n, (x, _) in enumerate(film.states) if x[5] != net.mask_id][1:]  # drawn before, not fresh
    left, top, width = (round(value) for value in places[5])
    for n in settled[1:]:
        assert np.array_equal(frames[n][top : top + 20, left + 2 : left + width - 2],
                              frames[-1][top : top + 20, left + 2 : left + width - 2])  # fmt: skip


def test_a_long_text_is_cut_and_the_gif_says_so(tmp_path):
    net = nano(vocab_size=512, length=200)
    film = TextFilm(net, gpt2(512), 2)
    samples(net, Sampling(2), 1, seed=0, dtype="float32", callback=film)
    assert film.save(tmp_path / "t.gif").endswith("t.gif (the first 160 of 200 tokens)")


@pytest.mark.parametrize("name, message", [("t.png", "must be a file that ends in .gif"), ("no/t.gif", "No such file")])
def test_a_gif_that_cannot_be_is_refused_before_sampling(name, message, tmp_path):
    with pytest.raises(InputError, match=f"--gif .*{message}"):
        text_film.check_gif(tmp_path / name)
