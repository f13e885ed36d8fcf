"""The figures of docs/: each is drawn from the numbers stored there, and is readable on a light and on a dark page."""

import xml.etree.ElementTree as xml

import pytest

from benchmarks.figures import tables
from benchmarks.figures.__main__ import FIGURES
from benchmarks.figures.style import DOCS, ON_DARK, save
from cadd_min.utils.errors import InputError

TABLE = """# A page

| model | zhat | T=4 | T=8 |
|---|---|---|---|
| **mdlm** | | .209 ± .004 / 1.5 | .102 ± .001 / 2 |
| cadd | `soft` | .1 / 2 | |
| | `hard` | -0.25 ± 0.5 | 3 |

The end.
"""


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_and_is_kept(name, tmp_path, monkeypatch):
    """Draw a figure. It has a sentence, colours for a dark page, and no background, and docs/figures has it."""
    monkeypatch.setattr("benchmarks.figures.curves.COUNT", 400)  # the dial's samples: as many take half a minute
    figure = FIGURES[name]()
    sentence = figure.get_suptitle()
    assert sentence.endswith(".") and len(sentence.split()) <= 25
    drawn = save(figure, tmp_path / f"{name}.svg").read_text()
    xml.fromstring(drawn)
    assert "prefers-color-scheme: dark" in drawn and "fill: #ffffff" not in drawn
    assert any(colour in drawn.partition("</style>")[2] for colour in ON_DARK)
    assert (DOCS / "figures" / f"{name}.svg").is_file()


def test_tables_are_read_as_they_stand(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text(TABLE)
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    rows = tables.read_table("page.md", "model", "zhat")
    assert [row["model"] for row in rows] == ["mdlm", "cadd", "cadd"]
    assert tables.numbers(rows[0]["T=4"]) == [(0.209, 0.004), (1.5, 0.0)]
    assert tables.numbers(rows[2]["T=4"]) == [(-0.25, 0.5)]
    assert tables.matching(rows, "cadd", "hard") == rows[2:] and tables.matching(rows, "mdlm", "") == rows[:1]


def test_missing_numbers_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    with pytest.raises(InputError, match=r"stored numbers of a figure are missing: there is no .*page\.md"):
        tables.read_table("page.md", "model")
    (tmp_path / "page.md").write_text(TABLE)
    with pytest.raises(InputError, match="has no table whose first columns are 'step'"):
        tables.read_table("page.md", "step")


def test_a_figure_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out .* cannot be written"):
        save(FIGURES["clocks"](), tmp_path / "file" / "clocks.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
