"""The numbers of one run of an ablation, all at the same count of sampled rollouts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlprm.report.runs import Row, read_metrics, series

ROLLOUTS = "training/rollouts_total"
MOSTLY = 0.5

# What is reported of a run, and of which direction more is better (0: neither).
MEASURES: Mapping[str, tuple[str, int]] = {
    "sampled": ("sampled accuracy", 1),
    "greedy": ("greedy accuracy", 1),
    "area": ("area under the curve", 1),
    "rollouts_to_level": ("rollouts to the level", -1),
    "auc": ("PRM AUC of responses", 1),
    "auc_surprisal": ("surprisal AUC of responses", 0),
    "pair_accuracy": ("PRM pair accuracy", 1),
    "pair_accuracy_surprisal": ("surprisal pair accuracy", 0),
    "step_auc": ("PRM AUC of steps", 1),
    "step_auc_surprisal": ("surprisal AUC of steps", 0),
    "share": ("share of process credit", 0),
    "collapsed": ("collapsed", -1),
    "seconds": ("seconds", -1),
}
_QUALITY = {
    "auc": "prm/auc_fresh",
    "auc_surprisal": "prm/auc_surprisal",
    "pair_accuracy": "prm/pair_acc_fresh",
    "pair_accuracy_surprisal": "prm/pair_acc_surprisal",
    "step_auc": "prm/step_auc",
    "step_auc_surprisal": "prm/step_auc_surprisal",
}
_GREEDY = re.compile(r"val-core/.+/accuracy/greedy")
_SAMPLED = re.compile(r"val-core/.+/accuracy/mean@\d+")
_STAGES = ("timing_s/step", "timing_s/testing", "timing_s/save_checkpoint")

Curve = list[tuple[float, float]]  # (rollouts sampled so far, value), rollouts rising


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an ablation is reported; the keys of ``conf/ablate.yaml``."""

    stream: str
    level: float | None
    confidence: float
    resamples: int
    last_steps: int
    share_of_best: float
    entropy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLog:
    """One run that is complete: its curves over rollouts, and its rows."""

    folder: Path
    rows: Sequence[Row]
    sampled: Curve
    greedy: Curve

    @property
    def rollouts(self) -> float:
        """Responses that it sampled in all, filtered ones counted."""
        return max((value for _, value in series(self.rows, ROLLOUTS)), default=0.0)


def read_run(folder: Path) -> RunLog:
    """The run in ``folder``.

    Raises:
        DataError: it has logged nothing.
    """
    rows = read_metrics(folder)
    sampled = curve(rows, _SAMPLED)
    return RunLog(
        folder=folder,
        rows=rows,
        # without evaluations, what training itself sampled
        sampled=sampled or curve(rows, re.compile("keep/outcome_mean_fresh")),
        greedy=curve(rows, _GREEDY),
    )


def curve(rows: Sequence[Row], name: re.Pattern[str]) -> Curve:
    """Mean of the metrics of that name (one per evaluation set) over the rollouts sampled when each was measured.

    >>> rows = [{"step": 0, "a/x": 0.2, "b/x": 0.4}, {"step": 1, "training/rollouts_total": 8.0}]
    >>> rows += [{"step": 2, "training/rollouts_total": 16.0, "a/x": 0.5, "b/x": None}]
    >>> [(rollouts, round(value, 3)) for rollouts, value in curve(rows, re.compile("./x"))]
    [(0.0, 0.3), (16.0, 0.5)]
    """
    points: Curve = []
    rollouts = 0.0
    for row in rows:
        if row.get(ROLLOUTS) is not None:
            rollouts = float(row[ROLLOUTS])
        values = [float(value) for key, value in row.items() if value is not None and name.fullmatch(key)]
        if values:
            points.append((rollouts, math.fsum(values) / len(values)))
    return points


def value_at(points: Curve, rollouts: float) -> float | None:
    """The curve at a count of rollouts, on the straight line between the measurements around it.

    >>> value_at([(0.0, 0.2), (100.0, 0.6)], 50.0)
    0.4
    """
    if not points or rollouts < points[0][0]:
        return None
    return float(np.interp(rollouts, [x for x, _ in points], [y for _, y in points]))


def area(points: Curve, rollouts: float) -> float | None:
    """``1/N * integral of the curve from 0 to N rollouts``: what a response sampled on the way was right on average.

    >>> area([(0.0, 0.0), (100.0, 1.0)], 50.0)      # a triangle of 50 by one half
    0.25
    """
    end = value_at(points, rollouts)
    if end is None or rollouts <= points[0][0]:
        return None
    cut = [*((x, y) for x, y in points if x < rollouts), (rollouts, end)]
    return float(np.trapezoid([y for _, y in cut], [x for x, _ in cut])) / (rollouts - points[0][0])


def reaches(points: Curve, level: float, rollouts: float) -> float | None:
    """The first count of rollouts, at most ``rollouts``, at which the curve is at ``level``; None: not reached.

    >>> reaches([(0.0, 0.2), (100.0, 0.6)], 0.5, 100.0)
    75.0
    """
    before: tuple[float, float] | None = None
    for x, y in points:
        if y >= level:
            if before is None:
                return x if x <= rollouts else None
            found = before[0] + (x - before[0]) * (level - before[1]) / (y - before[1])
            return found if found <= rollouts else None
        before = (x, y)
    return None


def collapse(run: RunLog, rollouts: float, settings: Settings) -> list[str]:
    """Why the run counts as collapsed, in words; nothing: it does not."""
    end, start = value_at(run.sampled, rollouts), run.sampled[0][1] if run.sampled else None
    if end is None or start is None:
        return []
    found = []
    if end < start:
        found.append(f"sampled accuracy ended at {end:.3f}, below its start at {start:.3f}")
    best = max([y for x, y in run.sampled if x <= rollouts] + [end])
    if end < settings.share_of_best * best:
        found.append(f"sampled accuracy ended at {end:.3f}, below {settings.share_of_best:g} of its best ({best:.3f})")
    entropy = _last(run, "actor/entropy", rollouts, settings.last_steps)
    if entropy is not None and entropy < settings.entropy and end < MOSTLY:
        found.append(f"entropy ended at {entropy:.2g} nats a token with sampled accuracy {end:.3f}")
    return found


def measured(run: RunLog, rollouts: float, level: float | None, settings: Settings) -> dict[str, float | None]:
    """The run's numbers at ``rollouts`` sampled responses; None: not measured, or the level was not reached."""
    stages = [math.fsum(value for _, value in series(run.rows, stage)) for stage in _STAGES]
    share = f"adv/{settings.stream}/share"
    return {
        "sampled": value_at(run.sampled, rollouts),
        "greedy": value_at(run.greedy, rollouts),
        "area": area(run.sampled, rollouts),
        "rollouts_to_level": None if level is None else reaches(run.sampled, level, rollouts),
        **{name: _quality(run, kind, rollouts, settings) for name, kind in _QUALITY.items()},
        "share": _last(run, share, rollouts, settings.last_steps),
        "collapsed": float(bool(collapse(run, rollouts, settings))),
        "seconds": math.fsum(stages),
    }


def _quality(run: RunLog, kind: str, rollouts: float, settings: Settings) -> float | None:
    """Of the stream's own source where several are measured, else of the one that is."""
    of_stream = kind.replace("prm/", f"prm/{settings.stream}/", 1)
    own = _last(run, of_stream, rollouts, settings.last_steps)
    return _last(run, kind, rollouts, settings.last_steps) if own is None else own


def _last(run: RunLog, name: str, rollouts: float, count: int) -> float | None:
    """Mean of the metric over the last ``count`` training steps up to ``rollouts``; None where it was not logged."""
    steps = [row for row in run.rows if row.get(ROLLOUTS) is not None and row[ROLLOUTS] <= rollouts][-count:]
    values = [value for _, value in series(steps, name)]
    return math.fsum(values) / len(values) if values else None
