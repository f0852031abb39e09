"""What merges share: a stream by its name, what it says of a whole response, and where such a number is put."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.groups import known
from rlprm.core.steps import last_of, step_sums
from rlprm.errors import ConfigError
from rlprm.records import Shard, Stream

How = Literal["mean", "min", "sum", "last", "product"]


def named(streams: Mapping[str, Stream], name: str) -> Stream:
    """The stream of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in streams:
        raise ConfigError(f"a merge names the stream {name!r}; there are {', '.join(sorted(streams)) or 'none'}")
    return streams[name]


def response_mean(stream: Stream) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """Mean of each response's present entries in float64 (its one entry, for a stream of responses); where it has any."""
    mean = known(stream.rewards, stream.present).sum(1) / stream.present.sum(1).clamp_min(1)
    return mean, stream.present.any(1)


def over_steps(stream: Stream, shard: Shard, how: How) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """One number per response from the sums of its rewarded steps, in float64; which responses have a rewarded step.

    Which one is right depends on what the PRM was trained on: labels of right steps suggest the product or the smallest
    one, values after the step the last one.

    Raises:
        ConfigError: an unknown way.
    """
    sums = step_sums(stream.rewards, stream.present, shard.step_index)
    there = step_sums(torch.ones_like(stream.rewards), stream.present, shard.step_index) > 0
    if not sums.shape[1]:  # no response has a step
        return torch.zeros_like(shard.outcome).double(), torch.zeros_like(shard.outcome_present)
    rows = there.any(1)
    if how == "sum":
        return sums.sum(1), rows
    if how == "mean":
        return sums.sum(1) / there.sum(1).clamp_min(1), rows
    if how == "product":
        return torch.where(rows, torch.where(there, sums, torch.ones_like(sums)).prod(1), 0.0), rows
    if how == "min":
        return torch.where(rows, torch.where(there, sums, torch.full_like(sums, torch.inf)).amin(1), 0.0), rows
    if how != "last":
        raise ConfigError(f"steps are put together by {how!r}; expected mean, min, sum, last or product")
    order = torch.arange(sums.shape[1], device=sums.device).expand_as(there)
    latest = torch.where(there, order, -1).amax(1, keepdim=True)
    return torch.where(rows, sums.gather(1, latest.clamp_min(0))[:, 0], 0.0), rows


def at_last(values: Float[Tensor, " B"], there: Bool[Tensor, " B"], shard: Shard) -> Stream:
    """One entry per response, at its last token."""
    last = last_of(shard.response_mask, torch.where(shard.response_mask, 0, -1)) & there[:, None]
    spread = values[:, None].expand(last.shape)
    return Stream(rewards=known(spread, last).to(shard.rollout_logprobs.dtype), present=last)
