"""The README's table of methods is the folder of methods."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlprm.paths import conf_dir

README = Path(__file__).resolve().parents[2] / "README.md"
ROW = re.compile(r"^\| `([\w\-]+)` \|(.*)\|$", re.MULTILINE)
COLUMNS = 3  # after the name: process reward from; formula and source; differs from the authors' code


def section(readme: str) -> str:
    """The text between the heading `Methods` and the next one of its level."""
    parts = readme.split("\n## Methods\n")
    assert len(parts) == 2, f"README.md has {len(parts) - 1} headings `## Methods`; expected one"
    return parts[1].split("\n## ")[0]


def rows(readme: str) -> list[tuple[str, list[str]]]:
    """(method, its other cells) of each row; commands have a space in their name and are none."""
    return [(name, [cell.strip() for cell in rest.split("|")]) for name, rest in ROW.findall(section(readme))]


def differences(readme: str, methods: set[str]) -> list[str]:
    """What the table and the folder do not agree on, in words."""
    named = [name for name, _ in rows(readme)]
    twice = sorted({name for name in named if named.count(name) > 1})
    return [
        *(f"conf/method/{name}.yaml has no row" for name in sorted(methods - set(named))),
        *(f"the row {name!r} names no method" for name in sorted(set(named) - methods)),
        *(f"{name!r} has two rows" for name in twice),
    ]


def test_every_method_has_one_row_and_every_row_a_method() -> None:
    methods = {file.stem for file in (conf_dir() / "method").glob("*.yaml")}
    assert methods, "no method found; the listing is broken"
    found = differences(README.read_text(encoding="utf-8"), methods)
    assert not found, "README.md, Methods: " + "; ".join(found)


def test_no_row_leaves_a_cell_open() -> None:
    for name, cells in rows(README.read_text(encoding="utf-8")):
        assert len(cells) == COLUMNS, f"the row {name!r} has {len(cells)} cells after the name; expected {COLUMNS}"
        assert all(cells), f"the row {name!r} has an empty cell"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("| `a` | x | y | z |", ["conf/method/b.yaml has no row"]),
        ("| `a` | x | y | z |\n| `b` | x | y | z |\n| `c` | x | y | z |", ["the row 'c' names no method"]),
        ("| `a` | x | y | z |\n| `b` | x | y | z |\n| `b` | x | y | z |", ["'b' has two rows"]),
        ("| `a` | x | y | z |\n| `b` | x | y | z |\n| `run c` | x | y | z |\n## Next\n| `d` | x |", []),
    ],
)
def test_planted_differences_are_found(table: str, said: list[str]) -> None:
    assert differences(f"# Name\n\n## Methods\n\n{table}\n", {"a", "b"}) == said
