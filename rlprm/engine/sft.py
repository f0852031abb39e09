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


class Shuffled:
    """The endless, seeded order of ``count`` examples: a fresh permutation for each pass over them.

    >>> order = Shuffled(3, seed=0)
    >>> sorted(order[place] for place in (3, 4, 5))
    [0, 1, 2]
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._pass = -1
        self._order: list[int] = []

    def __getitem__(self, place: int) -> int:
        """The example at ``place``; asking in order is cheap."""
        number, index = divmod(place, self._count)
        if self._pass != number:
            self._order = list(range(self._count))
            random.Random(f"sft/{self._seed}/{number}").shuffle(self._order)
            self._pass = number
        return self._order[index]


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
        self._order = Shuffled(len(examples), seed)
        self._batch_size = batch_size
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
        places = range(first + self._rank, first + self._batch_size, self._world_size)
        members = [self._examples[self._order[place]] for place in places]
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
