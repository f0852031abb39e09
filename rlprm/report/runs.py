"""Reading what runs wrote: ``metrics.jsonl``, one row a step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlprm.errors import DataError

Row = Mapping[str, Any]


def read_metrics(folder: Path) -> list[Row]:
    """The rows of ``<folder>/metrics.jsonl`` by step; a last line that was cut off is left out (the run may be at it).

    Raises:
        DataError: there is no such file, or a line before the last is not JSON.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path} is missing; expected the folder of a run that has logged at least one step")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(
                    f"{path}:{number} is not JSON ({error}); remove the line or restore the file"
                ) from error
    return sorted(rows, key=lambda row: row["step"])


def series(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    """``(step, value)`` wherever ``name`` was logged and finite.

    >>> series([{"step": 0, "a": 1.0}, {"step": 1}, {"step": 2, "a": None}, {"step": 3, "a": 4.0}], "a")
    [(0, 1.0), (3, 4.0)]
    """
    return [(row["step"], float(row[name])) for row in rows if row.get(name) is not None]


def mean_of_last(rows: Sequence[Row], name: str, count: int) -> float | None:
    """Mean of the last ``count`` logged values of ``name``; None when there is none.

    >>> mean_of_last([{"step": step, "a": float(step)} for step in range(5)], "a", 2)
    3.5
    """
    values = [value for _, value in series(rows, name)][-count:]
    return sum(values) / len(values) if values else None
