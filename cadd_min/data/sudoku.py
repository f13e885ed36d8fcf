"""Make random full sudoku grids, solve puzzles, and count the rules that a grid breaks.

A grid is 81 digits from 1 to 9, row by row. Its 27 units are the rows, the columns and the 3x3 boxes, and each unit has
every digit once. So a sample is right or wrong, and its mistakes can be counted.

New grids are drawn from a pool of grids that a solver found at random. Symmetries of the game change each grid. Digits
are renamed. Rows are permuted within bands of three, and bands are permuted. Columns are treated like rows. Half of the
grids are transposed. One grid of the pool becomes any of about 10^12.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cadd_min.data.tokenizer import CharTokenizer, Tokenizer
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import atomic_write

CELLS = 81
DIGITS = "123456789"
GRIDS, POOL = 200_000, 2000  # grids in the file, and grids that the solver finds for it, in about five seconds
TRIES = 100_000  # digits that the solver may try for one puzzle, in about three seconds


def units() -> np.ndarray:
    """List the cells of each unit: (27, 9), the rows, the columns, then the boxes."""
    cells = np.arange(CELLS).reshape(9, 9)
    boxes = cells.reshape(3, 3, 3, 3).swapaxes(1, 2).reshape(9, 9)
    return np.concatenate([cells, cells.T, boxes])


UNITS = units()
UNITS_OF = [(cell // 9, 9 + cell % 9, 18 + cell // 27 * 3 + cell % 9 // 3) for cell in range(CELLS)]  # of each cell


def broken(grids: np.ndarray) -> np.ndarray:
    """Count the units, of 27, that do not have every digit once, (N,), in grids (N, 81). A 0 is not a digit."""
    return (np.sort(grids[:, UNITS], -1) != np.arange(1, 10)).any(-1).sum(-1)  # (N, 27, 9), then (N, 27)


def clashes(grid: np.ndarray) -> list[tuple[int, int]]:
    """List the pairs of cells of one unit that have the same digit, in a grid (81,) with 0 for an empty cell."""
    pairs = {(int(a), int(b)) for unit in UNITS for i, a in enumerate(unit) for b in unit[i + 1 :]}
    return sorted((a, b) for a, b in pairs if grid[a] and grid[a] == grid[b])


def solutions(grid: np.ndarray, rng: np.random.Generator, tries: int = TRIES) -> Iterator[np.ndarray]:
    """Yield the full grids (81,) that agree with a grid (81,), in which 0 is an empty cell, in random order.

    The cell with the fewest digits left is tried first. Raises TimeoutError after `tries` digits.
    """
    cells = [0] * CELLS
    free = [0b111_111_111] * 27  # of each unit, the digits that are left, as bits
    tried = 0

    def put(cell: int, bit: int) -> None:
        """Write a digit into a cell, or take it out again."""
        cells[cell] = bit
        for unit in UNITS_OF[cell]:
            free[unit] ^= bit

    def left(cell: int) -> int:
        """Return the digits that the units of a cell have left."""
        a, b, c = UNITS_OF[cell]
        return free[a] & free[b] & free[c]

    def search(empty: list[int]) -> Iterator[np.ndarray]:
        """Yield the solutions of the grid as it is, of which `empty` cells are left."""
        nonlocal tried
        if not empty:
            yield np.array([bit.bit_length() for bit in cells])
            return
        cell = min(empty, key=lambda each: left(each).bit_count())
        bits = [1 << digit for digit in range(9) if left(cell) >> digit & 1]
        rest = [each for each in empty if each != cell]
        for n in rng.permutation(len(bits)):
            tried += 1
            if tried > tries:
                raise TimeoutError(f"no answer after {tries} digits")
            put(cell, bits[n])
            yield from search(rest)
            put(cell, bits[n])
        cells[cell] = 0

    for cell in np.flatnonzero(grid).tolist():
        bit = 1 << int(grid[cell]) - 1
        if not left(cell) & bit:
            return
        put(cell, bit)
    yield from search(np.flatnonzero(grid == 0).tolist())


def full_grids(count: int, rng: np.random.Generator) -> np.ndarray:
    """Find full grids (count, 81) by the solver, each from an empty grid."""
    return np.stack([next(solutions(np.zeros(CELLS, np.int64), rng)) for _ in range(count)])


def changed(grids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change each grid (N, 81) by random symmetries of the game. A right grid stays right."""
    count, each = len(grids), np.arange(len(grids))[:, None]

    def lines() -> np.ndarray:
        """Draw an order of nine lines for each grid, (N, 9), in which the three lines of a band stay together."""
        bands, within = rng.random((count, 3)).argsort(1), rng.random((count, 3, 3)).argsort(2)
        return (3 * bands[:, :, None] + within).reshape(count, 9)

    names = 1 + rng.random((count, 9)).argsort(1)
    square = names[each, grids - 1].reshape(count, 9, 9)
    square = square[each, lines()]  # rows
    square = square.swapaxes(1, 2)[each, lines()]  # columns
    turned = rng.random(count) < 0.5
    square[turned] = square[turned].swapaxes(1, 2)
    return square.reshape(count, CELLS)


# ------------------------------------------------------------------------------------------------ as a data set


def write(cache: Path, count: int = GRIDS, pool: int = POOL) -> Path:
    """Write `count` full grids to a file in `cache`, a grid a line, unless the file is there. Returns its path."""
    path = cache / f"sudoku-{count}-{pool}.txt"
    if not path.exists():
        rng = np.random.default_rng(0)
        found = np.concatenate([full_grids(1, rng) for _ in tqdm(range(pool), desc="solving sudoku", leave=False)])
        grids = changed(found[rng.integers(pool, size=count)], rng)
        with atomic_write(path) as part:
            part.write_text("".join("".join(map(str, grid)) + "\n" for grid in grids.tolist()))
    return path


def of_sudoku(dataset: str | None, tokenizer: Tokenizer) -> bool:
    """Tell whether a model was trained on --dataset sudoku with a token for each digit."""
    return dataset == "sudoku" and isinstance(tokenizer, CharTokenizer) and tokenizer.alphabet == DIGITS


def decode(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Read token ids (N, L) as grids (N, 81). A token that is not a digit, like EOT or the mask, is 0."""
    texts = [tokenizer.decode([token]) for token in range(tokenizer.mask_id + 1)]
    return np.array([1 + DIGITS.find(text) for text in texts])[ids[:, :CELLS]]


def check_clues(grid: np.ndarray) -> str:
    """Check a --prompt, a grid (81,) with 0 for an empty cell, and return a note for the user, or "".

    Raises InputError where no full grid agrees with the prompt.
    """
    for a, b in clashes(grid):
        places = " and ".join(f"row {1 + cell // 9}, column {1 + cell % 9}" for cell in (a, b))
        raise InputError(f"--prompt breaks a rule of sudoku: {grid[a]} stands in {places}")
    try:
        found = next(solutions(grid, np.random.default_rng(0)), None)
    except TimeoutError:
        return "whether the puzzle has a solution was not found out in a few seconds"
    if found is None:
        raise InputError("--prompt is a sudoku without a solution")
    return ""
