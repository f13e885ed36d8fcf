"""Prompts with responses to tune a model on: a .jsonl file, with {"prompt": ..., "response": ...} on each line.

A sequence is the prompt, the response, and end tokens up to its length. The prompt is given: it is never masked and
never scored. End tokens are masked and scored like any token, so that a model learns how long an answer is (as in
LLaDA, Nie et al. 2025). A response that does not fit is cut, and no end token follows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from cadd_min.data import documents
from cadd_min.data.split import ONE_IN, held_out, unlike
from cadd_min.data.tokenizer import Tokenizer
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import json_rows

FIELDS = ("prompt", "response")


class Pair(NamedTuple):
    """A prompt and its response."""

    prompt: str
    response: str
    line: int = 0  # its number in the file, from 1


def holds_pairs(path: Path) -> bool:
    """Tell whether `path` is a .jsonl file whose first object has a prompt or a response."""
    if documents.kind(str(path)) != "jsonl" or not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = json.loads(next((line for line in file if line.strip()), "{}"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and any(name in first for name in FIELDS)


def read_pairs(path: Path) -> list[Pair]:
    """Read all pairs of a .jsonl file. Raises InputError that names the line which is not a pair."""
    pairs = []
    for number, values in json_rows(path):
        for name in FIELDS:
            if not isinstance(values.get(name), str) or not values[name]:
                raise InputError(f"{path}, line {number}: needs {name!r}, a text that is not empty")
        pairs.append(Pair(values["prompt"], values["response"], number))
    if not pairs:
        raise InputError(f"{path} holds no pairs of prompt and response")
    return pairs


def encode(
    pairs: list[Pair], tokenizer: Tokenizer, length: int, prompt_ids: Callable[[str], list[int]]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Make sequences (N, L) int64 of N pairs, the places (N,) int64 at which their responses begin, and a count.

    The count is of the responses that are cut, or that fill the sequence: no end token follows them.

    length: L; prompt_ids: the function from a prompt to its ids, see `hf_tokenizer.prompt_ids`. Raises InputError for a
    prompt that leaves no room for a response.
    """
    ids = np.full((len(pairs), length), tokenizer.eot_id, np.int64)
    starts, endless = np.empty(len(pairs), np.int64), 0
    responses = tokenizer.encode_batch([pair.response for pair in pairs])
    for n, (pair, response) in enumerate(zip(tqdm(pairs, desc="tokenising", unit="pair", leave=False), responses)):
        prompt = prompt_ids(pair.prompt)
        if len(prompt) >= length:
            raise InputError(
                f"--dataset, line {pair.line}: the prompt has {len(prompt)} tokens and leaves no room for a response: "
                f"--length is {length}"
            )
        sequence = (prompt + response)[:length]
        endless += len(prompt) + len(response) >= length
        ids[n, : len(sequence)], starts[n] = sequence, len(prompt)
    return ids, starts, endless


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into the pairs to train on and the held-out pairs, which their prompts decide: see split.py.

    So all answers to one prompt are on the same side. Where the shares are unlike, the last 5% are held out instead,
    and at least one pair. Raises InputError for fewer than two pairs.
    """
    if len(pairs) < 2:
        raise InputError("there must be two pairs of prompt and response at least: one is held out")
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        sides[held_out(pair.prompt)].append(pair)
    if unlike(len(sides[True]), len(pairs)):
        last = max(1, len(pairs) // ONE_IN)
        return pairs[:-last], pairs[-last:]
    return sides
