"""Read the Markdown tables of docs/, so that a figure and its table cannot disagree."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.figures.style import DOCS
from cadd_min.utils.errors import InputError

NUMBER = re.compile(r"(-?\d*\.?\d+)(?:\s*±\s*(\d*\.?\d+))?")


def read_table(page: str, *columns: str) -> list[dict[str, str]]:
    """Return the rows of the table in docs/`page` whose first columns have these names.

    A cell that is empty in the first column has the value of the row above. Raises InputError where there is no table.
    """
    path, rows = DOCS / page, []
    lines = [cells(line) for line in text_of(path).splitlines()]
    for number, header in enumerate(lines):
        if tuple(header[: len(columns)]) != columns:
            continue
        first = ""
        for row in lines[number + 2 :]:
            if not row:
                break
            first = row[0] or first
            rows.append(dict(zip(header, [first, *row[1:]])))
        return rows
    raise InputError(f"{path} has no table whose first columns are {', '.join(map(repr, columns))}")


def text_of(path: Path) -> str:
    """Read a page of stored numbers. Raises InputError where it is missing."""
    if not path.is_file():
        raise InputError(f"the stored numbers of a figure are missing: there is no {path}")
    return path.read_text()


def cells(line: str) -> list[str]:
    """Split a line of a Markdown table, without emphasis and code marks. Another line has no cells."""
    if not line.startswith("|"):
        return []
    return [re.sub(r"\*\*|`", "", cell).strip() for cell in line.strip().strip("|").split("|")]


def numbers(cell: str) -> list[tuple[float, float]]:
    """Return (mean, spread) of each number in a cell. The spread is 0 where a number stands alone."""
    return [(float(mean), float(spread or 0)) for mean, spread in NUMBER.findall(cell)]


def matching(rows: list[dict[str, str]], first: str, zhat: str) -> list[dict[str, str]]:
    """Return the rows whose first cell begins with `first` and whose zhat is this, or empty below a row with it."""
    own = [row for row in rows if next(iter(row.values())).startswith(first)]
    above, chosen = "", []
    for row in own:
        above = row["zhat"] or above
        if above == zhat:
            chosen.append(row)
    return chosen
