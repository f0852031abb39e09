"""What a judge's source asks of whoever replies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rlprm.sources.judge_prompts import Question, Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question, and a seed for each reply that is wanted."""

    question: Question
    seeds: tuple[int, ...]
    temperature: float
    max_tokens: int


@runtime_checkable
class Client(Protocol):
    """Replies in the order of what was asked, one a seed; None: no reply. One that was cut is a reply without text."""

    def replies(self, asked: Sequence[Asked]) -> list[list[Reply | None]]: ...

    def close(self) -> None: ...


def preference(first: float, second: float) -> float:
    """``P(first) / (P(first) + P(second))`` from two log-probs.

    >>> import math
    >>> round(preference(math.log(0.6), math.log(0.2)), 6)
    0.75
    """
    difference = second - first
    return 1.0 / (1.0 + math.exp(difference)) if difference < 700 else 0.0
