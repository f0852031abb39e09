"""What learners over a fixed set of examples share: seeded mini-batches dealt to the ranks, micro-batches, export."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rlprm.core.packing import Layout
from rlprm.engine.batching import micros
from rlprm.engine.learner import Learner
from rlprm.records import JaggedShard, MicroBatch
from rlprm.roles import Reduce


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """How examples become optimizer steps, and this rank's place among the ranks."""

    batch_size: int  # examples per optimizer step, over all ranks
    seed: int  # of their order
    token_budget: int
    layout: Layout
    rank: int
    world_size: int
    reduce: Reduce
    tokenizer_path: str  # folder whose tokenizer is exported with the model


class Offline:
    """A learner that goes over ``count`` examples in turns; every example once per pass. All methods are collective."""

    stateful = True
    exportable = True

    def __init__(self, learner: Learner, count: int, turns: Turns) -> None:
        self._learner = learner
        self._turns = turns
        self._order = Shuffled(count, turns.seed)

    def _next(self) -> list[int]:
        """This rank's examples of the coming optimizer step."""
        turns = self._turns
        first = self._learner.steps * turns.batch_size
        places = range(first + turns.rank, first + turns.batch_size, turns.world_size)
        return [self._order[place] for place in places]

    def _micros(
        self,
        shard: JaggedShard,
        rows: Tensor,
        token_fields: Mapping[str, Tensor],
        sequence_fields: Mapping[str, Tensor],
    ) -> list[MicroBatch]:
        return micros(
            shard,
            rows,
            token_fields=token_fields,
            sequence_fields=sequence_fields,
            token_budget=self._turns.token_budget,
            layout=self._turns.layout,
        )

    def export(self, folder: str) -> str:
        """An ordinary Hugging Face folder; a PRM's has a token-classification head of one label."""
        self._learner.export(folder, self._turns.tokenizer_path)
        return folder

    def close(self) -> None:
        """Release the engine's memory."""
        self._learner.close()
