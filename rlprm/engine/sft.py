"""Supervised fine-tuning on one rank: the policy's learner with a cross-entropy loss."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlprm.batch import jagged_texts
from rlprm.core.metrics import Sum
from rlprm.core.packing import Layout
from rlprm.core.policy_loss import Denominators
from rlprm.engine.batching import micros
from rlprm.engine.combine import Measured, combined
from rlprm.engine.learner import Learner, Outputs
from rlprm.records import MicroBatch
from rlprm.roles import Reduce

Example = tuple[tuple[int, ...], tuple[int, ...]]  # prompt and response tokens, EOS included


class Supervised:
    """``-mean log pi(response token)`` over seeded mini-batches; every example once per pass over the data."""

    name = "policy"
    stateful = True
    exportable = True

    def __init__(
        self,
        learner: Learner,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seed: int,
        token_budget: int,
        layout: Layout,
        rank: int,
        world_size: int,
        reduce: Reduce,
        tokenizer_path: str,
    ) -> None:
        self._learner = learner
        self._examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self._token_budget = token_budget
        self._layout = layout
        self._rank = rank
        self._world_size = world_size
        self._reduce = reduce
        self._tokenizer_path = tokenizer_path

    def advance(self, steps: int) -> Measured:
        """Take ``steps`` optimizer steps."""
        return combined([self._step() for _ in range(steps)], prefix="sft/")

    def _step(self) -> dict[str, Any]:
        first = self._learner.steps * self._batch_size
        members = [self._example(first + offset) for offset in range(self._rank, self._batch_size, self._world_size)]
        shard = jagged_texts(members)
        denominators = Denominators.count(shard.lengths - shard.prompt_lengths, self._reduce)
        prepared = micros(
            shard,
            torch.arange(len(members)),
            token_fields={},
            sequence_fields={},
            token_budget=self._token_budget,
            layout=self._layout,
        )
        return self._learner.update(prepared, partial(cross_entropy, denominators))

    def _example(self, place: int) -> Example:
        """Example number ``place`` of the endless, seeded order: a fresh permutation for each pass."""
        epoch, index = divmod(place, len(self._examples))
        if getattr(self, "_epoch", None) != epoch:
            self._order = list(range(len(self._examples)))
            random.Random(f"sft/{self._seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        return self._examples[self._order[index]]

    def export(self, folder: str) -> str:
        """An ordinary Hugging Face folder."""
        self._learner.export(folder, self._tokenizer_path)
        return folder

    def close(self) -> None:
        self._learner.close()


def cross_entropy(denominators: Denominators, micro: MicroBatch, outputs: Outputs) -> tuple[Tensor, dict[str, Any]]:
    """``-sum log pi / tokens``, tokens counted over the whole optimizer step."""
    assert outputs.logprobs is not None
    loss = -outputs.logprobs[micro.response_mask].sum() / denominators.tokens
    return loss, {"loss": Sum(float(loss.detach()))}
