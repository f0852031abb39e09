"""Learning rates by hand."""

from __future__ import annotations

import math

import pytest

from rlprm.engine.schedule import ScheduleKind, learning_rate
from rlprm.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # warm-up of 2: 1/2, 2/2; then 4 steps of decay at x = 0, 1/4, 1/2, 3/4, and x = 1 from step 6 on
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0, 0]),
    ],
)
def test_schedules(kind: ScheduleKind, expected: list[float]) -> None:
    found = [learning_rate(k, peak=2e-3, kind=kind, warmup=2, total=6) for k in range(8)]
    assert found == pytest.approx([2e-3 * x for x in expected], abs=1e-12)


def test_no_warmup_starts_at_the_peak_and_constant_needs_no_end() -> None:
    assert learning_rate(0, peak=1.0, kind="constant", warmup=0, total=None) == 1.0
    assert learning_rate(0, peak=1.0, kind="cosine", warmup=0, total=1) == 1.0


@pytest.mark.parametrize(("warmup", "total"), [(0, None), (5, 5), (5, 3)])
def test_a_decay_without_room_is_refused(warmup: int, total: int | None) -> None:
    with pytest.raises(ConfigError, match="needs a total larger than the warm-up"):
        learning_rate(0, peak=1.0, kind="linear", warmup=warmup, total=total)


def test_a_negative_warmup_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup is -1"):
        learning_rate(0, peak=1.0, kind="constant", warmup=-1, total=None)
