"""Plots of an ablation: a curve per cell with its band, and cells in the order of what they reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlprm.report.ablation_values import Curve, RunLog, value_at
from rlprm.report.seeds import Interval, interval

MANY = 6  # more curves than this are not told apart in one frame
COLUMNS = 4
MARGIN = 0.02  # around 0 and 1


def band(curves: Sequence[Curve], end: float, confidence: float) -> tuple[list[float], list[Interval]]:
    """Mean and t interval over seeds at every count of rollouts that a run was measured at, up to ``end``.

    >>> xs, bands = band([[(0.0, 0.0), (100.0, 1.0)], [(0.0, 0.0), (50.0, 0.5), (100.0, 1.0)]], 100.0, 0.95)
    >>> xs, [one.mean for one in bands]
    ([0.0, 50.0, 100.0], [0.0, 0.5, 1.0])
    """
    places = sorted({x for points in curves for x, _ in points if x < end} | {end})
    found = []
    for place in places:
        values = [value for points in curves if (value := value_at(points, place)) is not None]
        if values:
            found.append((place, interval(values, confidence)))
    return [place for place, _ in found], [one for _, one in found]


def plot_curves(
    curves: Mapping[str, Sequence[Curve]], baseline: str, label: str, end: float, path: Path, confidence: float
) -> list[str]:
    """Curves over rollouts, up to six in one frame; more get a frame each, with the baseline. PNG and SVG."""
    shown = {name: seeds for name, seeds in curves.items() if any(seeds)}
    if not shown or end <= 0:
        return []
    frames = [list(shown)] if len(shown) <= MANY else [[baseline, name] for name in shown if name != baseline]
    if len(frames) > 1 and baseline not in shown:
        frames = [[name] for name in shown]
    columns = min(COLUMNS, len(frames))
    rows = math.ceil(len(frames) / columns)
    size = (7.2, 4.4) if len(frames) == 1 else (3.2 * columns, 2.5 * rows + 0.4)
    figure, axes = _figure(size, rows, columns)
    for frame, axis in zip(frames, axes, strict=False):
        for name in frame:
            seeds = [points for points in shown[name] if points]
            xs, bands = band(seeds, end, confidence)
            grey = len(frames) > 1 and name == baseline
            (line,) = axis.plot(
                xs,
                [one.mean for one in bands],
                label=name if len(seeds) > 1 else f"{name} (one seed: no interval)",
                color="0.5" if grey else None,
                marker=".",
            )
            low = [one.mean if one.low is None else one.low for one in bands]
            high = [one.mean if one.high is None else one.high for one in bands]
            axis.fill_between(xs, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        # what an accuracy can be: with few seeds a t interval is wider than that
        axis.set_ylim(*_within(axis.get_ylim()))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in axes[len(frames) :]:
        axis.set_visible(False)
    figure.supxlabel("sampled rollouts")
    figure.supylabel(label)
    return _save(figure, path)


def plot_ranking(
    found: Mapping[str, Mapping[str, Any] | None], baseline: str, label: str, path: Path, confidence: float
) -> list[str]:
    """Cells by the mean of one measure, best on top, with their t intervals. PNG and SVG."""
    order = sorted(
        ((one["mean"], name, one) for name, one in found.items() if one is not None), key=lambda item: item[:2]
    )
    if not order:
        return []
    figure, (axis,) = _figure((7.2, 1.2 + 0.32 * len(order)), 1, 1)
    for place, (mean, name, one) in enumerate(order):
        color = "0.5" if name == baseline else "C0"
        if one["low"] is not None:
            axis.plot([one["low"], one["high"]], [place, place], color=color, linewidth=2)
        axis.plot([mean], [place], marker="o", color=color)
    for mean, name, _ in order:
        if name == baseline:
            axis.axvline(mean, color="0.5", linewidth=0.8, linestyle="--")
    axis.set_xlim(*_within(axis.get_xlim()))
    axis.set_ylim(-0.6, len(order) - 0.4)
    axis.set_yticks(range(len(order)), [name for _, name, _ in order])
    single = all(one["low"] is None for _, _, one in order)
    axis.set_xlabel(f"{label} ({'one seed: no interval' if single else f'{confidence:.0%} t interval over seeds'})")
    axis.grid(alpha=0.3, axis="x")
    return _save(figure, path)


def plots(found: Mapping[str, Any], logs: Mapping[str, Sequence[RunLog]], folder: Path) -> list[str]:
    """All plots of an ablation into ``folder``; the names of the PNG files, in the order to be shown."""
    confidence, end, baseline = found["settings"]["confidence"], found["rollouts"], found["baseline"]
    written: list[str] = []
    for name, label in (("sampled", "sampled accuracy"), ("greedy", "greedy accuracy")):
        curves = {cell: [getattr(run, name) for run in runs] for cell, runs in logs.items()}
        written += plot_curves(curves, baseline, label, end, folder / f"{name}_curves", confidence)
        values = {cell: numbers["values"][name] for cell, numbers in found["cells"].items()}
        written += plot_ranking(values, baseline, label, folder / f"{name}_ranking", confidence)
    return written


def _figure(size: tuple[float, float], rows: int, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure without pyplot: no window system is looked for and no global state is left behind.
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.ravel(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)))


def _within(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = limits
    return max(low, -MARGIN), min(high, 1 + MARGIN)


def _save(figure: Any, path: Path) -> list[str]:
    for kind in ("png", "svg"):
        figure.savefig(path.with_name(f"{path.name}.{kind}"), dpi=150)
    return [f"{path.name}.png"]
