"""Which rollouts of the accepted groups train the policy: ``select(rows) -> keep this row``, one answer per row."""

from __future__ import annotations

from collections.abc import Sequence

from rlprm.batch import Row


def everything(rows: Sequence[Row]) -> list[bool]:
    """Every accepted rollout."""
    return [row.train for row in rows]


def finished(rows: Sequence[Row]) -> list[bool]:
    """Accepted rollouts that ended by themselves; those cut by the length limit are left out (and counted)."""
    return [row.train and row.finish != "length" for row in rows]
