"""Reward for being the best of the group, and nothing else: an objective for pass@k."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.groups import TIE, group_count, group_max, group_std, known
from rlprm.core.steps import last_of
from rlprm.errors import ConfigError
from rlprm.records import Shard
from rlprm.roles import Reduce


def best_of_group(
    rewards: Float[Tensor, "B T"],
    present: Bool[Tensor, "B T"],
    shard: Shard,
    reduce: Reduce,
    *,
    scale: Literal["none", "group_std"],
    eps: float,
) -> Float[Tensor, "B T"]:
    """``r_max - r_second`` for the best response of the group, 0 for all others and where the best is shared.

    Source: verl's ``grpo_passk``, which may divide by the group's Bessel standard deviation (``scale: group_std``). A
    response counts with the sum of its rewards. With 0/1 outcomes only a group with exactly one right response teaches
    anything. Differs from verl: rewards closer than 1e-6 are a tie, and a group of one gets 0.

    >>> from rlprm.core.reduce import Identity
    >>> from rlprm.core.probe import made_up
    >>> shard, ends = made_up(), torch.tensor([[False, False, False, True]] * 2)  # a wrong and a right response
    >>> found = best_of_group(shard.outcome[:, None] * ends, ends, shard, Identity(), scale="none", eps=0.0)
    >>> found[:, 3].tolist()
    [0.0, 1.0]

    Raises:
        ConfigError: an unknown scale, or an eps that does not fit it.
    """
    if scale not in ("none", "group_std") or (scale == "none") != (eps == 0) or eps < 0:
        raise ConfigError(
            f"best_of_group has scale {scale!r} and eps {eps}; expected none with 0.0 or group_std with 1e-6"
        )
    there, sums = present.any(1), known(rewards, present).sum(1)
    largest = group_max(sums, there, shard.group)
    best = there & (largest - sums < TIE)
    second = group_max(sums, there & ~best, shard.group)
    alone = best & (group_count(best, shard.group) == 1) & (group_count(there, shard.group) > 1)
    lead = torch.where(alone, largest - second, torch.zeros_like(sums))
    divided = lead if scale == "none" else lead / (group_std(sums, there, shard.group) + eps)
    holders = last_of(present, torch.where(present, 0, -1))
    return torch.where(holders, divided[:, None], torch.zeros_like(divided[:, None])).to(rewards.dtype)
