"""Check that a corpus in parts makes the same files on any number of cores, after a kill, a stop or damage.

Memory must not grow with the size of the text.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from cadd_min.data import documents, shards
from cadd_min.data import token_folder as data
from cadd_min.data.batches import TextBatches
from cadd_min.data.token_folder import TokenFolder
from cadd_min.utils.errors import InputError
from tests.data.test_token_folder import content, read, texts, words_of
from tests.toys import ROOT


def many_parts(folder: Path, kind: str, size: int) -> Path:
    """Write 200 documents to files of a kind, some with newlines and marks in odd places. Returns their folder."""
    folder.mkdir()
    docs = [f"{i} {words_of(i, 5 + i % 40)}" + " é\n\nend" * (i % 3) for i in range(200)]
    if kind == "txt":
        (folder / "a.txt").write_text("<|endoftext|>\n\n".join(docs[:150]), encoding="utf-8")
        (folder / "b.txt").write_text("\n<|endoftext|>".join(docs[150:]) + "<|endoftext|>", encoding="utf-8")
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": d}, ensure_ascii=False) for d in docs))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": docs}), folder / "a.parquet", row_group_size=7)
    else:
        for i, doc in enumerate(docs):
            (folder / f"{i:03}.txt").write_text(doc, encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "small files"])
def test_several_parts_hold_the_same_documents_as_one(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_cores", lambda: 1)
    path = many_parts(tmp_path / "docs", kind, 200)
    one = read(path, tmp_path / "one")
    monkeypatch.setattr(documents, "PART", 2000)
    monkeypatch.setattr(documents, "PIECE", 64)  # so that marks fall on the borders of blocks
    several = read(path, tmp_path / "several")
    assert len(one.header["parts"]) == 1 and 8 < len(several.header["parts"]) < 60
    first, second = (sorted(texts(t.split("train")) + texts(t.split("val"))) for t in (one, several))
    assert len(first) == 200 and first == second
    assert len(several.split("val")) > 0


def test_slices_across_parts_are_those_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_cores", lambda: 1)
    monkeypatch.setattr(documents, "PART", 2000)
    monkeypatch.setattr(data, "OPEN", 2)
    tokens = read(many_parts(tmp_path / "docs", "txt", 200), tmp_path)
    files = [np.fromfile(tokens.path / part["file"], "<u2") for part in tokens.header["parts"]]
    counts = [part["train"] for part in tokens.header["parts"]]
    for split, parts in [
        ("train", [file[:n] for file, n in zip(files, counts)]),
        ("val", [file[n:] for file, n in zip(files, counts)]),
    ]:
        whole, view = np.concatenate(parts), tokens.split(split)
        assert len(view) == len(whole) and np.array_equal(view[:], whole)
        rng = np.random.default_rng(0)
        for start, end in rng.integers(-len(whole), len(whole) + 9, (300, 2)).tolist():
            assert np.array_equal(view[start:end], whole[start:end])
    assert len(tokens._open) == 2
    with pytest.raises(ValueError, match="step"):
        tokens.split("train")[::2]


def test_damage_is_found_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, "_cores", lambda: 1)
    monkeypatch.setattr(documents, "PART", 2000)
    path = many_parts(tmp_path / "docs", "txt", 200)
    tokens = read(path, tmp_path)
    good = content(tokens)
    tokens.verify()
    batches = TextBatches(tokens.split("train"), 8, 4)
    batches(0)
    damaged = bytearray(good["00003.bin"])
    damaged[100] ^= 1
    (tokens.path / "00003.bin").write_bytes(damaged)
    with pytest.raises(InputError, match=r"SHA-256: 00003\.bin; delete"):
        TokenFolder(tokens.path).verify()
    os.truncate(tokens.path / "00003.bin", 50)
    with pytest.raises(InputError, match=r"00003\.bin is cut short"):
        TokenFolder(tokens.path)
    with pytest.raises(InputError, match=r"00003\.bin has shrunk"):  # while a run has it open
        for i in range(batches.per_epoch):
            batches(i)
    (tokens.path / "00003.bin").unlink()
    (tokens.path / "00005.json").write_text("{")
    made = {file.name: file.stat().st_mtime_ns for file in tokens.path.glob("*.bin")}
    assert content(read(path, tmp_path)) == good  # made again, and these two alone
    again = {file.name for file in tokens.path.glob("*.bin") if made.get(file.name) != file.stat().st_mtime_ns}
    assert again == {"00003.bin", "00005.bin"}
    monkeypatch.setattr(sys, "argv", ["data", str(tokens.path)])
    data.main()
    assert "is whole" in capsys.readouterr().out


SCRIPT = """
import re, resource, sys
from pathlib import Path
from cadd_min.data import corpus, documents, shards, token_folder as data, tokenizer
from cadd_min.utils import cli

def main():
    path, cache, part, cores = sys.argv[1:]
    documents.PART, shards._cores = int(part), lambda: int(cores)
    data.prepare(corpus.open_corpus(path, Path(cache)), tokenizer.gpt2(300), Path(cache))
    own = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]  # ru_maxrss would be pytest's
    print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)

if __name__ == "__main__":
    cli.run(main)
"""


def start(folder: Path, *arguments: object) -> subprocess.Popen:
    """Start a process that prepares a corpus and can be killed. arguments: path, cache, bytes in a part, cores."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a process started by a shell in the background would ignore SIGINT
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=listen, **pipes)


def long_text(path: Path, megabytes: float, mark: str = "\n<|endoftext|>\n") -> Path:
    """Write a text of about so many megabytes, with `mark` after every 1,000 words."""
    block = mark.join(words_of(i, 1000) for i in range(180)) + mark  # 1 MB
    path.write_text("".join(f"{i} {block}" for i in range(int(megabytes))))
    return path


@pytest.mark.slow
def test_killed_stopped_and_started_twice_at_once_it_makes_the_files_of_one_run(tmp_path, monkeypatch):
    """Kill a run, interrupt the next, start two at once: finished parts are kept, and the files are as undisturbed."""
    path, cache = long_text(tmp_path / "long.txt", 30), tmp_path / "cache"
    arguments = (path, cache, 1 << 20, 2)
    kept: dict[str, int] = {}
    for sent, code in [(signal.SIGKILL, -9), (signal.SIGINT, 130)]:
        process = start(tmp_path, *arguments)
        while len(list(cache.glob("*/0*.json"))) <= len(kept):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(sent)
        _, err = process.communicate(timeout=300)  # waits for the workers too: they hold the same pipe
        assert process.returncode == code, err
        finished = {file.with_suffix(".bin") for file in cache.glob("*/0*.json")}
        kept = {file.name: file.stat().st_mtime_ns for file in finished}
        assert kept and not list(cache.glob("*/index.json"))
    assert not list(cache.glob("*/*.tmp"))  # the second run removed the first run's leftovers and its own
    both = [start(tmp_path, *arguments) for _ in range(2)]  # one waits for the other
    assert all(process.wait(timeout=300) == 0 for process in both)
    (folder,) = cache.iterdir()
    assert {name: time for name, time in kept.items() if (folder / name).stat().st_mtime_ns != time} == {}
    monkeypatch.setattr(documents, "PART", 1 << 20)
    monkeypatch.setattr(shards, "_cores", lambda: 1)
    assert content(TokenFolder(folder)) == content(read(path, tmp_path / "undisturbed"))


def test_processes_make_what_one_makes_and_say_what_is_wrong(tmp_path, monkeypatch):
    folder, cores = tmp_path / "docs", 2
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_bytes(("café " * 1000).encode("latin-1" if name == "b" else "utf-8"))
    monkeypatch.setattr(documents, "PART", 4000)
    monkeypatch.setattr(shards, "_cores", lambda: cores)
    with pytest.raises(InputError, match=r"b\.txt is not UTF-8 text \(byte 3 is 0xe9\)"):
        read(folder, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*/*.tmp")) and not list(tmp_path.glob("cache/*/index.json"))
    (folder / "b.txt").write_text(words_of(0, 1000))
    made = content(read(folder, tmp_path / "cache"))
    cores = 1
    assert len(made) == 8 and content(read(folder, tmp_path / "serial")) == made


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parts", "one document", "one row group"])
def test_memory_is_the_same_for_five_times_the_text(kind, tmp_path):
    """Check that 40 MB of text take at most 30 MB more than 8 MB of text, and at most 200 MB more than the imports."""
    imports = "import resource, pyarrow, cadd_min.data.token_folder; print(resource.getrusage(0).ru_maxrss)"
    alone = subprocess.run([sys.executable, "-c", imports], cwd=ROOT, capture_output=True, text=True, check=True)
    peaks = []
    for size in (8, 40):
        path = long_text(tmp_path / f"{size}.txt", size, " " if kind == "one document" else "<|endoftext|>")
        if kind == "one row group":
            docs = path.read_text().split("<|endoftext|>")
            path = path.with_suffix(".parquet")
            pyarrow.parquet.write_table(pyarrow.table({"text": docs}), path, row_group_size=len(docs))
        process = start(tmp_path, path, tmp_path / "cache", 1 << 21 if kind == "parts" else 1 << 30, 2)
        out, err = process.communicate()
        assert process.returncode == 0, err
        peaks.append(max(map(int, out.split())) / 1000)
    assert peaks[1] < peaks[0] + 30 and peaks[1] < int(alone.stdout) / 1000 + 200, (peaks, alone.stdout)
