"""Measurements that merge without bias across micro-batches and ranks, and the check of their names.

A mean of means is wrong as soon as the parts differ in size, so what travels is the sum and the count.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from functools import reduce as fold

from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.metric_table import METRICS, MetricSpec
from rlprm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Mean:
    """``total / count``; None when nothing was counted.

    >>> Mean(3.0, 1.0).merge(Mean(0.0, 2.0)).value
    1.0
    """

    total: float
    count: float

    @classmethod
    def of(cls, values: Float[Tensor, "*shape"], where: Bool[Tensor, "*shape"] | None = None) -> Mean:
        """The mean of the entries (that are True in ``where``); others are not read."""
        chosen = (values if where is None else values[where]).detach().double()
        return cls(float(chosen.sum()), float(chosen.numel()))

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass(frozen=True, slots=True)
class Sum:
    """A total over micro-batches and ranks: counts, and losses whose denominators are global already."""

    total: float

    def merge(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    @property
    def value(self) -> float | None:
        return self.total


@dataclass(frozen=True, slots=True)
class Max:
    """The largest; None when there was nothing.

    >>> Max(3.0).merge(Max(None)).value
    3.0
    """

    largest: float | None

    @classmethod
    def of(cls, values: Float[Tensor, "*shape"], where: Bool[Tensor, "*shape"] | None = None) -> Max:
        """The largest of the entries (that are True in ``where``)."""
        chosen = values if where is None else values[where]
        return cls(float(chosen.detach().amax()) if chosen.numel() else None)

    def merge(self, other: Max) -> Max:
        known = [each for each in (self.largest, other.largest) if each is not None]
        return Max(max(known) if known else None)

    @property
    def value(self) -> float | None:
        return self.largest


@dataclass(frozen=True, slots=True)
class Min:
    """The smallest; None when there was nothing.

    >>> Min(3.0).merge(Min(2.0)).value
    2.0
    """

    smallest: float | None

    @classmethod
    def of(cls, values: Float[Tensor, "*shape"], where: Bool[Tensor, "*shape"] | None = None) -> Min:
        """The smallest of the entries (that are True in ``where``)."""
        chosen = values if where is None else values[where]
        return cls(float(chosen.detach().amin()) if chosen.numel() else None)

    def merge(self, other: Min) -> Min:
        known = [each for each in (self.smallest, other.smallest) if each is not None]
        return Min(min(known) if known else None)

    @property
    def value(self) -> float | None:
        return self.smallest


Metric = Mean | Sum | Max | Min


def merged(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """The measurements of several micro-batches or ranks as one; a name may be missing from some of them.

    >>> merged([{"a": Sum(1.0)}, {"a": Sum(2.0), "b": Max(1.0)}])
    {'a': Sum(total=3.0), 'b': Max(largest=1.0)}

    Raises:
        ConfigError: one name measured in two ways.
    """

    def join(left: dict[str, Metric], right: Mapping[str, Metric]) -> dict[str, Metric]:
        for name, metric in right.items():
            if name in left and type(left[name]) is not type(metric):
                raise ConfigError(
                    f"metric {name} is a {type(left[name]).__name__} and a {type(metric).__name__}; "
                    "measure it in one way"
                )
            left[name] = left[name].merge(metric) if name in left else metric  # type: ignore[arg-type]
        return left

    return fold(join, parts, {})


def numbers(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The values that exist: a mean of nothing is not 0, it is left out.

    >>> numbers({"a": Mean(1.0, 2.0), "b": Mean(0.0, 0.0)})
    {'a': 0.5}
    """
    return {name: metric.value for name, metric in metrics.items() if metric.value is not None}


def check_name(name: str) -> MetricSpec:
    """The table's entry for a metric name.

    >>> check_name("adv/outcome/share").unit
    '1'
    >>> check_name("actor/entropi")
    Traceback (most recent call last):
    rlprm.errors.ConfigError: metric 'actor/entropi' is not in the table; the nearest name is 'actor/entropy'

    Raises:
        ConfigError: a name that the table does not list, with the nearest that it does.
    """
    for pattern, spec in _patterns():
        if pattern.fullmatch(name):
            return spec
    nearest = difflib.get_close_matches(name, [spec.name for spec in METRICS], n=1, cutoff=0.0)[0]
    raise ConfigError(f"metric {name!r} is not in the table; the nearest name is {nearest!r}")


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], MetricSpec], ...]:
    def pattern(name: str) -> re.Pattern[str]:
        pieces = re.split(r"(\{\w+\})", name)
        return re.compile(
            "".join(_FORMS.get(piece, _WORD) if piece[:1] == "{" else re.escape(piece) for piece in pieces)
        )

    return tuple((pattern(spec.name), spec) for spec in METRICS)


_WORD = r"[A-Za-z0-9_.\-]+"
_FORMS = {"{n}": r"\d+"}
