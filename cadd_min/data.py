"""Where text comes from: a corpus by name or path becomes documents, documents become one file of tokens.

The token file is written once, beside its name, and renamed when it is whole, so a half-written one is never read:

    8 bytes "CADDTOK1" | 8 bytes n, little endian | n bytes of JSON | tokens, uint16 or uint32

The JSON states the tokenizer (in full), the number of tokens and where each split begins and ends. Every document ends
with EOT. Every 20th document is held out; of a corpus with fewer, the last 5% of its tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cadd_min.corpus import Corpus, Piece
from cadd_min.errors import InputError
from cadd_min.tokenizer import Tokenizer, from_spec

MAGIC = b"CADDTOK1"
HELD_OUT = 20  # one document in this many


class TokenFile:
    """A memory-mapped token file: `split(name)` is a read-only array of ids.

    Raises InputError if the file is not one, or is cut short.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                start, size = file.read(16), path.stat().st_size
                if start[:8] != MAGIC or len(start) < 16:
                    raise InputError(f"{path} is not a token file of this project")
                (length,) = struct.unpack("<Q", start[8:])
                if length > size:
                    raise InputError(f"{path} is cut short: its header is not whole")
                self.header: dict[str, Any] = json.loads(file.read(length))
        except OSError as error:
            raise InputError(f"cannot read the token file {path}: {error.strerror}") from None
        except ValueError as error:
            raise error if isinstance(error, InputError) else InputError(f"{path} has a damaged header") from None
        dtype = np.dtype(self.header["dtype"]).newbyteorder("<")
        if size != 16 + length + self.header["count"] * dtype.itemsize:
            raise InputError(f"{path} is cut short: it should hold {self.header['count']} tokens")
        self._tokens = np.memmap(path, dtype, "r", offset=16 + length, shape=(self.header["count"],))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made it."""
        return from_spec(self.header["tokenizer"])

    def split(self, name: str) -> np.ndarray:
        """Token ids of "train", "val" or (text8) "test"."""
        start, end = self.header["splits"][name]
        return self._tokens[start:end]


def prepare(corpus: Corpus, tokenizer: Tokenizer, cache: Path) -> TokenFile:
    """The token file of this corpus under this tokenizer: from the cache, or made now."""
    key = hashlib.sha256(f"{corpus.identity}|{tokenizer.fingerprint()}".encode()).hexdigest()[:12]
    path = cache / f"{corpus.name}-{tokenizer.kind}{tokenizer.vocab_size}-{key}.bin"
    if path.exists():
        try:
            found = TokenFile(path)
            if found.header["tokenizer"] == tokenizer.spec():
                return found
            print(f"{path} was made by another tokenizer: making it again")
        except InputError as error:
            print(f"{error}: making it again")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_tokens(corpus, tokenizer, path)
    except OSError as error:
        raise InputError(f"cannot write the token file {path}: {error.strerror}") from None
    return TokenFile(path)


def write_tokens(corpus: Corpus, tokenizer: Tokenizer, path: Path) -> None:
    """Tokenise a corpus into `path`, which exists only once it is whole."""
    dtype = np.dtype("<u2" if tokenizer.mask_id < 2**16 else "<u4")
    parts = {split: path.with_suffix(f".{split}.{os.getpid()}.tmp") for split in ("train", "val", "whole")}
    try:
        with parts["train"].open("wb") as train, parts["val"].open("wb") as val:
            _tokenise(corpus, tokenizer, dtype, train, val)
            counts = [train.tell() // dtype.itemsize, val.tell() // dtype.itemsize]
        header = {
            "tokenizer": tokenizer.spec(),
            "corpus": corpus.identity,
            "dtype": dtype.name,
            "count": sum(counts),
            "splits": _splits(corpus, *counts),
        }
        text = json.dumps(header).encode()
        with parts["whole"].open("wb") as whole:
            whole.write(MAGIC + struct.pack("<Q", len(text)) + text)
            for split in ("train", "val"):
                with parts[split].open("rb") as part:
                    while block := part.read(1 << 24):
                        whole.write(block)
            whole.flush()
            os.fsync(whole.fileno())
        os.replace(parts["whole"], path)
    finally:
        for leftover in parts.values():
            leftover.unlink(missing_ok=True)


def _tokenise(corpus: Corpus, tokenizer: Tokenizer, dtype: np.dtype, train: BinaryIO, val: BinaryIO) -> None:
    """Stream the corpus through the tokenizer, on all cores, into its two splits."""
    document = 0
    with tqdm(total=corpus.size, unit="B", unit_scale=True, desc=f"tokenising {corpus.name}", leave=False) as bar:
        for pieces in _batched(corpus.pieces()):
            for piece, ids in zip(pieces, tokenizer.encode_batch([p.text for p in pieces])):
                ids = [*ids, tokenizer.eot_id] if piece.last else ids
                held_out = document % HELD_OUT == HELD_OUT - 1
                (val if held_out else train).write(np.asarray(ids, dtype).tobytes())
                document += piece.last
                bar.update(len(piece.text.encode()))


def _batched(pieces: Iterator[Piece], size: int = 1 << 23) -> Iterator[list[Piece]]:
    """Pieces in lists of about `size` characters: enough for all cores, flat in memory."""
    batch, total = [], 0
    for piece in pieces:
        batch.append(piece)
        total += len(piece.text)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _splits(corpus: Corpus, train: int, val: int) -> dict[str, tuple[int, int]]:
    """[start, end) of each split in the file."""
    count = train + val
    if corpus.shares is not None:
        ends = [round(share * count) for share in np.cumsum(corpus.shares)]
        return dict(zip(("train", "val", "test"), zip([0, *ends], ends)))
    if val == 0:
        train = count - count // HELD_OUT
    return {"train": (0, train), "val": (train, count)}


class Batches:
    """Sequences of `length` tokens, shuffled without replacement over each epoch: batches(index) is (B, L) int64.

    A pure function of (seed, index). Each epoch cuts the stream at another place.
    """

    def __init__(self, tokens: np.ndarray, length: int, batch_size: int, seed: int = 0, name: str = "the corpus"):
        if len(tokens) < length:
            raise InputError(f"{name} has {len(tokens)} tokens: fewer than one sequence of --length {length}")
        self.tokens, self.length, self.batch_size, self.seed = tokens, length, batch_size, seed
        self.per_epoch = max(1, len(tokens) // length - 1)
        self._epoch: tuple[int, int, np.ndarray] = (-1, 0, np.empty(0, np.int64))

    def _order(self, epoch: int) -> tuple[int, np.ndarray]:
        if self._epoch[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            slack = len(self.tokens) - self.per_epoch * self.length
            self._epoch = (epoch, int(rng.integers(slack + 1)), rng.permutation(self.per_epoch))
        return self._epoch[1:]

    def __call__(self, index: int) -> Tensor:
        rows = []
        for n in range(index * self.batch_size, (index + 1) * self.batch_size):
            shift, order = self._order(n // self.per_epoch)
            start = shift + order[n % self.per_epoch] * self.length
            rows.append(self.tokens[start : start + self.length].astype(np.int64))
        return torch.from_numpy(np.stack(rows))
