"""The page of --html replays the chain: in a real browser, by its stored events, and against the densities.

The browser is Debian's chromium, driven by playwright.
"""

import json
import re
import shutil

import pytest
import torch

from cadd_min.data import tokenizer
from cadd_min.data.pixels import Pixels
from cadd_min.model import ModelConfig
from cadd_min.orders import Sampling
from cadd_min.sampling import generate, page
from cadd_min.utils.errors import InputError
from tests.test_unet import NANO as UNET
from tests.toys import NANO, images, nano, rng, save_untrained

CHARS = tokenizer.chars("abcdefgh <>&/'\"script\n")
TRICKY = '</script><b>&"'
browser = pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")


def stored(path) -> dict:
    """Read the page's data, as its script does."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.S)[1])


def replayed(sample: dict) -> list[int]:
    """Apply all events to the tokens of the start."""
    x = list(sample["start"])
    for events in sample["events"]:
        for at, token in zip(events[::2], events[1::2]):
            x[at] = token
    return x


def record(model, codec, settings: Sampling, count: int = 2, prompt=None, chains: int = 1):
    recorder = page.Recorder(model, codec, count, prompt, settings, chains)
    x = generate.samples(model, settings, count, seed=1, dtype="float32", prompt=prompt, callback=recorder)
    return recorder, x


# ------------------------------------------------------------------------------------------------ the stored chain


CHAINS = [{}, {"remask": 0.3}, {"time_grid": "first-hitting"}, {"num_latents": 2, "zhat": "soft"}, {"order": "entropy"}]


@pytest.mark.parametrize(
    "model, options", [*(("cadd", options) for options in CHAINS), ("mdlm", CHAINS[1]), ("ar", {}), ("sedd", {})]
)
def test_the_events_give_the_samples(model, options, tmp_path):
    """Replay the stored events: they end at the tokens that were drawn. An event more or less would not."""
    net = nano(model, vocab_size=len(CHARS.spec()["alphabet"]) + 1)
    recorder, x = record(net, CHARS, Sampling(steps=6, **options))
    page.write(tmp_path / "p.html", "a title", "settings", [recorder])
    data = stored(tmp_path / "p.html")
    ids = [CHARS.decode([token]) for token in x.flatten().tolist()]
    assert [data["vocab"][v] for sample in data["chains"][0]["samples"] for v in replayed(sample)] == ids
    assert data["latents"] == (model == "cadd") and len(data["chains"][0]["t"]) == len(recorder.events) + 1


def test_what_a_latent_says_is_bayes_rule():
    """Compare the stored probabilities with normal densities, and the stored tokens with the network's belief."""
    net, states = nano(vocab_size=8), []
    settings = Sampling(steps=4)
    recorder = page.Recorder(net, tokenizer.chars("abcdefg"), 2, None, settings, 1)
    keep = lambda step: states.append((step.s, step.x, step.z, step.belief()))
    generate.samples(net, settings, 2, seed=0, dtype="float32", callback=generate.together(recorder, keep))
    checked = 0
    for n, rows in zip(recorder.told, recorder.beliefs):
        s, x, z, belief = states[n - 1]
        t = torch.tensor(s)
        for row, of_sample in enumerate(rows):
            assert [place for place, *_ in of_sample] == (x[row] == net.mask_id).nonzero()[:, 0].tolist()
            for place, network, *told in of_sample:
                density = torch.distributions.Normal(net.schedule.signal(t) * net.table()[:8], net.schedule.noise(t))
                p = density.log_prob(z[0, row, place]).sum(-1).softmax(-1)
                assert told[::2] == p.topk(3).indices.tolist() and network == belief[row, place]
                assert told[1::2] == (1000 * p.topk(3).values).round().tolist()
                checked += 1
    assert checked > 20


def test_an_image_is_replayed_with_what_its_latents_tell(tmp_path):
    net, pixels = images(UNET, latent_dim=2), Pixels((8, 8, 1), 17)
    recorder, x = record(net, pixels, Sampling(steps=5, zhat="soft"), count=3)
    page.write(tmp_path / "p.html", "", "", [recorder])
    data = stored(tmp_path / "p.html")
    assert [replayed(sample) for sample in data["chains"][0]["samples"]] == x.tolist()
    told = data["chains"][0]["samples"][0]["beliefs"][-1]
    assert [int(told[i : i + 2], 16) for i in range(0, 128, 2)] == x[0].tolist()  # at the end nothing is masked


def test_pieces_are_the_text_and_wait_for_whole_characters():
    gpt2 = tokenizer.gpt2(512)
    text = "Héllo, 世界! 🙂 a\nb"
    ids = gpt2.encode(text)
    assert "�" in "".join(gpt2.decode([i]) for i in ids)  # power: token by token it is another text
    assert "".join(page.pieces(ids, gpt2)) == text and len(page.pieces(ids, gpt2)) == len(ids)
    noise = torch.randint(512, (300,), generator=rng(0)).tolist()
    assert "".join(page.pieces(noise, gpt2)) == gpt2.decode(noise)


@pytest.mark.parametrize(
    "path, model, options, count, message",
    [
        ("x.txt", "cadd", {}, 1, r"--html must be a file that ends in \.html"),
        ("missing/x.html", "cadd", {}, 1, r"--html .*missing/x\.html cannot be written: No such file"),
        ("file/x.html", "cadd", {}, 1, r"--html .* cannot be written: Not a directory"),
        ("x.html", "udm", {}, 1, "--html shows what is masked, and udm has no masks"),
        ("x.html", "cadd", {}, 99_999, r"would write about [\d.]+ MB, and a page has 5 at most: lower --num to \d+$"),
        ("x.html", "cadd", {"remask": 1.0, "steps": 99_999}, 1, "lower --steps, or take --remask 0"),
    ],
)
def test_a_page_that_cannot_be_is_refused_before_sampling(path, model, options, count, message, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=message):
        page.check(tmp_path / path, nano(model), Sampling(**options), count, chains=1)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_number_that_is_named_fits():
    net, settings = nano(length=64), Sampling(steps=64)
    for chains in (1, 3):
        with pytest.raises(InputError) as refused:
            page.check(page.Path("x.html"), net, settings, 20_000, chains)
        fits = int(str(refused.value).rpartition(" ")[2])
        page.check(page.Path("x.html"), net, settings, fits, chains)
        with pytest.raises(InputError):
            page.check(page.Path("x.html"), net, settings, fits + 1, chains)


def test_the_longest_page_is_under_five_megabytes(tmp_path):
    """Record 4,096 tokens of a large vocabulary at 1,024 steps, drawn by a stand-in for the chain."""
    net = nano(vocab_size=50_258, length=4096)
    codec, settings = tokenizer.gpt2(50_257), Sampling(steps=1024)
    page.check(tmp_path / "x.html", net, settings, 1, 1)
    recorder = page.Recorder(net, codec, 1, None, settings, 1)
    x, order = torch.full((1, 4096), net.mask_id), torch.randperm(4096, generator=rng(0))
    z = torch.randn(1, 1, 4096, net.table().shape[1], generator=rng(1))
    for n in range(1024):
        x[0, order[4 * n : 4 * n + 4]] = torch.randint(50_256, (4,), generator=rng(n))
        recorder(page.Step(n, 1 - n / 1024, 1 - (n + 1) / 1024, x.clone(), z, x < 0, lambda: x % 50_256))
    page.write(tmp_path / "x.html", "", "", [recorder])
    assert (tmp_path / "x.html").stat().st_size < 2_500_000 and len(recorder.told) >= 2


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture
def opened(call, tmp_path):
    """Make a page of two samples by three estimates, and open it. Errors of the console and requests are kept."""
    sync_api = pytest.importorskip("playwright.sync_api")
    vocabulary = len(CHARS.spec()["alphabet"]) + 1
    save_untrained(tmp_path / "runs/a/checkpoint.pt", ModelConfig(vocabulary, 24, NANO), CHARS.spec())
    prompt = TRICKY.replace('"', '\\"')
    code, out, err = call(f'sample.py --html page.html --zhat hard soft sample --num 2 --steps 8 --prompt "{prompt}"')
    assert code == 0, err
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = chromium.new_page(viewport={"width": 1200, "height": 900})
        tab.problems, tab.printed = [], re.split(r"--- \w+\n\n|\n\n", out.partition("model cadd")[0])
        tab.on("console", lambda message: tab.problems.append(message.text))
        tab.on("pageerror", lambda error: tab.problems.append(str(error)))
        tab.on("request", lambda request: tab.problems.append(request.url) if request.url.startswith("http") else None)
        tab.goto((tmp_path / "page.html").as_uri())
        yield tab
        assert tab.problems == []
        chromium.close()


def texts(tab) -> list[str]:
    return tab.eval_on_selector_all(".text", "boxes => boxes.map(b => b.textContent)")


def move_slider(tab, step: int) -> None:
    tab.eval_on_selector("#step", f"e => {{ e.value = {step}; e.dispatchEvent(new Event('input')); }}")


@browser
def test_the_slider_moves_through_the_chain_and_ends_at_the_printed_samples(opened):
    assert opened.locator("h2").all_text_contents() == ["hard", "soft", "sample"]
    start, masks = texts(opened), opened.locator(".mask").count()
    assert masks == 6 * (24 - len(TRICKY)) and all(text.startswith(TRICKY) for text in start)
    assert opened.locator("b").count() == 0  # what a sample writes is text, never markup
    left = []
    for step in (2, 5, 8):
        move_slider(opened, step)
        left.append(opened.locator(".mask").count())
        assert opened.locator(".fresh").count() > 0 or step == 5
    assert masks > left[0] > left[1] > left[2] == 0
    assert texts(opened) == [text for text in opened.printed if text.strip()]
    move_slider(opened, 0)
    assert texts(opened) == start


@browser
def test_the_keyboard_alone_plays_steps_and_looks_at_masks(opened):
    keys, state = opened.keyboard, opened.locator("#state")
    keys.press("Home"), keys.press("ArrowRight"), keys.press("ArrowRight")
    assert state.text_content().startswith("step 2 of 8")
    opened.locator(".text").first.focus()
    first = opened.locator("#tip").text_content()
    assert (
        len(re.findall(r"\d+(\.\d)?%", first)) == 3 and "the network:" in first and opened.locator("#tip").is_visible()
    )
    keys.press("ArrowRight")
    assert opened.locator("#tip").text_content().partition(",")[0] != first.partition(",")[0]
    keys.press("Escape")
    assert not opened.locator("#tip").is_visible()
    keys.press("Space")
    opened.wait_for_function("document.getElementById('state').textContent.startsWith('step 8 of 8')", timeout=120_000)
    opened.wait_for_function("document.getElementById('play').textContent === 'Play'")
    keys.press("Tab"), keys.press("Tab")
    assert opened.evaluate("document.activeElement !== document.body")


CONTRAST = """() => {
  const light = rgb => { const [r, g, b] = rgb.match(/[\\d.]+/g).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return ["body", "p", ".mask span", ".fresh", "#state", "legend", "h2"].map(name => {
    const ink = light(getComputedStyle(document.querySelector(name)).color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  });
}"""


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark_and_on_a_phone(opened, scheme):
    opened.emulate_media(color_scheme=scheme)
    opened.set_viewport_size({"width": 375, "height": 700})
    move_slider(opened, 4)
    paper = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    assert min(opened.evaluate(CONTRAST)) >= 4.5
    assert opened.evaluate("document.documentElement.scrollWidth") <= 375
    opened.locator(".mask").first.hover()
    assert opened.locator("#tip").bounding_box()["x"] + opened.locator("#tip").bounding_box()["width"] <= 375
