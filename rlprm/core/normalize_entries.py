"""What one entry of a normalizer's statistics is, and which entries there are."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.groups import known
from rlprm.core.normalize_axes import Accumulate, Subset, Unit
from rlprm.core.steps import last_of, to_step_ends
from rlprm.records import Shard


def entries(
    rewards: Float[Tensor, "B T"],
    present: Bool[Tensor, "B T"],
    shard: Shard,
    *,
    unit: Unit,
    subset: Subset,
    clip_first: float | None,
    accumulate: Accumulate,
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """The rewards regrouped into entries (float64, 0 elsewhere), and where an entry is.

    In this order: summed by ``unit``, restricted to ``subset``, clipped to ``[-clip_first, clip_first]``, summed up
    along the response by ``accumulate``. An absent entry adds nothing to a sum and receives none.
    """
    summed, holders = _by_unit(rewards, present, shard, unit)
    counts = holders & _rows(shard, subset)[:, None]
    received = known(summed, counts)
    clipped = received if clip_first is None else received.clamp(-clip_first, clip_first)
    return known(_accumulated(clipped, accumulate), counts), counts


def right(shard: Shard) -> Bool[Tensor, " B"]:
    """Responses whose outcome is there and 1."""
    return shard.outcome_present & (shard.outcome == 1)


def wrong(shard: Shard) -> Bool[Tensor, " B"]:
    """Responses whose outcome is there and below 1; one that nobody judged is neither right nor wrong."""
    return shard.outcome_present & (shard.outcome != 1)


def _rows(shard: Shard, subset: Subset) -> Bool[Tensor, " B"]:
    if subset == "all":
        return torch.ones_like(shard.outcome_present)
    return right(shard) if subset == "correct" else wrong(shard)


def _accumulated(values: Tensor, accumulate: Accumulate) -> Tensor:
    if accumulate == "none":
        return values
    return values.cumsum(1) if accumulate == "prefix" else values.flip(1).cumsum(1).flip(1)


def _by_unit(rewards: Tensor, present: Tensor, shard: Shard, unit: Unit) -> tuple[Tensor, Tensor]:
    if unit == "token":
        return known(rewards, present), present
    spans = shard.step_index if unit == "step" else torch.where(present, 0, -1)
    holders = last_of(present, spans)
    # to_step_ends works on the present tokens only, so that the sum sits where the reward is: a step's last token may
    # be off the stream (a judge that marks an inner token).
    sums, _ = to_step_ends(known(rewards, present), present, torch.where(present, spans, -1))
    return sums, holders
