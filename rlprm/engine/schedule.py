"""Learning-rate schedules as pure functions of the optimizer step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal

from rlprm.errors import ConfigError

ScheduleKind = Literal["constant", "linear", "cosine"]


def learning_rate(step: int, *, peak: float, kind: ScheduleKind, warmup: int, total: int | None) -> float:
    """``peak * min(1, (step + 1) / warmup) * decay(x)`` with ``x = (step - warmup) / (total - warmup)``.

    ``step`` counts optimizer steps already taken (the first one runs at ``step`` 0, never with a rate of 0), ``decay``
    is 1 (constant), ``1 - x`` (linear) or ``(1 + cos(pi x)) / 2`` (cosine), and 0 from ``total`` on.

    >>> [round(learning_rate(k, peak=1.0, kind="linear", warmup=2, total=6), 3) for k in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]

    Raises:
        ConfigError: a decaying schedule that does not know its end, or ends within its warm-up.
    """
    check(kind=kind, warmup=warmup, total=total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "constant" or total is None:
        return peak
    done = min(1.0, (step - warmup) / (total - warmup))
    return peak * (1 - done if kind == "linear" else (1 + math.cos(math.pi * done)) / 2)


def check(*, kind: ScheduleKind, warmup: int, total: int | None) -> None:
    """Raise at start-up what :func:`learning_rate` could not compute later."""
    if kind not in ("constant", "linear", "cosine"):
        raise ConfigError(f"schedule is {kind!r}; expected constant, linear or cosine")
    if warmup < 0:
        raise ConfigError(f"warmup is {warmup}; expected 0 or more optimizer steps")
    if kind != "constant" and (total is None or total <= warmup):
        raise ConfigError(
            f"schedule {kind} has warmup {warmup} and {total} optimizer steps in all; "
            "it needs a total larger than the warm-up: set steps, or use schedule=constant"
        )
