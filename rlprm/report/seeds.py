"""Several seeds, one table and one plot: mean, spread and t intervals; differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from rlprm.errors import DataError
from rlprm.report.runs import mean_of_last, read_metrics, series

Runs = Mapping[str, Mapping[int, Path]]  # method -> seed -> run folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Mean over seeds, sample standard deviation, and a t interval for the mean; one seed has a mean only."""

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    count: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.4g} (one seed: no interval)"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """mean ± t(1 - (1 - confidence)/2, n - 1) · sd / sqrt(n); Student's t, because seeds are few.

    >>> found = interval([1.0, 2.0, 3.0])
    >>> found.mean, found.sd, round(found.high, 4)      # t = 4.3027 at 2 degrees of freedom, 2 + 4.3027 / sqrt(3)
    (2.0, 1.0, 4.4841)

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("found no value; expected one per seed")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean=mean, sd=None, low=None, high=None, count=1)
    sd = float(np.std(np.asarray(values, dtype=np.float64), ddof=1))
    half = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1)) * sd / math.sqrt(len(values))
    return Interval(mean=mean, sd=sd, low=mean - half, high=mean + half, count=len(values))


def paired(first: Mapping[int, float], second: Mapping[int, float], confidence: float = 0.95) -> Interval:
    """Interval of ``first - second`` over the seeds that both have: what a seed adds to both cancels.

    Raises:
        ValueError: no seed is in both.
    """
    common = sorted(set(first) & set(second))
    if not common:
        raise ValueError(
            f"found no seed in both ({sorted(first)} and {sorted(second)}); run both methods on the same seeds"
        )
    return interval([first[seed] - second[seed] for seed in common], confidence)


def final_values(runs: Mapping[int, Path], metric: str, last: int = 1) -> dict[int, float]:
    """Per seed the mean of the last ``last`` logged values of ``metric``.

    Raises:
        DataError: a run never logged it.
    """
    found = {}
    for seed, folder in runs.items():
        value = mean_of_last(read_metrics(folder), metric, last)
        if value is None:
            raise DataError(f"{folder} has no value of {metric!r}; expected a metric that every run logs")
        found[seed] = value
    return found


def table(runs: Runs, metrics: Sequence[str], *, last: int = 1, confidence: float = 0.95) -> str:
    """A Markdown table, one row per metric and method, and the paired difference of every two methods.

    Raises:
        DataError: a run is missing or never logged a metric.
    """
    percent = f"{confidence:.0%}"
    lines = [f"| metric | method | seeds | mean | sd | {percent} t interval |", "|---|---|---|---|---|---|"]
    differences = [
        f"| metric | difference | seeds in both | mean | {percent} paired t interval |",
        "|---|---|---|---|---|",
    ]
    for metric in metrics:
        values = {method: final_values(seeds, metric, last) for method, seeds in runs.items()}
        for method, by_seed in values.items():
            found = interval(list(by_seed.values()), confidence)
            sd = "" if found.sd is None else f"{found.sd:.4g}"
            lines.append(f"| {metric} | {method} | {found.count} | {found.mean:.4g} | {sd} | {_bounds(found)} |")
        methods = list(values)
        for position, first in enumerate(methods):
            for second in methods[position + 1 :]:
                name = f"{first} - {second}"
                if not set(values[first]) & set(values[second]):
                    differences.append(f"| {metric} | {name} | 0 | | no seed in both: no difference can be given |")
                    continue
                gap = paired(values[first], values[second], confidence)
                differences.append(f"| {metric} | {name} | {gap.count} | {gap.mean:+.4g} | {_bounds(gap)} |")
    if len(differences) > 2:
        lines += ["", *differences]
    return "\n".join(lines) + "\n"


def plot(runs: Runs, metric: str, path: Path, *, confidence: float = 0.95) -> list[Path]:
    """Curve of ``metric`` over steps: mean over seeds, t band where at least two have the step. Writes PNG and SVG.

    Raises:
        DataError: no run logged it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure without pyplot: no window system is looked for and no global state is left behind.
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for method, seeds in runs.items():
        steps, bands = _bands(seeds, metric, confidence)
        if not steps:
            raise DataError(f"no run of {method} has a value of {metric!r}; expected a metric that the runs log")
        count = len(seeds)
        label = f"{method} ({count} seeds)" if count > 1 else f"{method} (one seed: no interval)"
        (line,) = axes.plot(steps, [band.mean for band in bands], label=label, marker="o" if len(steps) == 1 else None)
        low = [band.mean if band.low is None else band.low for band in bands]
        high = [band.mean if band.high is None else band.high for band in bands]
        axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    for file in written:
        figure.savefig(file, dpi=150)
    return written


def report_seeds(runs: Runs, metrics: Sequence[str], folder: Path, *, last: int = 1, confidence: float = 0.95) -> str:
    """Write ``seeds.md`` and one plot per metric into ``folder``; return the Markdown.

    Raises:
        DataError: a run is missing or never logged a metric.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = table(runs, metrics, last=last, confidence=confidence)
    for metric in metrics:
        plot(runs, metric, folder / metric.replace("/", "_").replace("@", "_at_"), confidence=confidence)
    (folder / "seeds.md").write_text(text, encoding="utf-8")
    return text


def _bands(seeds: Mapping[int, Path], metric: str, confidence: float) -> tuple[list[int], list[Interval]]:
    by_step: dict[int, list[float]] = {}
    for folder in seeds.values():
        for step, value in series(read_metrics(folder), metric):
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    return steps, [interval(by_step[step], confidence) for step in steps]


def _bounds(found: Interval) -> str:
    if found.low is None or found.high is None:
        return "one seed: no interval can be given"
    return f"[{found.low:.4g}, {found.high:.4g}]"
