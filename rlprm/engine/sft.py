"""Supervised fine-tuning on one rank: the policy's learner with a cross-entropy loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlprm.batch import jagged_texts
from rlprm.core.metrics import Sum
from rlprm.core.policy_loss import Denominators
from rlprm.engine.combine import Measured, combined
from rlprm.engine.learner import Learner, Outputs
from rlprm.engine.offline import Offline, Turns
from rlprm.records import MicroBatch

Example = tuple[tuple[int, ...], tuple[int, ...]]  # prompt and response tokens, EOS included


class Supervised(Offline):
    """``-mean log pi(response token)`` over seeded mini-batches; every example once per pass over the data."""

    name = "policy"

    def __init__(self, learner: Learner, examples: Sequence[Example], turns: Turns) -> None:
        super().__init__(learner, len(examples), turns)
        self._examples = examples

    def advance(self, steps: int) -> Measured:
        """Take ``steps`` optimizer steps."""
        return combined([self._step() for _ in range(steps)], prefix="sft/")

    def _step(self) -> dict[str, Any]:
        members = [self._examples[index] for index in self._next()]
        shard = jagged_texts(members)
        denominators = Denominators.count(shard.lengths - shard.prompt_lengths, self._turns.reduce)
        prepared = self._micros(shard, torch.arange(len(members)), {}, {})
        return self._learner.update(prepared, partial(cross_entropy, denominators))


def cross_entropy(denominators: Denominators, micro: MicroBatch, outputs: Outputs) -> tuple[Tensor, dict[str, Any]]:
    """``-sum log pi / tokens``, tokens counted over the whole optimizer step."""
    assert outputs.logprobs is not None
    loss = -outputs.logprobs[micro.response_mask].sum() / denominators.tokens
    return loss, {"loss": Sum(float(loss.detach()))}
