"""The commands of text: all that README and docs/commands.md show work, and bad input is one sentence, exit code 2."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.text import ABLATIONS
from cadd_min.checkpoints import file as checkpoint
from cadd_min.data import sudoku
from cadd_min.data.tokenizer import GPT2_SIZE, gpt2
from cadd_min.dit import PRESETS
from cadd_min.model import ModelConfig
from cadd_min.sampling.text import frame, parse_prompt
from tests.checkpoints.test_mdlm import public_state
from tests.codebench import test_codebench as test_code
from tests.toys import ROOT, TINY, save_untrained
from tests.upgrade.test_upgrade import write


@pytest.mark.parametrize("model", ["cadd", "mdlm", "cdm"])
def test_train_then_sample_by_changing_one_word(model, call, text):
    """Train each of the paper's models, and sample twice with each set of options: one seed gives one output."""
    code, out, err = call(f"train_text.py --dataset {text} --model {model} {TINY}")
    assert code == 0 and "trained: runs/text-" in out, err
    folder = Path("runs") / f"text-{model}"
    assert {p.name for p in folder.iterdir()} >= {"checkpoint.pt", "metrics.jsonl", "loss.png"}
    for options in ("--zhat hard", "--zhat soft --num-latents 4", "--zhat sample --num 2 --top-p 0.9 --temperature 0.7",
                    "--strength 0 --time-grid cosine --cosine-temperature"):  # fmt: skip
        code, out, _ = call(f"sample.py --steps 4 --seed 3 {options}")
        assert code == 0 and out == call(f"sample.py --steps 4 --seed 3 {options}")[1]
        assert re.search(rf"model {model} at step 4 .* backend \w+, zhat \w+, T 4 .* K \d, temperature .* seed 3", out)
        assert "[mask]" not in out


def test_runs_are_never_overwritten_and_resume_goes_on(call, text):
    """Check that a second run gets a new folder, and that --resume refuses another network and other tokens."""
    assert call(f"train_text.py --dataset {text} {TINY}")[0] == 0
    assert call(f"train_text.py --dataset {text} {TINY}")[0] == 0
    assert Path("runs/text-cadd-2/checkpoint.pt").exists()
    code, _, err = call(f"train_text.py --dataset {text} {TINY} --out runs/text-cadd")
    assert code == 2 and "--resume it" in err
    assert call("train_text.py --resume --out runs/text-cadd --steps 6")[0] == 0
    content = checkpoint.load(Path("runs/text-cadd"))
    assert content["trainer"]["step"] == 6
    assert content["settings"]["dtype"] in ("float32", "bfloat16")  # "auto" is decided once, at the start
    code, _, err = call("train_text.py --resume --out runs/text-cadd --preset tiny --steps 8")
    assert code == 2 and "another shape" in err
    letters = "--dataset other.txt --tokenizer chars --out runs/chars --steps 8"
    Path("other.txt").write_text("abc " * 300)
    assert call(f"train_text.py {TINY} {letters} --log-every 0")[0] == 0
    Path("other.txt").write_text("xyz " * 300)
    code, _, err = call("train_text.py --resume --out runs/chars --steps 9")
    assert code == 2 and "other tokens" in err


def test_prompts_keep_what_is_given(call, text):
    """Check that [n] in a prompt is n free tokens, that all else stays, and that too long prompts are refused."""
    call(f"train_text.py --dataset {text} {TINY}")
    code, out, _ = call('sample.py --steps 3 --prompt "To be[3] not"')
    assert code == 0 and out.startswith("To be") and " not" in out
    for prompt in ("[17]", "[9] and [9]"):
        code, _, err = call(f'sample.py --prompt "{prompt}"')
        assert code == 2 and "tokens" in err and "length is 16" in err
    words = gpt2(300)
    ids = parse_prompt("To[2] be", words, 16).tolist()
    head, tail = words.encode("To"), words.encode(" be")
    assert ids[: len(head) + 2 + len(tail)] == [*head, 300, 300, *tail] and ids[-1] == 300


def test_watch_shows_masks_dim_and_fresh_tokens_bright(call, text):
    """Check the lines of --watch, and the terminal codes of a frame: a known, a masked and a fresh token."""
    call(f"train_text.py --dataset {text} {TINY}")
    code, out, _ = call("sample.py --steps 3 --watch")
    assert code == 0 and "step 1/3" in out and "step 3/3  t = 0.000  0 masked" in out
    words = gpt2(300)
    x = torch.tensor([words.encode("A")[0], words.mask_id, words.encode("B")[0]])
    shown = frame(x, torch.tensor([False, False, True]), words)
    assert shown == "A\x1b[2m·\x1b[0m \x1b[1;92mB\x1b[0m"


PAGES = ("README.md", "docs/commands.md")
LETTERS = str.maketrans("01234567", "abdeikmu")  # of digits, in names


def commands_of(page: str) -> list[str]:
    """Read the command lines of a page's code blocks, without comments, with continued lines joined."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / page).read_text(), re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith(("python ", "torchrun "))]


@pytest.fixture
def photos(tmp_path):
    """Write the files that the image commands name: a folder of two classes, an image and a mask of its size."""
    rng = np.random.default_rng(0)
    for name in ("photos/cats/", "photos/dogs/"):
        (tmp_path / name).mkdir(parents=True)
    for path in [*(f"photos/{'cats' if i % 2 else 'dogs'}/{i}.png" for i in range(20)), "image.png", "mask.png"]:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / path)


def few(command: str, text: Path) -> str:
    """Return the same command with small models, little data and few steps."""
    script = command.split()[0]
    if script == "train_text.py" and "--resume" not in command:
        data = "" if "--dataset" in command else f" --dataset {text}"
        small = TINY.replace("--length 16", "" if "sudoku" in command else "--length 64")
        return f"{command.replace('my.txt', str(text))}{data} {small}"
    if script == "train_image.py":
        return f"{command} --preset nano --batch-size 4 --steps 4"
    if command.startswith("evaluate.py code"):
        problems = "" if "--problems" in command else " --problems human.jsonl"
        return f"{command}{problems} --steps 2"
    if script == "evaluate.py":
        judged = command.split()[1] in ("samples", "frontier")  # test_cli_text.py runs them with the real judge
        judge = " --judge causal" if judged else ""
        steps = "" if command.startswith("evaluate.py bound") else " --steps 2"
        return f"{command} --num 12{steps}{judge}"
    if script == "finetune.py":
        command = command.replace("my.txt", str(text)).replace("owner/name", "masked").replace("smollm2", "causal")
        length = "" if "--from mdlm" in command else "--length 40"  # that model has a length of its own
        return f"{command} {length} --batch-size 4 --steps 4 --eval-every 0 --sample-every 0"
    return command if script == "export.py" else f"{command} --steps 4"


def test_every_command_shown_works(call, text, photos, monkeypatch, tmp_path):
    """Run all commands in the pages' order, on little data, for few steps.

    OpenWebText, MOSES and torchrun are only parsed.
    """
    assert len(commands_of("README.md")) == 9
    commands = [command for page in PAGES for command in commands_of(page)]
    monkeypatch.setattr("tests.checkpoints.test_mdlm.VOCAB", GPT2_SIZE)
    save_file(public_state(), tmp_path / "mdlm.safetensors")
    test_code.write(tmp_path / "human.jsonl", test_code.HUMAN)
    test_code.write(tmp_path / "mbpp.jsonl", test_code.MBPP)
    write("llama", tmp_path / "causal", mask=False)  # in the place of the hub's models
    write("bert", tmp_path / "masked")
    (tmp_path / "names.txt").write_text("\n".join(f"Ka{n:o}mi".translate(LETTERS) for n in range(600)))
    (tmp_path / "qm9.txt").write_text("\n".join("C" * (1 + n % 20) for n in range(600)))
    monkeypatch.setattr(sudoku.write, "__defaults__", (400, 3))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 30)
    for script in ("sample.py", "train_text.py", "train_image.py", "evaluate.py", "finetune.py"):
        assert sum(script in c for c in commands) >= 2
    for command in commands:
        command = command.removeprefix("python ")
        command = re.sub(r"^-m (cadd_min\.[\w.]+)", lambda m: f"{m[1].replace('.', '/')}.py", command)
        if command.startswith("-m benchmarks.text"):  # test_cli_text.py runs it
            assert re.search(r"--ablation (\w+)", command)[1] in ABLATIONS
            continue
        if re.search("owt|torchrun|moses", command):  # test_distributed.py runs torchrun
            parser = runpy.run_path(str(ROOT / "train_text.py"))["build_parser"]()
            assert parser.parse_args(shlex.split(command.partition("train_text.py")[2])).accumulate in (0, 16)
            continue
        code, _, err = call(few(command, text))
        assert code == 0, (command, err)


def test_pages_name_files_targets_and_extras_that_exist():
    """Check the make targets, the extras of the package, and the links within the repository, of every page."""
    project, makefile = (ROOT / "pyproject.toml").read_text(), (ROOT / "Makefile").read_text()
    for page in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")):
        text = page.read_text()
        for target in re.findall(r"`make (\w+(?:-\w+)*)", text):
            assert f"\n{target}:" in makefile, (page, target)
        extras = ",".join(re.findall(r"-e\s+'\.\[(.*?)\]'", text))
        assert all(f"\n{extra} = [" in project for extra in filter(None, extras.split(","))), page
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (page.parent / link).exists(), (page, link)


def test_readme_is_short_and_shows_before_it_tells():
    """Check README's length and its first figure's line, and that each loose file of the package is named there."""
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 1000
    assert readme[: readme.index("![")].count("\n") < 20
    for file in (ROOT / "cadd_min").glob("*.py"):
        assert file.name in readme or file.name in ("__init__.py", "unet.py")


@pytest.mark.parametrize(
    "command, message",
    [
        ("train_text.py --dataset nowhere", "--dataset must be one of sotu, shakespeare, text8, owt, moses"),
        (
            "train_text.py --dataset {text} --model gan",
            "model must be one of cadd, mdlm, cdm, ar, udm, sedd, not",
        ),
        ("train_text.py --dataset {text} --preset huge", "--preset must be one of nano, tiny, small, not"),
        ("train_text.py --dataset {text} --length 0", "length 1 at least"),
        ("train_text.py --dataset {text} --length 100000", "fewer than one sequence of --length 100000"),
        ("train_text.py --dataset {text} --seed -1", "seed must be 0 or more"),
        ("train_text.py --dataset {text} {tiny} --out {text}", "--out must be a folder"),
        ("train_text.py --dataset {text} {tiny} --lr 1e30 --clip 1e30", "not finite in 3 steps in a row, to step 4"),
        ("train_text.py --dataset {text} --vocab-size 10", "vocab size must be from 257"),
        ("train_text.py --dataset {text} --tokenizer t5", "--tokenizer must be one of gpt2, chars"),
        ("train_text.py --dataset {text} --steps 0", "steps must be at least 1"),
        ("train_text.py --dataset {text} --fusion mul", "fusion must be one of add, concat, reweight"),
        ("train_text.py --dataset {text} --hint none", "hint must be one of"),
        ("train_text.py --dataset {text} --evidence 0", "evidence must be greater than 0"),
        ("train_text.py --dataset {text} --latent-norm -1", "latent_norm and latent_dim must be 0 or more"),
        ("train_text.py --dataset {text} --latent-dim 7 --latent-table free", "latent dim 7: a free table"),
        ("train_text.py --dataset {text} --bayes-head --latent-table free", "bayes_head needs rows of one length"),
        ("train_text.py --dataset {text} --continuous log", "continuous schedule must be one of"),
        ("train_text.py --dataset {empty}", "is empty"),
        ("train_text.py --dataset {tokens}", "index.json is damaged"),
        ("train_text.py --resume", "there is no checkpoint"),
        ("train_text.py --device tpu9", "--device must be"),
        ("sample.py --ckpt none.pt", "there is no checkpoint at none.pt"),
        ("sample.py --ckpt {text}", "is not a checkpoint"),
        ("sample.py --ckpt {good} --zhat mushy", "zhat must be one of hard, soft, sample"),
        ("sample.py --ckpt {good} --zhat hard mushy --html x.html", "zhat must be one of hard, soft, sample"),
        ("sample.py --ckpt {good} --zhat hard soft", "--zhat takes several (different) estimates only with --html"),
        ("sample.py --ckpt {good} --zhat hard hard --html x.html", "--zhat takes several (different) estimates only"),
        ("sample.py --ckpt {good} --html no/x.html", "--html no/x.html cannot be written: No such file"),
        ("sample.py --ckpt {good} --html {text}/x.html", "cannot be written: Not a directory"),
        ("sample.py --ckpt {good} --html /proc/x.html", "--html /proc/x.html cannot be written"),
        ("sample.py --ckpt {good} --html x.html --num 99999999", "a page has 5 at most: lower --num to"),
        ("sample.py --ckpt {good} --gif no/x.gif", "--gif no/x.gif cannot be written: No such file"),
        ("sample.py --ckpt {good} --gif x.png", "--gif must be a file that ends in .gif, not x.png"),
        ("sample.py --ckpt {good} --steps 0", "steps must be at least 1"),
        ("sample.py --ckpt {good} --num-latents 0", "num_latents must be at least 1"),
        ("sample.py --ckpt {good} --num 0", "--num must be at least 1"),
        ("sample.py --ckpt {good} --top-p 0", "top_p must be in (0, 1]"),
        ("sample.py --ckpt {good} --temperature -1", "temperature must be 0 or more"),
        ("sample.py --ckpt {good} --temperature 1 --cosine-temperature nan", "temperature must be 0 or more"),
        ("sample.py --ckpt {good} --strength inf", "strength must be a number"),
        ("sample.py --ckpt {good} --seed 99999999999999999999", "--seed must be from 0"),
        ("sample.py --ckpt {good} --prompt [99999999999999999999]", "has a gap of 99999999999999999999 tokens"),
        ("sample.py --ckpt {good} --device meta", "--device must be"),
        ("sample.py --ckpt {good} --device tpu9", "--device must be"),
        ("sample.py --ckpt {good} --length 9", "--length goes with --from"),
        ("sample.py --ckpt {good} --prompt a --chat", "--chat is for models with a chat template"),
        ("sample.py --from nowhere", "there is no folder nowhere"),
        ("finetune.py --dataset {text}", "--from must name a model"),
        ("finetune.py --from nowhere", "there is no folder nowhere"),
        # what is wrong whatever the model and the data are is said before these are looked for
        ("finetune.py --from nowhere --lr -1", "lr must be greater than 0"),
        ("finetune.py --from nowhere --evidence -1", "evidence must be 0 or more"),
        ("finetune.py --from nowhere --length 0", "length must be at least 1"),
        ("finetune.py --from nowhere --steps 3 --anneal 4", "--anneal must be at most --steps 3"),
        ("finetune.py --from nowhere --dataset nothere", "--dataset must be one of"),
        ("finetune.py --from nowhere --dataset {text} --chat", "--chat is for prompts and responses"),
        ("train_text.py --dataset nothere --shard", "shard needs processes to share with: torchrun"),
        ("train_text.py --dataset nothere --log-every -1", "log_every must be 0"),
        ("train_text.py --dataset nothere --model cdm --weighting elbo", "no weight at all"),
        ("train_text.py --dataset nothere --out {text}", "--out must be a folder"),
        ("train_image.py --dataset nothere --ema 2", "ema must be between 0 and 1"),
        ("train_image.py --dataset nothere --anyway", "--anyway goes with --resume"),
        ("sample.py --from nowhere --temperature -1", "temperature must be 0 or more"),
        ("sample.py --from nowhere --num 0", "--num must be at least 1"),
        ("sample.py --from nowhere --order x", "order must be one of"),
        ("evaluate.py infill --ckpt nothere --masked 2", "--masked must be"),
        ("evaluate.py infill --ckpt nothere --top-p 2", "top_p must be in (0, 1]"),
        ("evaluate.py bound --ckpt nothere --num 0", "--num must be at least 1"),
        ("evaluate.py bound --ckpt nothere --repeat 0", "--repeat must be at least 1"),
        ("finetune.py --from {good} --dataset {text} --anneal 3", "anneal is for models of the Hugging Face library"),
        ("finetune.py --from {good} --dataset {text} --chat", "--chat is for prompts and responses"),
        ("finetune.py --from {good} --dataset {text} --model udm", "must be one of cadd, mdlm"),
        ("sample.py --ckpt {other}", "the tokenizer has 300 tokens, the model 11"),
    ],
)
def test_bad_input_is_one_sentence(command, message, call, text, tmp_path):
    """Check exit code 2 and exactly one line of error that names the mistake. Progress lines do not count."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "index.json").write_text('{"parts": []}')
    files = {
        "text": text,
        "empty": tmp_path / "empty.txt",
        "tokens": tmp_path / "tokens",
        "good": tmp_path / "good.pt",
        "other": tmp_path / "other.pt",
    }
    for name, vocab_size in (("good", 300), ("other", 11)):
        save_untrained(files[name], ModelConfig(vocab_size, 8, PRESETS["nano"]), gpt2(300).spec())
    code, _, err = call(command.format(**files, tiny=TINY))
    shown = [line for line in err.split("\r")[-1].splitlines() if "step/s" not in line and "s/step" not in line]
    assert code == 2 and len(shown) == 1 and message in shown[0]


@pytest.mark.parametrize("arguments", ["--steps x", "--unknown 1", "--dtype int7"])
def test_unparsable_arguments_exit_with_2(arguments, call):
    code, _, err = call(f"sample.py {arguments}")
    assert code == 2 and "error:" in err


def test_an_error_within_a_loop_stands_on_a_line_of_its_own():
    """Check that the bar of a loop that an error leaves is ended before the sentence is printed."""
    code = (
        "from tqdm import tqdm\nfrom cadd_min.utils.cli import run\nfrom cadd_min.utils.errors import InputError\n"
        "def fail(n):\n    raise InputError('a sentence')\n"
        "def main():\n    [fail(n) for n in tqdm(range(2), leave=False)]\nrun(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: a sentence"
