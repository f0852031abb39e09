"""One method against another over seeds: paired differences, their intervals, and p values for many comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from rlprm.report.seeds import interval, paired

BOOTSTRAP_SEEDS = 5  # fewer differences than this have too few different resamples
ROUNDING = 1e-9  # a spread of this share of the mean difference is floating point, not chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A cell minus the baseline, over the seeds that both have."""

    mean: float
    low: float | None  # paired t interval; None with one seed
    high: float | None
    count: int
    p: float | None  # two-sided paired t test; None where the differences do not spread
    p_holm: float | None  # ... adjusted for the number of cells compared on this measure
    bootstrap_low: float | None  # percentile interval; None with fewer than five seeds
    bootstrap_high: float | None


def difference(
    first: Mapping[int, float], second: Mapping[int, float], confidence: float, resamples: int
) -> Difference | None:
    """``first - second`` paired by seed; None where no seed is in both. ``p_holm`` is filled in by :func:`holm`."""
    common = sorted(set(first) & set(second))
    if not common:
        return None
    gaps = [first[seed] - second[seed] for seed in common]
    found = paired(first, second, confidence)
    low, high = bootstrap(gaps, confidence, resamples)
    return Difference(
        mean=found.mean,
        low=found.low,
        high=found.high,
        count=found.count,
        p=p_value(gaps),
        p_holm=None,
        bootstrap_low=low,
        bootstrap_high=high,
    )


def p_value(gaps: Sequence[float]) -> float | None:
    """Two-sided p of Student's t test that the mean of paired differences is 0; None for fewer than two.

    None too where all differences are the same and not 0: two seeds that happen to agree would give p = 0.

    >>> round(p_value([1.0, 2.0, 3.0]), 4)      # t = 2 / (1 / sqrt(3)) = 3.4641 at 2 degrees of freedom
    0.0742
    """
    found = interval(gaps)
    if found.sd is None:
        return None
    if found.sd <= ROUNDING * abs(found.mean):
        return 1.0 if found.mean == 0 else None
    return float(2 * stats.t.sf(abs(found.mean) / (found.sd / math.sqrt(found.count)), found.count - 1))


def bootstrap(gaps: Sequence[float], confidence: float, resamples: int) -> tuple[float | None, float | None]:
    """Percentile interval of the mean of differences drawn with replacement; from five on, and with a fixed seed."""
    if len(gaps) < BOOTSTRAP_SEEDS:
        return None, None
    values = np.asarray(gaps, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: the k-th smallest of m is at least ``(m - k + 1) p_k``, and no smaller than the last.

    >>> {name: round(p, 3) for name, p in holm({"a": 0.01, "b": 0.04, "c": 0.03}).items()}
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = min(1.0, max(largest, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return adjusted
