"""Every example in a docstring of rlprm runs and shows what it says.

Only modules that hold examples are imported, so a docstring never costs the import of an engine that has none.
"""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITH_EXAMPLES = sorted(path for path in (ROOT / "rlprm").rglob("*.py") if ">>>" in path.read_text(encoding="utf-8"))


def run(module) -> tuple[int, str]:
    """The number of examples in ``module`` and what the failing ones printed."""
    printed: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(test, out=printed.append)
    return runner.tries, "".join(printed)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples(path):
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    tries, printed = run(importlib.import_module(name))
    assert not printed, printed
    # An example that the finder cannot see (in a comment, or in a decorated object) would be one that never runs.
    assert tries > 0


def test_a_wrong_example_is_found(tmp_path, monkeypatch):
    (tmp_path / "wrong_example.py").write_text('"""\n>>> 1 + 1\n3\n"""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    tries, printed = run(importlib.import_module("wrong_example"))
    assert tries == 1
    assert "Expected:\n    3\nGot:\n    2" in printed
