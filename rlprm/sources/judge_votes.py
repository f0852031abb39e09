"""Several independent critiques of one response, and the rules that make one verdict of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Rule = Literal["intersection", "majority", "union", "average", "single"]
RULES: tuple[Rule, ...] = get_args(Rule)
COUNTING: tuple[Rule, ...] = ("intersection", "majority", "union")  # they count votes for "wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """What one reading of a response says, each entry in [0, 1] (1: right); None: it says nothing about that."""

    steps: tuple[float | None, ...]
    verdict: float | None


def merged(votes: Sequence[float], rule: Rule) -> float | None:
    """One value from the votes that there are; None if there is none: a judge that fails is not a wrong step.

    Of ``k`` votes, ``w`` of them for wrong (CAPO, arXiv:2508.02298)::

        intersection  wrong iff w = k         majority  wrong iff w >= k / 2       union  wrong iff w >= 1
        average       the mean of the votes   single    the one vote

    ``k`` counts the votes that could be read, not those that were asked for.

    >>> [merged([1.0, 0.0, 0.0, 1.0], rule) for rule in ("intersection", "majority", "union", "average")]
    [1.0, 0.0, 0.0, 0.5]
    >>> merged([], "majority") is None
    True
    """
    if not votes:
        return None
    if rule == "single":
        return votes[0]
    if rule == "average":
        return sum(votes) / len(votes)
    wrong = sum(vote < 0.5 for vote in votes)
    needed = {"intersection": float(len(votes)), "majority": len(votes) / 2, "union": 1.0}[rule]
    return 0.0 if wrong >= needed else 1.0


def disagreement(votes: Sequence[float]) -> float | None:
    """Largest minus smallest vote; None with fewer than two. Of yes-or-no votes: 1 unless they are unanimous.

    >>> disagreement([1.0, 1.0, 0.0]), disagreement([0.25, 0.75]), disagreement([1.0])
    (1.0, 0.5, None)
    """
    return max(votes) - min(votes) if len(votes) > 1 else None
