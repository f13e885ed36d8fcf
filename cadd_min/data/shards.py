"""A corpus becomes a folder of token files, one for each of its parts, on all cores and over any number of attempts.

    00000.bin      the part's training tokens, then its held-out ones: uint16 or uint32, little endian, nothing else
    00000.json     beside it, written after it: counts, its SHA-256, and what it was made from
    index.json     last: the tokenizer in full, all parts, and where each split begins and ends

A part is finished when its .json is there and fits; finished parts are never made again. Every document ends with EOT.
Every 20th document of a part is held out; of a corpus without any such, the last 5% of its tokens.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from cadd_min.data.codec import tokenizer_from_spec
from cadd_min.data.corpus import Corpus, Part, read
from cadd_min.data.documents import Piece
from cadd_min.data.tokenizer import Tokenizer
from cadd_min.utils.errors import InputError, Interrupted
from cadd_min.utils.files import atomic_write, digest, remove_leftovers, write_json

INDEX = "index.json"
HELD_OUT = 20  # one document in this many


class Job(NamedTuple):
    """One part to be tokenised into `path`, a .bin file; source: known by the text's and the tokenizer's identity."""

    path: Path
    part: Part
    source: str

    @property
    def size(self) -> int:
        return sum(span.size for span in self.part)

    def entry(self) -> dict[str, Any] | None:
        """What its .json says, if the part is finished."""
        try:
            entry = json.loads(self.path.with_suffix(".json").read_bytes())
            check_part(entry)
            whole = self.path.stat().st_size == entry["bytes"] and self.path.name == entry["file"]
            return entry if whole and entry["source"] == self.source else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None


def check_part(entry: dict[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError unless it is as a part's .json is: a file beside it, counts that fit."""
    sizes = [entry["train"], entry["val"], entry["bytes"]]
    if not (type(entry["file"]) is type(entry["sha256"]) is str and Path(entry["file"]).name == entry["file"]):
        raise ValueError
    if not all(type(n) is int and n >= 0 for n in sizes) or sizes[2] not in (2 * sum(sizes[:2]), 4 * sum(sizes[:2])):
        raise ValueError


def write_folder(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenise what of a corpus is not yet in `folder`, by one process at a time. Raises InputError, OSError."""
    remove_leftovers(folder)
    made = tokenizer.fingerprint()
    jobs = []
    for number, part in enumerate(corpus.parts()):
        source = hashlib.sha256(f"{corpus.identity}|{made}|{[*part]}".encode()).hexdigest()
        jobs.append(Job(folder / f"{number:05}.bin", part, source))
    todo = [job for job in jobs if job.entry() is None]
    total = sum(job.size for job in jobs)
    with tqdm(
        desc=f"tokenising {corpus.name}",
        total=total,
        initial=total - sum(job.size for job in todo),
        unit="B",
        unit_scale=True,
        leave=False,
    ) as bar:
        workers = min(len(todo), _cores())
        if workers > 1:
            _in_pool(todo, tokenizer.spec(), workers, bar.update)
        else:
            for job in todo:
                write_part(job, tokenizer, _cores(), bar.update)
    _write_index(corpus, tokenizer, folder, [json.loads(job.path.with_suffix(".json").read_bytes()) for job in jobs])


def write_part(job: Job, tokenizer: Tokenizer, threads: int, tick: Callable[[int], object]) -> None:
    """Tokenise one part; tick(bytes) as it goes, from which an exception ends it. The .bin and .json are whole or not
    there."""
    dtype = token_type(tokenizer)
    with atomic_write(job.path) as part:
        with part.open("wb") as train, tempfile.TemporaryFile(dir=part.parent) as held_out:
            documents = _tokenise(job.part, tokenizer, dtype, (train, held_out), threads, tick)
            counts = [file.tell() // dtype.itemsize for file in (train, held_out)]
            held_out.seek(0)
            shutil.copyfileobj(held_out, train, 1 << 20)
        entry = {
            "file": job.path.name,
            "source": job.source,
            "documents": documents,
            "train": counts[0],
            "val": counts[1],
            "bytes": part.stat().st_size,
            "sha256": digest(part),
        }
    write_json(job.path.with_suffix(".json"), entry)


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """The smallest of two types that holds its ids and the mask."""
    return np.dtype("<u2" if tokenizer.mask_id < 2**16 else "<u4")


def _tokenise(
    part: Part,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    files: tuple[BinaryIO, BinaryIO],
    threads: int,
    tick: Callable[[int], object],
) -> int:
    """Stream a part through the tokenizer into its two splits; the number of its documents."""
    document = 0
    for pieces in _batched(read(part), threads << 20):
        for piece, ids in zip(pieces, tokenizer.encode_batch([p.text for p in pieces], threads)):
            ids = [*ids, tokenizer.eot_id] if piece.last else ids
            held_out = document % HELD_OUT == HELD_OUT - 1
            files[held_out].write(np.asarray(ids, dtype).tobytes())
            document += piece.last
        tick(sum(len(piece.text.encode()) for piece in pieces))
    return document


def _batched(pieces: Iterator[Piece], size: int) -> Iterator[list[Piece]]:
    """Pieces in lists of about `size` characters: enough for every thread, flat in memory."""
    batch, total = [], 0
    for piece in pieces:
        batch.append(piece)
        total += len(piece.text)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _write_index(corpus: Corpus, tokenizer: Tokenizer, folder: Path, entries: list[dict[str, Any]]) -> None:
    index = {
        "corpus": corpus.identity,
        "dtype": token_type(tokenizer).name,
        "splits": _splits(corpus, sum(e["train"] for e in entries), sum(e["val"] for e in entries)),
        "parts": entries,
        "tokenizer": tokenizer.spec(),
    }
    write_json(folder / INDEX, index)


def _splits(corpus: Corpus, train: int, val: int) -> dict[str, tuple[int, int]]:
    """[start, end) of each split in the training tokens of all parts followed by the held-out tokens of all."""
    count = train + val
    if corpus.shares is not None:
        ends = [round(share * count) for share in np.cumsum(corpus.shares)]
        return dict(zip(("train", "val", "test"), zip([0, *ends], ends)))
    if val == 0:
        train = count - count // HELD_OUT
    return {"train": (0, train), "val": (train, count)}


def _cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_pool(jobs: list[Job], spec: dict[str, Any], workers: int, done: Callable[[int], object]) -> None:
    """Tokenise parts in processes of their own. Whatever ends it, they stop at once and keep what is finished."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (spec, stop)) as pool:
        try:
            futures = {pool.submit(_work, job): job for job in jobs}
            for future in as_completed(futures):
                future.result()
                done(futures[future].size)
        except BrokenProcessPool:
            raise InputError(
                "a process that tokenised was killed, perhaps for want of memory: run again, what is finished is kept"
            ) from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _start_worker(spec: dict[str, Any], stop: Event) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sets `stop`
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker["tokenizer"], _worker["stop"] = tokenizer_from_spec(spec), stop


_worker: dict[str, Any] = {}  # of a worker process: its tokenizer and the event that stops it


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the parent was killed: nobody waits for this part


def _work(job: Job) -> None:
    def tick(_: int) -> None:
        if _worker["stop"].is_set():
            raise Interrupted

    write_part(job, _worker["tokenizer"], 1, tick)
