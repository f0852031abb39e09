"""Which prompts count towards a step at all, decided before any PRM sees them."""

from __future__ import annotations

from collections.abc import Sequence

from rlprm.errors import ConfigError
from rlprm.roles import Verified


def everything(group: Sequence[Verified]) -> bool:
    """Every group with at least one verdict counts."""
    return any(item.verdict.outcome is not None for item in group)


def accuracy_band(group: Sequence[Verified], *, low: float, high: float) -> bool:
    """``low <= mean outcome <= high`` over the responses that were judged; False when none was.

    Source: PRIME's online prompt filter (arXiv:2502.01456, section 3). The authors' code includes both bounds, their
    algorithm picture excludes them; with 0/1 outcomes and four responses both drop just the all-right and all-wrong.

    Raises:
        ConfigError: bounds that no prompt could meet.
    """
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"the accuracy band is {low} to {high}; expected 0 <= low <= high <= 1")
    outcomes = [item.verdict.outcome for item in group if item.verdict.outcome is not None]
    return bool(outcomes) and low <= sum(outcomes) / len(outcomes) <= high
