"""From what a model wrote to a program, and from how many programs passed to pass@k."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

from cadd_min.codebench.problems import Problem

FENCE = re.compile(r"^```([^\n`]*)$", re.M)
BLOCK = re.compile(r"^```[^\n`]*\n(.*?)(?:^```|\Z)", re.M | re.S)  # one that is not closed goes to the end


def extract(text: str, problem: Problem) -> str:
    """The program in a model's answer: a fenced block of code, or the answer up to where such answers stop.

    Of several blocks, the first that defines the function that is asked for. Where an answer goes on from the prompt it
    is put after it; one that defines the function anew, only after what stands before the function there. A model that
    was given the fence that opens a block may write the one that closes it: then what follows is talk.
    """
    named = re.compile(rf"^(?:async )?def {re.escape(problem.entry_point)}\b", re.M)
    fence = FENCE.search(text)
    before = text[: fence.start()] if fence and not fence[1].strip() else ""
    if named.search(before) or (problem.continues and before.lstrip("\n").startswith((" ", "\t"))):
        text = before
    blocks = [match[1] for match in BLOCK.finditer(text)]
    whole = [block for block in blocks if named.search(block)]
    if whole:
        start = named.search(problem.prompt) if problem.continues else None
        return (problem.prompt[: start.start()] if start else "") + whole[0]
    code = blocks[0] if blocks else text[: min(_found(text, stop) for stop in problem.stops)]
    return problem.prompt + code if problem.continues else code


def _found(text: str, stop: str) -> int:
    at = text.find(stop)
    return len(text) if at < 0 else at


def pass_at_k(count: int, passed: int, k: int) -> float:
    """The chance that one of k of `count` samples passes, of which `passed` do: unbiased (Chen et al. 2021, eq. 1).

    1 - C(n - c, k) / C(n, k), as a product: the binomials are beyond floats.
    """
    if not 1 <= k <= count or not 0 <= passed <= count:
        raise ValueError(f"pass@{k} of {count} samples, {passed} of them passed")
    return 1.0 - math.prod(max(0.0, 1.0 - k / n) for n in range(count - passed + 1, count + 1))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean over problems, and its standard error: the problems are a sample, too."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def table(passed: dict[str, int], count: int, ks: Iterable[int]) -> str:
    """Markdown: a line for each k. passed: of each problem, how many of its `count` samples."""
    lines = ["| | mean over problems | ± s.e. |", "|---|---|---|"]
    for k in ks:
        mean, error = mean_and_error([pass_at_k(count, n, k) for n in passed.values()])
        lines.append(f"| pass@{k} | {mean:.4f} | {error:.4f} |")
    return "\n".join(lines)


def counted(statuses: Iterable[str]) -> str:
    """ "3 passed, 5 wrong", the most frequent first."""
    return ", ".join(f"{number} {status}" for status, number in Counter(statuses).most_common())
