"""Sudoku: rules counted by hand, puzzles with known solutions, and grids that are right, varied and without end."""

import numpy as np
import pytest

from cadd_min.data import corpus, sudoku
from cadd_min.data.tokenizer import chars
from cadd_min.utils.errors import InputError

PUZZLE = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"  # of Wikipedia's article
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def grid(text: str) -> np.ndarray:
    return np.array([int(c) for c in text])


def test_a_solved_grid_breaks_no_rule_and_wrong_cells_break_theirs():
    right = grid(SOLUTION)
    one, two, row, empty = (right.copy() for _ in range(4))
    one[40] = right[40] % 9 + 1  # a row, a column and a box
    two[[0, 1]] = two[[1, 0]]  # two columns
    row[[0, 3]] = row[[3, 0]]  # two columns and two boxes
    empty[80] = 0
    assert sudoku.broken(np.stack([right, one, two, row, empty])).tolist() == [0, 3, 2, 4, 3]
    assert sudoku.broken(np.ones((1, 81), int)).tolist() == [27]
    assert sudoku.clashes(right) == [] and sudoku.clashes(grid(PUZZLE)) == []
    assert sudoku.clashes(one) == [(31, 40), (38, 40)]  # the second stands in its row and in its box


def test_each_cell_has_three_units():
    for cell, of in enumerate(sudoku.UNITS_OF):
        assert [unit for unit in range(27) if cell in sudoku.UNITS[unit]] == list(of)


def test_the_solver_finds_all_solutions_and_no_others():
    rng = np.random.default_rng(0)
    found = list(sudoku.solutions(grid(PUZZLE), rng))
    assert len(found) == 1 and np.array_equal(found[0], grid(SOLUTION))
    # a rectangle of two digits in two boxes can be turned: two solutions
    open_cells = grid(SOLUTION)
    rows = open_cells.reshape(9, 9)
    i, j, a, b = next(
        (i, j, a, b)
        for i in range(9) for j in range(i + 1, 9) for a in range(9) for b in range(9)
        if rows[i, a] == rows[j, b] and rows[i, b] == rows[j, a] and a < b and (i // 3 == j // 3) != (a // 3 == b // 3)
    )  # fmt: skip
    rows[[i, i, j, j], [a, b, a, b]] = 0
    found = list(sudoku.solutions(open_cells, rng))
    assert len(found) == 2 and not np.array_equal(*found) and not sudoku.broken(np.stack(found)).any()
    clashing = grid(PUZZLE)
    clashing[2] = 5
    assert not list(sudoku.solutions(clashing, rng))


def test_grids_are_right_different_and_favour_no_digit():
    """Count each digit in each cell. Sigma of a count is 14.9; the largest of 729 exceeds 4.5 sigma once in 200 seeds.

    Power: without new names for the digits, or without new orders of rows and columns, the counts are far off.
    """
    rng = np.random.default_rng(0)
    pool = sudoku.full_grids(10, rng)
    grids = sudoku.changed(pool[rng.integers(10, size=2250)], rng)
    assert not sudoku.broken(grids).any() and len(np.unique(grids, axis=0)) == 2250
    counts = np.stack([(grids == digit).sum(0) for digit in range(1, 10)])
    assert abs(counts - 250).max() < 4.5 * (2250 / 9 * 8 / 9) ** 0.5
    square = grids.reshape(-1, 9, 9)
    bands = np.sort(square[:, :3, 0], 1)  # the digits of a column's first band: 84 sets, each as likely
    sets = np.unique(bands, axis=0, return_counts=True)[1]
    assert len(sets) == 84 and ((sets - 2250 / 84) ** 2 / (2250 / 84)).sum() < 83 + 4 * 166**0.5


def test_the_file_is_written_once_and_is_a_corpus_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sudoku.write, "__defaults__", (300, 3))
    source = corpus.open_corpus("sudoku", tmp_path)
    lines = [piece.text for part in source.parts() for piece in corpus.read(part)]
    grids = np.stack([grid(line) for line in lines])
    assert grids.shape == (300, 81) and not sudoku.broken(grids).any() and source.tokenizer == "chars"
    (path,) = tmp_path.glob("sudoku*.txt")
    written = path.stat().st_mtime_ns
    assert corpus.open_corpus("sudoku", tmp_path, lines=True).identity == source.identity
    assert path.stat().st_mtime_ns == written
    assert corpus.LINES["sudoku"] == len(lines[0]) + 1


def test_ids_are_read_as_digits_and_all_else_as_empty():
    codec = chars("123456789x")
    ids = np.array(
        [codec.encode(SOLUTION) + [codec.eot_id] * 3, [codec.mask_id] * 80 + codec.encode("x7")[:1] + [0] * 3]
    )
    assert np.array_equal(sudoku.decode(ids, codec), np.stack([grid(SOLUTION), np.zeros(81, int)]))


@pytest.mark.parametrize("clues, message", [
    ("55" + "0" * 79, "5 stands in row 1, column 1 and row 1, column 2"),
    ("5" + "0" * 9 + "5" + "0" * 70, "5 stands in row 1, column 1 and row 2, column 2"),
    ("12345678" + "0" * 9 + "9" + "0" * 63, "without a solution"),
])  # fmt: skip
def test_clues_that_no_grid_has(clues, message):
    assert sudoku.check_clues(grid(PUZZLE)) == ""
    with pytest.raises(InputError, match=message):
        sudoku.check_clues(grid(clues))


def test_a_puzzle_that_is_hard_to_refute_is_given_up():
    """Norvig's puzzle without a solution: no two given digits clash, and a search takes very long."""
    puzzle = ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4........."
    assert "was not found out" in sudoku.check_clues(grid(puzzle.replace(".", "0")))
