"""The quick start's recipe reaches what its expected.json says, on every seed that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlprm.cli.main import main

RECIPE = "chain_arithmetic_cpu"
EXPECTED = Path(__file__).resolve().parents[2] / "recipes" / RECIPE / "expected.json"

pytestmark = [pytest.mark.learning, pytest.mark.long, pytest.mark.timeout(3600)]


def last(folder: Path, metric: str) -> float:
    """The metric where it was written last."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(row[metric] for row in reversed(rows) if row.get(metric) is not None)


def test_the_mean_over_seeds_is_as_expected(tmp_path: Path) -> None:
    if not EXPECTED.is_file():
        pytest.skip(f"{EXPECTED.relative_to(EXPECTED.parents[2])} does not exist: nobody has measured the recipe yet")
    expected: dict[str, Any] = json.loads(EXPECTED.read_text())
    seeds = ",".join(map(str, expected["seeds"]))
    assert main(["train", f"recipe={RECIPE}", f"output_dir={tmp_path}", "--quiet", "--seeds", seeds]) == 0
    reached = [last(tmp_path / RECIPE / f"seed{seed}", expected["metric"]) for seed in expected["seeds"]]
    assert sum(reached) / len(reached) == pytest.approx(expected["mean"], abs=expected["tolerance"])
