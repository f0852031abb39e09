"""From a rank's jagged shard to the mini-batches and micro-batches of one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlprm.batch import flat_response_mask
from rlprm.core.packing import Layout, build_micro, micro_batches
from rlprm.records import JaggedShard, MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """How often and in how many parts a batch is learnt from."""

    epochs: int
    mini_batches: int
    token_budget: int
    layout: Layout
    seed: int


def mini_batches(
    group: Int[Tensor, " B"], selected: Bool[Tensor, " B"], *, num_groups: int, parts: int, seed: int
) -> Iterator[Int[Tensor, " b"]]:
    """The selected rows of this rank in each of ``parts`` mini-batches.

    Groups are dealt out by a permutation that every rank draws alike, so the members of a mini-batch do not depend on
    the number of ranks. A rank may have no row of a part; all ranks still take that optimizer step together. Only
    groups below ``num_groups`` may be selected (accepted groups are numbered first).

    >>> group, every = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    >>> sorted(rows.tolist() for rows in mini_batches(group, every, num_groups=2, parts=2, seed=0))
    [[0, 1], [2, 3]]
    """
    order = torch.randperm(num_groups, generator=torch.Generator().manual_seed(seed))
    part_of_group = torch.empty_like(order)
    part_of_group[order] = torch.arange(num_groups) % parts
    for part in range(parts):
        yield torch.nonzero(selected & (part_of_group[group.clamp_max(num_groups - 1)] == part)).flatten()


def micros(
    shard: JaggedShard,
    rows: Int[Tensor, " b"],
    *,
    token_fields: Mapping[str, Tensor],
    sequence_fields: Mapping[str, Tensor],
    token_budget: int,
    layout: Layout,
) -> list[MicroBatch]:
    """``rows`` of the shard as micro-batches of at most ``token_budget`` tokens, fields cut along.

    ``token_fields`` are flat over all of the shard's tokens, ``sequence_fields`` have one entry per row of the shard.
    """
    response = flat_response_mask(shard)
    return [
        build_micro(
            [int(rows[index]) for index in plan],
            shard.lengths,
            shard.tokens,
            response,
            token_fields,
            sequence_fields,
            layout,
        )
        for plan in micro_batches(shard.lengths[rows].tolist(), token_budget, max(1, len(rows)), layout)
    ]
