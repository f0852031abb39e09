"""Which prompts count towards a step at all, decided before any PRM sees them."""

from __future__ import annotations

from collections.abc import Sequence

from rlprm.errors import ConfigError
from rlprm.roles import Verified

TIE = 1e-6  # outcomes closer than this are equal, as in every group statistic (rlprm.core.groups)


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


def mixed(group: Sequence[Verified]) -> bool:
    """Some two judged responses have different outcomes; False when none or one was judged.

    Source: DAPO's dynamic sampling (arXiv:2503.14476), which keeps prompts whose outcomes have a standard deviation
    above 0. It looks at the verifier's outcome, never at shaped rewards. With 0/1 outcomes an accuracy band says the
    same; of graded outcomes (all one half: a mean in the middle, and nothing to compare) only this rule does. Differs
    from the authors: they sample three times the prompts at once, here each round asks for what is missing.
    """
    outcomes = [item.verdict.outcome for item in group if item.verdict.outcome is not None]
    return bool(outcomes) and max(outcomes) - min(outcomes) > TIE
