"""What a stream says of each response in five numbers, for rules that choose between responses."""

from __future__ import annotations

from torch import Tensor

from rlprm.core.groups import known
from rlprm.core.steps import step_sums
from rlprm.records import Shard, Stream
from rlprm.roles import RowScore


def row_scores(stream: Stream, shard: Shard) -> dict[int, RowScore]:
    """By the row's position in the batch; a response without any present reward is not there.

    >>> import torch
    >>> from rlprm.core.row_scores import of_steps
    >>> of_steps([1.0, -2.0, 4.0])
    RowScore(mean=1.0, lowest=-2.0, sum=3.0, last=4.0, steps=3)
    """
    sums = step_sums(known(stream.rewards, stream.present), stream.present, shard.step_index)
    rewarded = step_sums(stream.present.double(), stream.present, shard.step_index) > 0
    return {
        int(shard.row[index]): of_steps(sums[index][there].tolist())
        for index, there in enumerate(rewarded)
        if _any(there)
    }


def of_steps(rewards: list[float]) -> RowScore:
    """The five numbers of at least one step reward."""
    return RowScore(
        mean=sum(rewards) / len(rewards),
        lowest=min(rewards),
        sum=sum(rewards),
        last=rewards[-1],
        steps=len(rewards),
    )


def _any(flags: Tensor) -> bool:
    return bool(flags.any())
