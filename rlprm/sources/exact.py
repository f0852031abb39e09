"""Exact step labels as a process source: the credit that a perfect PRM would give, on tasks that can be checked."""

from __future__ import annotations

from typing import Any

import torch

from rlprm.core.implicit import Granularity
from rlprm.core.steps import step_ends
from rlprm.errors import ConfigError
from rlprm.records import Stream
from rlprm.sources.base import ProcessSource, Scorable, Scores, SourceContext


class ExactSteps(ProcessSource):
    """``wrong`` at the last token of each step whose own label is 0, ``right`` where it is 1, absent where unknown.

    The oracle of the embedded task: the ceiling that learnt process rewards are compared with. It learns nothing, keeps
    no state and measures nothing, because it is right by definition.
    """

    pays_steps = True

    def __init__(self, context: SourceContext, *, wrong: float, right: float) -> None:
        self.name = context.name
        self._reduce = context.reduce
        self._wrong = wrong
        self._right = right

    @classmethod
    def granularity(cls, **settings: Any) -> Granularity:
        return "step"

    def score(self, given: Scorable) -> Scores:
        """One reward a labelled step; no measurements.

        Raises:
            ConfigError: the verifier gives no step labels.
        """
        padded = given.padded
        present = step_ends(padded.step_index) & (padded.step_label >= 0)
        if not bool(self._reduce.max(present.any().double())):  # of all ranks: one may have no labelled row by chance
            raise ConfigError(
                "the verifier gave no step labels, so exact steps have nothing to pay; use a task whose verifier checks "
                "each step (chain_arithmetic), or another source"
            )
        rewards = torch.where(padded.step_label == 1, self._right, self._wrong)
        return Scores.of(Stream(rewards=torch.where(present, rewards, torch.zeros_like(rewards)), present=present))
