"""Every script with hostile and half-sensible arguments: it works, or it ends with one sentence and exit code 2.

A traceback, a hang or a harmed file is a failure. The arguments come from the scripts' own parsers. FUZZ=10 takes ten
times as many cases, new in every run. FOUND holds the arguments that failed once.
"""

from __future__ import annotations

import argparse
import re
import shlex
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadd_min.utils.cli import integer
from tests.scripts.fuzzing import BASE, faults, many, options, run

LONG = ("steps", "num", "num_latents", "repeat", "accumulate")  # with a large number these may rightly run for ever
SLOW = ("compile", "execute")  # compiling takes a minute; test_sandbox.py tests the execution of programs

WHOLE = st.one_of(
    st.integers(-2, 20).map(str),
    st.sampled_from([10**9, 10**12, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30)]).map(str),
    st.just("9" * 5000),  # int() refuses it
)
FEW = st.one_of(st.integers(-2, 3), st.sampled_from([10**30, -(2**63)])).map(str)
REAL = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e-30, 1e30, 1e308, float("nan"), float("inf"), -float("inf")]),
)
JUNK = st.one_of(
    st.sampled_from(["", " ", "-", "--", "nan", "1e3", "0x10", "1_0", "٣", "None", ".", "..", "~", "*", "\udcff"]),
    st.sampled_from(
        ["x" * 300, "a/" * 3000, "💥" * 80, "[", "[3]", "[-1]", "[99999999999999999999]", "%s", "{0}", "\n"]
    ),
    st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), max_size=12),
)
FILES = [
    "text.txt", "empty.txt", "lines.jsonl", "table.parquet", "images.npz", "photos", "image.png", "mask.png", "text.pt",
    "ar.pt", "mdlm.pt", "image.pt", "exported", "mdlm.safetensors", "theirs.pt", "tokens", "tokens/index.json",
    "tokens/00000.bin", "runs", "runs/text", "runs/image", "runs/text/checkpoint.pt", "missing", "missing/deeper",
    "text.txt/below", "new", "new.png", "new.gif", "new.html", "image.png/below.png", "photos/x.png", "hf:",
    "hf:no/such", "hf:a/b/c", "masked", "causal", "masked/config.json", "pairs.jsonl", "runs/tuned",
]  # fmt: skip
PATHS = st.one_of(st.sampled_from(FILES), st.sampled_from(FILES), JUNK)


def one_value(action: argparse.Action) -> st.SearchStrategy[str]:
    """Make a half-sensible or hostile value of an option, from its type, its choices and the words of its help."""
    if action.type in (int, integer):
        return st.one_of(FEW if action.dest in LONG else WHOLE, JUNK)
    if action.type is float:
        return st.one_of(REAL.map(str), REAL.map(str), JUNK)
    words = {str(choice) for choice in action.choices or re.findall(r"[\w-]+", action.help or "")}
    return st.one_of(st.sampled_from(sorted(words - {"sotu"}) or FILES), PATHS)  # sotu takes a while to tokenise


def argument(action: argparse.Action) -> st.SearchStrategy[list[str]]:
    """Make the words of an argument on the command line, with the option's name if it has one."""
    value = one_value(action)
    if not action.option_strings:
        return value.map(lambda word: [word])
    name = st.sampled_from(action.option_strings)
    if action.nargs == 0:
        return name.map(lambda name: [name])
    if action.nargs in ("+", "*"):
        return st.tuples(name, st.lists(value, max_size=3)).map(lambda pair: [pair[0], *pair[1]])
    return st.tuples(name, value).map(lambda pair: [f"{pair[0]}={pair[1]}"])


@st.composite
def command(draw: st.DrawFn, script: str, actions: list[argparse.Action]) -> list[str]:
    """Make the arguments of a valid call of a script, and add up to four that it may not expect."""
    base = draw(st.sampled_from(STARTS[script])).split()
    if script.startswith(("cadd_min", "export.py")):  # a training without its options takes minutes
        base = base[: draw(st.integers(0, len(base)))]
    chosen = draw(st.lists(st.sampled_from([a for a in actions if a.dest not in SLOW]), min_size=1, max_size=4))
    extra = [word for action in chosen for word in draw(argument(action))]
    return [*base, *extra]


STARTS = {
    **{script: [base] for script, base in BASE.items()},
    "train_text.py": [
        BASE["train_text.py"],
        BASE["train_text.py"].replace("new", "runs/text") + " --resume",
        BASE["train_text.py"] + " --model ar",
        BASE["train_text.py"] + " --model udm",
        BASE["train_text.py"] + " --model sedd",
        BASE["train_text.py"] + " --model cdm",
        BASE["train_text.py"].replace("text.txt", "tokens"),
    ],
    "train_image.py": [
        BASE["train_image.py"],
        BASE["train_image.py"] + " --classes",
        BASE["train_image.py"].replace("new", "runs/image") + " --resume",
        BASE["train_image.py"].replace("images.npz", "photos"),
    ],
    "sample.py": [
        *(f"--ckpt {ckpt} --steps 2" for ckpt in ("text.pt", "image.pt", "ar.pt", "mdlm.pt", "exported", "runs/tuned")),
        "--from masked --length 8 --steps 2 --prompt a --chat",
        "--from causal --mask-token x --length 8 --steps 2",
    ],
    "evaluate.py bound": [
        BASE["evaluate.py bound"],
        "--ckpt image.pt --cache cache --num 2 --repeat 1",
    ],
    "evaluate.py infill": [
        BASE["evaluate.py infill"],
        "--ckpt text.pt runs/tuned --dataset text.txt --cache cache --num 2 --steps 2",
    ],
    "evaluate.py samples": [
        "--ckpt text.pt exported --dataset text.txt --cache cache --num 2 --steps 2 --judge missing",
    ],
    "evaluate.py frontier": [
        "--ckpt text.pt --dataset text.txt --cache cache --num 2 --steps 2 --judge missing",
    ],
    "finetune.py": [
        BASE["finetune.py"],
        BASE["finetune.py"].replace("masked", "causal") + " --mask-token x --lora 1",
        BASE["finetune.py"].replace("text.txt", "pairs.jsonl") + " --chat --checkpointing",
        BASE["finetune.py"].replace("masked", "mdlm.pt"),
        BASE["finetune.py"].replace("new", "runs/tuned") + " --resume",
    ],
    "evaluate.py code": [
        BASE["evaluate.py code"],
        "--benchmark humaneval --problems human.jsonl --ckpt runs/tuned --steps 2 --out new",
        "--benchmark mbpp --problems human.jsonl --ckpt text.pt --steps 2",
    ],
    "export.py folder": ["text.pt new", "image.pt new", "runs new", "runs/tuned new"],
    "export.py from-mdlm": ["mdlm.safetensors new", "theirs.pt new"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", STARTS)
def test_arguments(script, world):
    @many(70)
    @given(command(script, options(script)))
    def check(arguments: list[str]) -> None:
        assert world.check(script, *arguments) == []

    check()


LONG_NAME = "x" * 300
FOUND = {
    "train_text.py": ["--evidence=1e30", "--latent-norm=1e308", "--latent-dim=1000000000000", f"--seed={2**64}",
                      f"--accumulate={10**30}", f"--dataset={LONG_NAME}", "--out=odd\udcff", "--lr=--", "--clip=--"],
    "sample.py": [f"--ckpt={LONG_NAME}", f"--num={10**12}", f"--num={2**63 - 1}", f"--num={10**30}",
                  f"--steps={10**12}", f"--steps={10**30}", f"--num-latents={10**12}", f"--block={10**30}",
                  "--strength=--", "--ckpt='\n'",
                  f"--ckpt=image.pt --num={10**12}", "--ckpt=image.pt --guidance=1e308",
                  f"--ckpt=image.pt --out={LONG_NAME}.png"],
    "evaluate.py infill": ["--num=--"],
    "evaluate.py bound": ["--seed=-1", f"--T={10**30}", f"--dataset={LONG_NAME}", f"--cache={LONG_NAME}"],
    "export.py folder": [f"text.pt {LONG_NAME}", f"{LONG_NAME} new", "missing\x1e\x85 new"],
    "export.py from-mdlm": [f"mdlm.safetensors new --length {10**12}", f"{LONG_NAME} new"],
    "cadd_min/data/token_folder.py": [LONG_NAME, "'\n'"],
}  # fmt: skip


@pytest.mark.parametrize("script", FOUND)
def test_arguments_that_failed_once(script, world):
    for arguments in FOUND[script]:
        base = [] if script.startswith("cadd_min") else STARTS[script][0].split()
        assert world.check(script, *base, *shlex.split(arguments)) == [], arguments


def test_the_harness_notices_what_it_is_for(world):
    """Power: catch commands that raise, hang, harm a file, leave half a file, or end without a sentence.

    A command that does nothing must pass.
    """

    def wrong(main, seconds: float = 60) -> str:
        with world.case() as folder:
            return "\n".join(faults(run(main, seconds), world.before, folder, lambda path: False))

    def harm() -> None:
        Path("text.pt").unlink()
        Path("text.txt").write_text("other")
        Path("new.7.tmp").touch()

    assert "ZeroDivisionError" in wrong(lambda: 1 // 0)
    assert "not finished" in wrong(lambda: time.sleep(600), seconds=0.2)
    assert {"harmed: text.pt", "harmed: text.txt", "left behind: new.7.tmp"} == set(wrong(harm).split("\n"))
    assert "exit code 1" in wrong(lambda: exit(1)) and "without a sentence" in wrong(lambda: exit(2))
    assert wrong(lambda: None) == ""
