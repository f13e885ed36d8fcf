"""Prompts with their responses, to tune a model on: {"prompt": ..., "response": ...}, one JSON object a line.

A sequence is prompt, response, and the end token up to its length. The prompt is given: never masked, never scored. The
end tokens are masked and scored like any other, so that a model learns how long an answer is (as LLaDA, Nie et al.
2025). A response that does not fit is cut, and has no end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from cadd_min.data.tokenizer import Tokenizer
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import json_rows

FIELDS = ("prompt", "response")


class Pair(NamedTuple):
    prompt: str
    response: str
    line: int = 0  # of its file


def holds_pairs(path: Path) -> bool:
    """Whether it is a .jsonl file whose first object has a prompt, or a response."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(next((line for line in file if line.strip()), "{}"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and any(name in first for name in FIELDS)


def read_pairs(path: Path) -> list[Pair]:
    """All pairs of a .jsonl file. Raises InputError, with the number of the line, for one that is none."""
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
) -> tuple[np.ndarray, np.ndarray]:
    """(N, L) int64 sequences and where in them the responses begin (N,).

    prompt_ids: makes ids of a prompt: the tokenizer, or its chat template. Raises InputError for a prompt that leaves
    no room for a response.
    """
    ids = np.full((len(pairs), length), tokenizer.eot_id, np.int64)
    starts = np.empty(len(pairs), np.int64)
    coded = tokenizer.encode_batch([pair.response for pair in pairs])
    for n, (pair, response) in enumerate(zip(tqdm(pairs, desc="tokenising", unit="pair", leave=False), coded)):
        prompt = prompt_ids(pair.prompt)
        if len(prompt) >= length:
            raise InputError(
                f"--dataset, line {pair.line}: the prompt has {len(prompt)} tokens and leaves no room for a response: "
                f"--length is {length}"
            )
        whole = (prompt + response)[:length]
        ids[n, : len(whole)], starts[n] = whole, len(prompt)
    return ids, starts


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Those to train on, and every 20th, held out; of fewer than 20 the last. Raises InputError for fewer than two."""
    if len(pairs) < 2:
        raise InputError("there must be two pairs of prompt and response at least: one is held out")
    held_out = pairs[19::20] or pairs[-1:]
    kept = [pair for n, pair in enumerate(pairs) if n % 20 != 19] if len(pairs) >= 20 else pairs[:-1]
    return kept, held_out
