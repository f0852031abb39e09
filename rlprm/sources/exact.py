"""Exact step labels as a process source: the credit that a perfect PRM would give, on tasks that can be checked."""

from __future__ import annotations

import torch
from torch import Tensor

from rlprm.batch import flatten, pad
from rlprm.core.steps import step_ends
from rlprm.engine.combine import Measured, agreed
from rlprm.engine.distributed import GroupReduce
from rlprm.errors import ConfigError
from rlprm.records import JaggedShard


class ExactSteps:
    """``wrong`` at the last token of each step whose own label is 0, ``right`` where it is 1, absent where unknown.

    The oracle of the embedded task: the ceiling that learnt process rewards are compared with. It learns nothing, keeps
    no state and measures nothing, because it is right by definition.
    """

    stateful = False
    exportable = False

    def __init__(self, *, name: str, wrong: float, right: float) -> None:
        self.name = name
        self._wrong = wrong
        self._right = right

    def score(self, shard: JaggedShard, old: Tensor, ref: Tensor | None) -> tuple[dict[str, Tensor], None]:
        """Flat rewards and presence; no measurements.

        Raises:
            ConfigError: the verifier gives no step labels.
        """
        padded = pad(shard)
        present = step_ends(padded.step_index) & (padded.step_label >= 0)
        if not bool(GroupReduce().max(present.any().double())):  # of all ranks: one may have no labelled row by chance
            raise ConfigError(
                "the verifier gave no step labels, so exact steps have nothing to pay; use a task whose verifier checks "
                "each step (chain_arithmetic), or another source"
            )
        rewards = torch.where(padded.step_label == 1, self._right, self._wrong)
        zero = torch.zeros_like(rewards)
        return {
            "rewards": flatten(torch.where(present, rewards, zero), shard.lengths),
            "present": flatten(present, shard.lengths),
        }, None

    def learn(self, shard: JaggedShard, old: Tensor, ref: Tensor | None) -> Measured:
        return agreed()


def exact_steps(name: str, *, wrong: float, right: float) -> ExactSteps:
    """The source that ``conf/source/exact.yaml`` describes."""
    return ExactSteps(name=name, wrong=wrong, right=right)
