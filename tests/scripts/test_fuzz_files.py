"""Commands that read a file with damaged bytes or damaged content: they work, or end with one sentence and exit code 2.

A traceback, a hang or harm to another file is a failure. A checkpoint with damaged content gets a new checksum, which
would otherwise catch the damage first. FUZZ=10 takes ten times as many cases, new in every run. FOUND_CONTENT and
FOUND_BYTES hold the damage that failed once.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cadd_min.checkpoints import file as checkpoint
from cadd_min.utils.errors import InputError
from tests.scripts.fuzzing import BASE, IMAGE, RUN, TEXT, World, contents, many

RESUME_TEXT = f"train_text.py {TEXT} {RUN} --out runs/text --resume --steps 4"
RESUME_IMAGE = f"train_image.py {IMAGE} {RUN} --out runs/image --resume --steps 4"
TRAIN = f"train_text.py {BASE['train_text.py']}"
TRAIN_TOKENS, TRAIN_LINES, TRAIN_TABLE = (
    TRAIN.replace("text.txt", n) for n in ("tokens", "lines.jsonl", "table.parquet")
)
TRAIN_IMAGES = f"train_image.py {BASE['train_image.py']}"
BOUND = f"evaluate.py bound {BASE['evaluate.py bound']}"
READERS = {  # a file, and the commands that read it
    "text.pt": ["sample.py --ckpt text.pt --steps 2", "export.py folder text.pt new", BOUND],
    "image.pt": ["sample.py --ckpt image.pt --steps 2 --num 2", "evaluate.py bound --ckpt image.pt --num 2 --repeat 1"],
    "mdlm.pt": ["export.py to-mdlm mdlm.pt new.safetensors --time 0.5"],
    "ar.pt": ["sample.py --ckpt ar.pt --steps 2"],
    "runs/text/checkpoint.pt": [RESUME_TEXT, "sample.py --ckpt runs/text --steps 2"],
    "runs/image/checkpoint.pt": [RESUME_IMAGE],
    "runs/text/checkpoint.previous.pt": ["sample.py --ckpt runs/text/checkpoint.previous.pt --steps 2"],
    "runs/text/metrics.jsonl": [RESUME_TEXT],
    "runs/text/run.json": [RESUME_TEXT],
    "tokens/index.json": [TRAIN_TOKENS, "cadd_min/data/token_folder.py tokens"],
    "tokens/00000.bin": [TRAIN_TOKENS, "cadd_min/data/token_folder.py tokens"],
    "cache/*/index.json": [TRAIN],
    "cache/*/00000.json": [TRAIN],
    "cache/*/00000.bin": [TRAIN],
    "cache/judge*": ["evaluate.py frechet --ckpt image.pt --cache cache --num 10 --steps 2"],
    "exported/config.json": ["sample.py --ckpt exported --steps 2", "export.py folder exported new"],
    "exported/codec.json": ["sample.py --ckpt exported --steps 2"],
    "exported/model.safetensors": ["sample.py --ckpt exported --steps 2"],
    "mdlm.safetensors": ["export.py from-mdlm mdlm.safetensors new"],
    "theirs.pt": ["export.py from-mdlm theirs.pt new"],
    "text.txt": [TRAIN, BOUND],
    "lines.jsonl": [TRAIN_LINES],
    "table.parquet": [TRAIN_TABLE],
    "images.npz": [f"{TRAIN_IMAGES} --classes", "evaluate.py bound --ckpt image.pt --num 2 --repeat 1"],
    "photos/a/0.png": [TRAIN_IMAGES.replace("images.npz", "photos")],
    "image.png": ["sample.py --ckpt image.pt --steps 1 --num 1 --inpaint image.png --mask mask.png"],
}  # fmt: skip
BYTES = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(b"")),
    st.tuples(st.just("overwrite"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    st.tuples(
        st.just("insert"), st.floats(0, 1), st.sampled_from([b"\0", b"\xff", b"\n", b"[" * 99999, b'{"a":' * 20000])
    ),
    st.tuples(
        st.just("be"), st.just(0.0), st.sampled_from([b"", b"\0" * 99, b"{}", b"[]", b"null", b"1", b"PK\3\4", b"\n"])
    ),
    st.tuples(st.sampled_from(["folder", "missing"]), st.just(0.0), st.just(b"")),
)
PLAIN = st.one_of(
    st.sampled_from([None, True, -1, 0, 1, 2, 3, 7, 300, 10**9, 10**12, 2**63, 10**30, -(10**30)]),
    st.sampled_from(
        [0.0, -1.0, 0.5, 1e30, 1e308, float("nan"), float("inf"), "", "x", "auto", "free", "\udcff", "1" * 999]
    ),
    st.sampled_from([[], {}, [1], [[]], [-1, -1, 16], [4, 4, 1], [0, 0], {"a": 1}, [None], ["x"], "..", "../text.txt"]),
)
TENSORS = st.sampled_from(
    [torch.tensor(v) for v in (0, -1.5, float("nan"), [], [1.0], [[1e30]], [[True]], [1j])]
    + [torch.zeros(8, 8), torch.zeros(0, 8), torch.full((300, 8), torch.nan), torch.zeros(301, 8, dtype=torch.int64)]
)  # fmt: skip
PLACES = st.lists(st.integers(0, 10**6), min_size=1, max_size=2)


def places(tree: object, at: tuple = ()) -> list[tuple]:
    """List the paths, tuples of keys, to every node below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [keys for key, below in items for keys in [(*at, key), *places(below, (*at, key))]]


def replace(tree: Any, keys: tuple, action: str, value: object) -> None:
    """Damage one node in place: "put" `value` there, "take" the node away, or "add" `value` beside it."""
    for key in keys[:-1]:
        tree = tree[key]
    if action == "put":
        tree[keys[-1]] = value
    elif action == "take":
        del tree[keys[-1]]
    elif isinstance(tree, dict):
        tree["unknown"] = value


def somewhere(number: int, action: str, value: object) -> Callable[[Any], None]:
    """Make the damage of one node, chosen by `number`.

    Two thirds of the numbers choose an outer node: most nodes are deep inside, and hardly any outer node would be hit.
    """

    def harm(tree: Any) -> None:
        nodes = places(tree)
        outer = [keys for keys in nodes if len(keys) < 3 or keys[0] == "model_config"]
        candidates = outer if number % 3 and outer else nodes
        if candidates:
            replace(tree, candidates[number // 3 % len(candidates)], action, value)

    return harm


def damage_bytes(path: Path, action: str, place: float, data: bytes) -> None:
    """Damage a file: "cut" it at a place, "overwrite" or "insert" data there, or let it "be" data, a folder or missing.

    place: from 0, the start of the file, to 1, its end.
    """
    content = path.read_bytes()
    at = int(place * len(content))
    path.unlink()
    if action == "folder":
        path.mkdir()
    elif action != "missing":
        kept = {"cut": b"", "overwrite": content[at + len(data) :], "insert": content[at:], "be": b""}[action]
        path.write_bytes((b"" if action == "be" else content[:at]) + data + kept)


def damage_content(path: Path, harm: Callable[[Any], None]) -> None:
    """Damage the content of a file, and write it in the file's own format, with a new checksum."""
    if path.suffix == ".json":
        tree: Any = json.loads(path.read_text())
        harm(tree)
        path.write_text(json.dumps(tree))
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        harm(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".npz":
        tree = dict(np.load(path))
        harm(tree)
        np.savez(path, **{name: np.asarray(value) for name, value in tree.items()})
    elif path.suffix == ".safetensors":
        tree = load_file(path)
        harm(tree)
        save_file({name: torch.as_tensor(value) for name, value in tree.items()}, path)
    else:
        tree = torch.load(path, weights_only=True)
        written = tree.pop("format", None), tree.pop("version", None)
        harm(tree)
        path.unlink()
        checkpoint.save(path, tree) if written[0] else torch.save(tree, path)


def damaged(world: World, name: str, number: int, harm: Callable[[Path], None]) -> list[str]:
    """List what is wrong with the number-th command that reads a file, after harm(path)."""
    with world.case() as folder:
        (path,) = folder.glob(name)
        harm(path)
        script, *arguments = shlex.split(READERS[name][number % len(READERS[name])])
        return world.check_in(folder, contents(folder), script, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes(name, world):
    @many(20)
    @given(st.integers(0, 9), BYTES)
    def check(number: int, harm: tuple[str, float, bytes]) -> None:
        assert damaged(world, name, number, lambda path: damage_bytes(path, *harm)) == []

    check()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in READERS if n.endswith((".pt", ".json", ".jsonl", ".npz", ".safetensors", "judge*"))]
)
def test_damaged_content(name, world):
    values = PLAIN if name.endswith((".json", ".jsonl")) else st.one_of(PLAIN, TENSORS)

    @many(32)
    @given(st.integers(0, 9), PLACES, st.sampled_from(["put", "put", "put", "take", "add"]), values)
    def check(number: int, nodes: list[int], action: str, value: object) -> None:
        def harm(path: Path) -> None:
            try:
                for node in nodes:
                    damage_content(path, somewhere(node, action, value))
            except (TypeError, ValueError, RuntimeError, InputError):  # the format cannot hold the damage
                assume(False)

        assert damaged(world, name, number, harm) == []

    check()


TEXTS, RUNS, IMAGES_PT, INDEX = "text.pt", "runs/text/checkpoint.pt", "image.pt", "tokens/index.json"
FOUND_CONTENT = [  # file, keys of the node, value that was put there
    (TEXTS, ("settings",), []),
    (TEXTS, ("settings", "dtype"), "float16"),
    (TEXTS, ("settings", "dtype"), []),
    (TEXTS, ("trainer", "step"), []),
    (TEXTS, ("model_config", "size", "layers"), 10**9),
    (TEXTS, ("model_config", "size", "width"), 0),
    (TEXTS, ("model_config", "size", "heads"), 0),
    (TEXTS, ("model_config", "size", "cond"), -1),
    (TEXTS, ("model_config", "length"), 10**12),
    (TEXTS, ("model_config", "vocab_size"), 10**30),
    (TEXTS, ("model_config", "evidence"), 1e30),
    (TEXTS, ("model_config", "classes"), -1),
    (TEXTS, ("tokenizer", "tokens"), "QQ== QQ=="),
    (TEXTS, ("tokenizer",), {"kind": "chars", "alphabet": "aa" * 150}),
    (RUNS, ("settings",), []),
    (RUNS, ("settings", "lr"), [1]),
    (RUNS, ("settings", "lr"), None),
    (RUNS, ("settings", "mse"), 10**30),
    (RUNS, ("trainer", "step"), "x"),
    (RUNS, ("trainer", "seen"), -9),
    (RUNS, ("trainer", "skipped"), None),
    (RUNS, ("trainer", "optimizer"), []),
    (RUNS, ("trainer", "optimizer", "state", 0), {}),
    (RUNS, ("trainer", "optimizer", "state", 0, "exp_avg"), torch.zeros(3)),  # the fused AdamW wrote beyond its end
    (IMAGES_PT, ("model_config", "image"), None),
    (IMAGES_PT, ("model_config", "size", "mults"), []),
    (IMAGES_PT, ("model_config", "size", "blocks"), 10**9),
    (IMAGES_PT, ("tokenizer", "shape"), [4, 4]),
    (INDEX, ("dtype",), "object"),
    (INDEX, ("splits", "val"), [0, 10**9]),
    (INDEX, ("splits", "x"), [1]),
    (INDEX, ("tokenizer",), 5),
    (INDEX, ("tokenizer", "tokens"), "QQ=="),
    (INDEX, ("parts", 0, "val"), -5),
    (INDEX, ("parts", 0, "bytes"), None),
    ("exported/config.json", ("settings", "dtype"), []),
    ("exported/codec.json", ("tokens",), 5),
    ("runs/text/metrics.jsonl", (0,), []),
    ("runs/text/metrics.jsonl", (0, "step"), "x"),
    ("runs/text/run.json", ("starts",), 5),
]
DEEP = b"[" * 99999
FOUND_BYTES = [  # file, its bytes
    (INDEX, DEEP),
    ("cache/*/index.json", DEEP),
    ("exported/config.json", DEEP),
    ("runs/text/metrics.jsonl", DEEP),
    ("runs/text/metrics.jsonl", b"\xff"),
    ("runs/text/metrics.jsonl", b"{}\n"),
    ("runs/text/run.json", DEEP),
    ("lines.jsonl", b'{"text": ' + DEEP),
    ("lines.jsonl", b'{"text": ' + b"9" * 9999 + b"}"),
    ("lines.jsonl", b'{"text": "\\ud800 a"}\n' * 99),
]


@pytest.mark.parametrize("name, keys, value", FOUND_CONTENT, ids=lambda part: str(part)[:40])
def test_content_that_failed_once(name, keys, value, world):
    for number in range(len(READERS[name])):
        harm = lambda path: damage_content(path, lambda tree: replace(tree, keys, "put", value))
        assert damaged(world, name, number, harm) == []


@pytest.mark.parametrize("name, content", FOUND_BYTES, ids=lambda part: str(part)[:40])
def test_bytes_that_failed_once(name, content, world):
    assert damaged(world, name, 0, lambda path: damage_bytes(path, "be", 0.0, content)) == []


@pytest.mark.parametrize("harm", ["folder", "tokens"])
def test_files_that_failed_once(harm, world):
    """Check a folder in the place of run.json, which left a half-written file, and tokens beyond the vocabulary.

    Such tokens once went on into the kernels.
    """
    if harm == "folder":
        assert damaged(world, "runs/text/run.json", 0, lambda path: damage_bytes(path, "folder", 0.0, b"")) == []
    else:
        harm = lambda path: path.write_bytes(b"\xff" * path.stat().st_size)
        assert damaged(world, "tokens/00000.bin", 0, harm) == []
