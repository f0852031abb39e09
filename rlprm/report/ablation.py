"""What an ablation's runs have in them: every number at the same count of sampled rollouts, and how cells compare.

An ablation's folder holds ``ablation.json`` (what is compared, and after :func:`evaluate` the numbers too) and the
runs, ``<cell>/seed<seed>``. Runs are read from their ``metrics.jsonl``; nothing here starts one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlprm.errors import DataError
from rlprm.report.ablation_plots import plots
from rlprm.report.ablation_text import markdown
from rlprm.report.ablation_values import MEASURES, RunLog, Settings, collapse, measured, read_run, value_at
from rlprm.report.contrasts import Difference, difference, holm
from rlprm.report.seeds import interval

PLAN = "ablation.json"
REPORT = "report.md"
FINISHED = "finished.json"  # in a run's folder: it is complete
FAILED = "failed.json"  # ... it ended with an error, which stands here


def read_plan(folder: Path) -> dict[str, Any]:
    """``ablation.json``.

    Raises:
        DataError: there is none, or it is not one of this program's.
    """
    path = folder / PLAN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected the folder of an ablation") from None
    if not isinstance(content, dict) or not {"name", "cells", "seeds", "baseline", "settings"} <= set(content):
        raise DataError(
            f"{path} says no name, cells, seeds, baseline or settings; expected one that rlprm ablate wrote"
        )
    return content


def evaluate(folder: Path) -> dict[str, Any]:
    """The plan in ``folder`` with all numbers of its runs, as ``ablation.json`` holds them; see the README.

    Raises:
        DataError: no ablation, or a run that says it is complete and has no metrics.
    """
    plan = read_plan(folder)
    settings = Settings(**plan["settings"])
    runs = {name: {seed: folder / name / f"seed{seed}" for seed in plan["seeds"]} for name in plan["cells"]}
    logs = {
        name: {seed: read_run(path) for seed, path in seeds.items() if (path / FINISHED).is_file()}
        for name, seeds in runs.items()
    }
    rollouts = min((run.rollouts for seeds in logs.values() for run in seeds.values()), default=0.0)
    level = _level(logs[plan["baseline"]], rollouts, settings)
    values = {
        name: {seed: measured(run, rollouts, level, settings) for seed, run in seeds.items()}
        for name, seeds in logs.items()
    }
    against = _against(values, plan["baseline"], settings)
    cells = {
        name: {
            "overrides": plan["cells"][name]["overrides"],
            "seeds": {
                str(seed): _seed(path, values[name].get(seed), logs[name].get(seed), rollouts, settings)
                for seed, path in seeds.items()
            },
            "values": {
                measure: _summary({seed: found[measure] for seed, found in values[name].items()}, settings)
                for measure in MEASURES
            },
            "minus_baseline": {
                measure: None if found is None else asdict(found) for measure, found in against.get(name, {}).items()
            },
        }
        for name, seeds in runs.items()
    }
    return {**plan, "rollouts": rollouts, "level": level, "cells": cells}


def write_report(folder: Path, *, with_plots: bool) -> dict[str, Any]:
    """Write ``ablation.json``, ``report.md`` and, where asked, the plots of the ablation in ``folder``; what was found.

    Raises:
        DataError: no ablation, or a run that says it is complete and has no metrics.
    """
    found = evaluate(folder)
    logs = {
        name: [
            read_run(folder / name / f"seed{seed}") for seed, run in cell["seeds"].items() if run["state"] == "finished"
        ]
        for name, cell in found["cells"].items()
    }
    drawn = plots(found, logs, folder) if with_plots else []
    write_json(folder / PLAN, found)
    (folder / REPORT).write_text(markdown(found, drawn), encoding="utf-8")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Renamed into place, so that whoever reads it never sees half of it."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _level(logs: Mapping[int, RunLog], rollouts: float, settings: Settings) -> float | None:
    if settings.level is not None:
        return settings.level
    ends = [value for run in logs.values() if (value := value_at(run.sampled, rollouts)) is not None]
    return math.fsum(ends) / len(ends) if ends else None


def _against(
    values: Mapping[str, Mapping[int, Mapping[str, float | None]]], baseline: str, settings: Settings
) -> dict[str, dict[str, Difference | None]]:
    """Each cell's differences from the baseline, with p values adjusted over the cells of each measure."""
    found: dict[str, dict[str, Difference | None]] = {name: {} for name in values if name != baseline}
    for measure in MEASURES:
        by_cell = {
            name: {seed: one for seed, numbers in seeds.items() if (one := numbers[measure]) is not None}
            for name, seeds in values.items()
        }
        gaps = {
            name: difference(by_cell[name], by_cell[baseline], settings.confidence, settings.resamples)
            for name in found
        }
        adjusted = holm({name: gap.p for name, gap in gaps.items() if gap is not None and gap.p is not None})
        for name, gap in gaps.items():
            found[name][measure] = None if gap is None else Difference(**{**asdict(gap), "p_holm": adjusted.get(name)})
    return found


def _seed(
    path: Path,
    values: Mapping[str, float | None] | None,
    run: RunLog | None,
    rollouts: float,
    settings: Settings,
) -> dict[str, Any]:
    """One run as the JSON holds it."""
    if run is not None:
        state = {"state": "finished", "rollouts": run.rollouts, "values": dict(values or {})}
        return {**state, "collapse": collapse(run, rollouts, settings), **_start(path)}
    if (path / FAILED).is_file():
        return {"state": "failed", **json.loads((path / FAILED).read_text(encoding="utf-8")), **_start(path)}
    return {"state": "not finished" if (path / "metrics.jsonl").is_file() else "not begun"}


def _start(path: Path) -> dict[str, Any]:
    """The commit of the run's last start."""
    header = path / "run.json"
    if not header.is_file():
        return {}
    return {"commit": json.loads(header.read_text(encoding="utf-8"))["starts"][-1]["commit"]}


def _summary(values: Mapping[int, float | None], settings: Settings) -> dict[str, Any] | None:
    """Interval over the seeds that have a value, and how many have none."""
    present = [value for value in values.values() if value is not None]
    if not present:
        return None
    return {**asdict(interval(present, settings.confidence)), "without": len(values) - len(present)}
