"""How a corpus becomes a folder of token files: one for each part, made on all cores, in as many attempts as it takes.

    00000.bin      the part's training tokens, then its held-out tokens: uint16 or uint32, little endian, no header
    00000.json     written after the .bin: counts, the .bin's SHA-256, and what the part was made from
    index.json     written last: the tokenizer's spec, all parts, and where each split begins and ends

A part is finished when its .json is there and matches its .bin. A finished part is never made again. Every document
ends with EOT. A document's own content decides whether it is held out, see split.py: one document of 20. Where these
are under 2% or over 20% of the tokens, the last 5% of the tokens are held out instead. A corpus with the folders train
and test is split by its folders.
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
from cadd_min.data.split import ONE_IN, held_out, unlike
from cadd_min.data.tokenizer import Tokenizer
from cadd_min.utils.errors import InputError, Interrupted
from cadd_min.utils.files import atomic_write, digest, remove_leftovers, write_json

INDEX = "index.json"
LAYOUT = "split by content"  # of the files: older files in a cache are made again


class Job(NamedTuple):
    """A part that is to be tokenised into `path`, a .bin file.

    source: a hash of the corpus's identity, the tokenizer's fingerprint and the part's spans.
    """

    path: Path
    part: Part
    source: str

    @property
    def size(self) -> int:
        """Return the length of the part's text in bytes."""
        return sum(span.size for span in self.part)

    def entry(self) -> dict[str, Any] | None:
        """Return the content of the part's .json, or None where the part is not finished."""
        try:
            entry = json.loads(self.path.with_suffix(".json").read_bytes())
            check_part(entry)
            complete = self.path.stat().st_size == entry["bytes"] and self.path.name == entry["file"]
            return entry if complete and entry["source"] == self.source else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None


def check_part(entry: dict[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError where `entry` is not the content of a part's .json.

    Its file must be a name without a folder. Its counts of tokens must fit its bytes, at 2 or 4 bytes a token.
    """
    sizes = [entry["train"], entry["val"], entry["bytes"]]
    if not (type(entry["file"]) is type(entry["sha256"]) is str and Path(entry["file"]).name == entry["file"]):
        raise ValueError
    if not all(type(n) is int and n >= 0 for n in sizes) or sizes[2] not in (2 * sum(sizes[:2]), 4 * sum(sizes[:2])):
        raise ValueError


def write_folder(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenise the parts of a corpus that are not finished in `folder`, then write its index.

    The caller must keep other processes from writing to `folder`. Raises InputError where the corpus cannot be read or
    a worker is killed, OSError where the folder cannot be written to.
    """
    remove_leftovers(folder)
    fingerprint = tokenizer.fingerprint()
    jobs = []
    for number, part in enumerate(corpus.parts()):
        source = hashlib.sha256(f"{LAYOUT}|{corpus.identity}|{fingerprint}|{[*part]}".encode()).hexdigest()
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
    """Tokenise one part. Write its .bin, then its .json, each whole or not at all.

    tick(bytes): called with the bytes of text since the last call. An exception from it ends the work.
    """
    dtype = token_type(tokenizer)
    with atomic_write(job.path) as unfinished:
        with unfinished.open("wb") as train, tempfile.TemporaryFile(dir=unfinished.parent) as val:
            documents, empty = _tokenise(job.part, tokenizer, dtype, (train, val), threads, tick)
            counts = [file.tell() // dtype.itemsize for file in (train, val)]
            val.seek(0)
            shutil.copyfileobj(val, train, 1 << 20)
        entry = {
            "file": job.path.name,
            "source": job.source,
            "documents": documents,
            "empty": empty,
            "train": counts[0],
            "val": counts[1],
            "bytes": unfinished.stat().st_size,
            "sha256": digest(unfinished),
        }
    write_json(job.path.with_suffix(".json"), entry)


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """Return uint16 where it holds all ids and the mask, else uint32. Both are little endian.

    The mask is the last id of this project's tokenizers, and any id of a pretrained model's.
    """
    return np.dtype("<u2" if max(tokenizer.mask_id, tokenizer.vocab_size - 1) < 2**16 else "<u4")


def _tokenise(
    part: Part,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    files: tuple[BinaryIO, BinaryIO],
    threads: int,
    tick: Callable[[int], object],
) -> tuple[int, int]:
    """Write the tokens of a part to its two files, training and held out. Empty documents are left out.

    Returns the number of documents that were written, and of those that are empty.
    """
    document, empty = 0, 0
    begun = side = False  # whether a document has begun and not ended, and whether it is held out
    for pieces in _batched(read(part), threads << 20):
        for piece, ids in zip(pieces, tokenizer.encode_batch([p.text for p in pieces], threads)):
            if piece.last and not begun and not piece.text:
                empty += 1
                continue
            ids = [*ids, tokenizer.eot_id] if piece.last else ids
            if not begun:  # the first megabyte of a document decides
                side = held_out(piece.text) if piece.held_out is None else piece.held_out
            files[side].write(np.asarray(ids, dtype).tobytes())
            document, begun = document + piece.last, not piece.last
        tick(sum(len(piece.text.encode()) for piece in pieces))
    return document, empty


def _batched(pieces: Iterator[Piece], size: int) -> Iterator[list[Piece]]:
    """Gather pieces into lists of about `size` characters: enough for every thread, and little in memory."""
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
    """Write index.json for the parts with these entries."""
    index = {
        "corpus": corpus.identity,
        "dtype": token_type(tokenizer).name,
        "splits": _splits(corpus, sum(e["train"] for e in entries), sum(e["val"] for e in entries)),
        "parts": entries,
        "tokenizer": tokenizer.spec(),
    }
    write_json(folder / INDEX, index)


def _splits(corpus: Corpus, train: int, val: int) -> dict[str, tuple[int, int]]:
    """Return [start, end) of each split.

    The order of tokens is the training tokens of all parts, then the held-out tokens of all parts.
    """
    count = train + val
    if corpus.shares is not None:
        ends = [round(share * count) for share in np.cumsum(corpus.shares)]
        return dict(zip(("train", "val", "test"), zip([0, *ends], ends)))
    if unlike(val, count) and not corpus.by_folder:
        train = count - count // ONE_IN
    return {"train": (0, train), "val": (train, count)}


def _cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_pool(jobs: list[Job], spec: dict[str, Any], workers: int, done: Callable[[int], object]) -> None:
    """Tokenise parts in worker processes. done(bytes): called with the size of each part that is finished.

    On any error or interrupt the workers stop at once. Finished parts are kept.
    """
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
    """Prepare a worker process: its tokenizer, and the two ways in which it stops early."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and the parent sets `stop`
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker["tokenizer"], _worker["stop"] = tokenizer_from_spec(spec), stop


_worker: dict[str, Any] = {}  # in a worker process: its tokenizer, and the event that stops it


def _end_with_parent() -> None:
    """Wait for the parent's end, then end this worker."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the parent was killed: nothing waits for this part


def _work(job: Job) -> None:
    """Tokenise a part in a worker process, until `stop` is set."""

    def tick(_: int) -> None:
        if _worker["stop"].is_set():
            raise Interrupted

    write_part(job, _worker["tokenizer"], 1, tick)
