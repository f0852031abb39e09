"""The end of a run on one screen: what it learnt, what its PRM knew, where the time went, where to look next."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlprm.report.runs import Row, mean_of_last, read_metrics, series
from rlprm.run.progress import duration

LAST_STEPS = 10
_ACCURACY = re.compile(r"val-core/(?P<source>.+)/accuracy/(?P<kind>greedy|mean@\d+)")
# What the PRM reached, and the same number for the surprise of the initial model (None: it has none).
_QUALITY = [
    ("AUC of responses", "prm/auc_fresh", "prm/auc_surprisal"),
    ("AUC of steps", "prm/step_auc", "prm/step_auc_surprisal"),
    ("first wrong step found", "prm/first_wrong_hit", "prm/first_wrong_hit_surprisal"),
    ("pair accuracy within groups", "prm/pair_acc_fresh", "prm/pair_acc_surprisal"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One accuracy at the first and at the last evaluation."""

    source: str
    kind: str  # "greedy" or "mean@N"
    before: float
    before_step: int
    after: float
    after_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One measure of the PRM, mean of the last steps, beside the surprisal baseline where it was logged."""

    name: str
    prm: float
    surprisal: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What ``summarise`` found; empty lists where the run logged nothing of the kind."""

    folder: Path
    steps: int
    accuracy: list[Change]
    quality: list[Quality]
    seconds: list[tuple[str, float]]  # stage, sum over all steps, longest first
    total_seconds: float


def summarise(folder: Path) -> Summary:
    """Read a run's ``metrics.jsonl``.

    Raises:
        DataError: the folder holds no metrics.
    """
    rows = read_metrics(folder)
    stages = _seconds(rows)
    total = sum((seconds for name, seconds in stages if name == "step"), 0.0)
    return Summary(
        folder=folder,
        steps=max((row["step"] for row in rows), default=0),
        accuracy=_accuracy(rows),
        quality=_quality(rows),
        seconds=[(name, seconds) for name, seconds in stages if name != "step"],
        total_seconds=total,
    )


def print_summary(folder: Path, console: Console | None = None) -> Summary:
    """Print the summary of the run in ``folder`` and return it.

    Raises:
        DataError: the folder holds no metrics.
    """
    summary = summarise(folder)
    out = Console() if console is None else console
    out.print()
    if summary.accuracy:
        _print_table(out, "Accuracy on held-out prompts", _accuracy_table(summary.accuracy))
    else:
        out.print("No evaluation was logged, so no accuracy can be given (evaluation.every).")
    if summary.quality:
        title = f"PRM on fresh rollouts, before it learns from them (mean of the last {LAST_STEPS} steps)"
        _print_table(out, title, _quality_table(summary.quality))
    if summary.seconds:
        title = f"Where the time of {summary.steps} steps went ({duration(summary.total_seconds)} in all)"
        _print_table(out, title, _time_table(summary))
    # No wrapping and no markup: paths are there to be copied.
    for line in _whereabouts(summary):
        out.print(line, soft_wrap=True, markup=False, highlight=False)
    return summary


def _accuracy(rows: Sequence[Row]) -> list[Change]:
    names = dict.fromkeys(name for row in rows for name in row if _ACCURACY.fullmatch(name))
    changes = []
    for name in names:
        match, points = _ACCURACY.fullmatch(name), series(rows, name)
        if match is None or not points:
            continue
        (before_step, before), (after_step, after) = points[0], points[-1]
        changes.append(
            Change(
                source=match["source"],
                kind=match["kind"],
                before=before,
                before_step=before_step,
                after=after,
                after_step=after_step,
            )
        )
    return sorted(changes, key=lambda change: (change.source, change.kind))


def _quality(rows: Sequence[Row]) -> list[Quality]:
    found = [
        (label, mean_of_last(rows, prm, LAST_STEPS), mean_of_last(rows, base, LAST_STEPS))
        for label, prm, base in _QUALITY
    ]
    return [Quality(name=label, prm=prm, surprisal=base) for label, prm, base in found if prm is not None]


def _seconds(rows: Sequence[Row]) -> list[tuple[str, float]]:
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("timing_s/"))
    sums = [(name.partition("/")[2], sum(value for _, value in series(rows, name))) for name in names]
    return sorted(sums, key=lambda stage: -stage[1])


def _print_table(out: Console, title: str, table: Table) -> None:
    # A title of rich's own is broken to the width of its table, so no part of it could be searched for in a log.
    out.print(title, style="bold", soft_wrap=True, highlight=False)
    out.print(table)


def _accuracy_table(changes: Sequence[Change]) -> Table:
    out = Table()
    for column in ("source", "decoding", "before", "after", "change"):
        out.add_column(column, justify="left" if column in ("source", "decoding") else "right")
    for change in changes:
        decoding = "greedy" if change.kind == "greedy" else f"sampled ({change.kind})"
        once = change.after_step == change.before_step
        gain = "evaluated once" if once else f"{100 * (change.after - change.before):+.1f} points"
        before = f"{change.before:.1%} (step {change.before_step})"
        out.add_row(change.source, decoding, before, f"{change.after:.1%} (step {change.after_step})", gain)
    return out


def _quality_table(quality: Sequence[Quality]) -> Table:
    out = Table()
    out.add_column("measure")
    for column in ("PRM", "surprisal -log pi_ref", "difference"):
        out.add_column(column, justify="right")
    for item in quality:
        base = "not logged" if item.surprisal is None else f"{item.surprisal:.3f}"
        gap = "" if item.surprisal is None else f"{item.prm - item.surprisal:+.3f}"
        out.add_row(item.name, f"{item.prm:.3f}", base, gap)
    return out


def _time_table(summary: Summary) -> Table:
    out = Table()
    out.add_column("stage")
    for column in ("seconds", "share of the steps"):
        out.add_column(column, justify="right")
    for name, seconds in summary.seconds:
        share = f"{seconds / summary.total_seconds:.0%}" if summary.total_seconds > 0 else ""
        out.add_row(name, f"{seconds:.1f}", share)
    return out


def _whereabouts(summary: Summary) -> list[str]:
    folder = summary.folder
    lines = [f"Run folder:      {folder}", f"Metrics:         {folder / 'metrics.jsonl'}"]
    if (folder / "rollouts.jsonl").exists():
        lines.append(f"Rollouts:        {folder / 'rollouts.jsonl'}")
    if (folder / "tensorboard").is_dir():
        lines.append(f"TensorBoard:     .venv/bin/tensorboard --logdir {folder / 'tensorboard'}")
    for offline in sorted((folder / "wandb").glob("offline-run-*")):
        lines.append(f"Weights & Biases: .venv/bin/wandb sync {offline}")
    return lines
