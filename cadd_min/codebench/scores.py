"""From a model's answer to a program, and from the numbers of passed programs to pass@k."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

from cadd_min.codebench.problems import Problem

FENCE = re.compile(r"^```([^\n`]*)$", re.M)
BLOCK = re.compile(r"^```[^\n`]*\n(.*?)(?:^```|\Z)", re.M | re.S)  # an open block goes to the end


def extract(text: str, problem: Problem) -> str:
    """Extract the program from a model's answer.

    The code is the first fenced block that defines the function `entry_point`, else the first block. Without a block
    the code is the answer up to the first of the problem's stops.
    Where an answer continues the prompt, the code is put after the prompt. A block that defines the function itself is
    put after the part of the prompt before that function.
    A prompt may end with the fence that opens a block. Then the answer's first fence closes the block, and the text
    after it is no code.
    """
    definition = re.compile(rf"^(?:async )?def {re.escape(problem.entry_point)}\b", re.M)
    fence = FENCE.search(text)
    before = text[: fence.start()] if fence and not fence[1].strip() else ""
    if definition.search(before) or (problem.continues and before.lstrip("\n").startswith((" ", "\t"))):
        text = before
    blocks = [match[1] for match in BLOCK.finditer(text)]
    defining = [block for block in blocks if definition.search(block)]
    if defining:
        start = definition.search(problem.prompt) if problem.continues else None
        return (problem.prompt[: start.start()] if start else "") + defining[0]
    code = blocks[0] if blocks else text[: min(_index(text, stop) for stop in problem.stops)]
    return problem.prompt + code if problem.continues else code


def _index(text: str, stop: str) -> int:
    """Return where `stop` begins in `text`, or the text's length where it does not occur."""
    index = text.find(stop)
    return len(text) if index < 0 else index


def pass_at_k(count: int, passed: int, k: int) -> float:
    """Estimate the probability that at least one of k samples passes, from `passed` of `count` samples.

    The unbiased estimate is 1 - C(n - c, k) / C(n, k) with n = count and c = passed (Chen et al. 2021, eq. 1). It is
    computed as a product, because the binomials overflow floats. Raises ValueError for numbers out of range.
    """
    if not 1 <= k <= count or not 0 <= passed <= count:
        raise ValueError(f"pass@{k} of {count} samples, {passed} of them passed")
    return 1.0 - math.prod(max(0.0, 1.0 - k / n) for n in range(count - passed + 1, count + 1))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Compute the mean over problems and its standard error, since the problems are a sample too.

    A single problem has the error NaN.
    """
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def table(passed: dict[str, int], count: int, ks: Iterable[int]) -> str:
    """Write pass@k as a Markdown table, a line for each k.

    passed: for each problem by name, how many of its `count` samples passed.
    """
    lines = ["| | mean over problems | ± s.e. |", "|---|---|---|"]
    for k in ks:
        mean, error = mean_and_error([pass_at_k(count, n, k) for n in passed.values()])
        lines.append(f"| pass@{k} | {mean:.4f} | {error:.4f} |")
    return "\n".join(lines)


def counted(statuses: Iterable[str]) -> str:
    """Count the statuses, the most frequent first: "3 passed, 5 wrong"."""
    return ", ".join(f"{number} {status}" for status, number in Counter(statuses).most_common())
