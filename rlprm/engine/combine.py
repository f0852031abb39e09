"""Measurements of several optimizer steps, ready to be merged over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlprm.core.metrics import Max, Mean, Metric, Min, Sum, merged, numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one rank measured: ``partial`` merges over ranks, ``agreed`` is the same number on every rank."""

    partial: Mapping[str, Metric]
    agreed: Mapping[str, float]

    def __or__(self, other: Measured) -> Measured:
        return Measured(partial={**self.partial, **other.partial}, agreed={**self.agreed, **other.agreed})


def agreed(**metrics: float) -> Measured:
    return Measured(partial={}, agreed=metrics)


def combined(updates: Sequence[Mapping[str, Metric | float]], *, prefix: str) -> Measured:
    """Several optimizer steps as one: means and extremes merge, losses (sums) and agreed numbers are averaged.

    >>> combined([{"pg_loss": Sum(1.0), "lr": 0.1}, {"pg_loss": Sum(3.0), "lr": 0.1}], prefix="actor/").partial
    {'actor/pg_loss': Sum(total=2.0)}
    """
    partial = merged(
        {f"{prefix}{name}": value for name, value in update.items() if isinstance(value, (Mean, Sum, Max, Min))}
        for update in updates
    )
    # a loss is summed over ranks and micro-batches, never over optimizer steps
    partial |= {name: Sum(value.total / len(updates)) for name, value in partial.items() if isinstance(value, Sum)}
    numbers_: dict[str, list[float]] = {}
    for update in updates:
        for name, value in update.items():
            if isinstance(value, float):
                numbers_.setdefault(f"{prefix}{name}", []).append(value)
    return Measured(partial=partial, agreed={name: sum(each) / len(each) for name, each in numbers_.items()})


def global_numbers(ranks: Sequence[Measured]) -> dict[str, float]:
    """One number per name from what all ranks measured.

    >>> one = Measured(partial={"a": Mean(1.0, 1.0)}, agreed={"b": 2.0})
    >>> global_numbers([one, Measured(partial={"a": Mean(0.0, 3.0)}, agreed={"b": 2.0})])
    {'b': 2.0, 'a': 0.25}
    """
    return {**ranks[0].agreed, **numbers(merged(rank.partial for rank in ranks))}
