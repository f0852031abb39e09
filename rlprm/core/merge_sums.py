"""Merges that add several streams, and merges one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from rlprm.core.groups import known
from rlprm.core.merge_parts import at_last, named, response_mean
from rlprm.errors import ConfigError
from rlprm.records import Shard, Stream

Merge = Callable[..., Mapping[str, Stream]]


def in_turn(
    streams: Mapping[str, Stream], shard: Shard, *, first: Merge, second: Merge, third: Merge | None
) -> Mapping[str, Stream]:
    """Two or three merges of one stream, one after another: ``third(second(first(streams)))``."""
    merged = second(first(streams, shard), shard)
    return merged if third is None else third(merged, shard)


def sum_of(
    streams: Mapping[str, Stream], shard: Shard, *, names: Sequence[str], weights: Sequence[float], into: str
) -> Mapping[str, Stream]:
    """``into <- sum_k w_k v_k`` at the last response token; the other streams named are gone.

    ``v_k`` is the mean of the response's entries of stream ``names[k]``: a verdict or an outcome as it is, step verdicts
    0 and 1 as the share of right steps. Where one of them is absent the sum is absent: a judge that failed must not look
    like one that found nothing good. (:func:`rlprm.core.merge.sum_into` keeps the other half, and every token.)

    Raises:
        ConfigError: no stream of one of the names, not one weight per name, or ``into`` that is none of them.
    """
    if not names or len(set(names)) != len(names) or len(weights) != len(names):
        raise ConfigError(
            f"names are {list(names)} and weights {list(weights)}; expected each name once, with its weight"
        )
    if into not in names:
        raise ConfigError(f"the sum is put into {into!r}; expected one of {', '.join(names)}, which is replaced")
    total = torch.zeros_like(shard.outcome).double()
    complete = torch.ones_like(shard.outcome_present)
    for name, weight in zip(names, weights, strict=True):
        value, there = response_mean(named(streams, name))
        total = total + weight * value
        complete = complete & there
    left = {key: stream for key, stream in streams.items() if key not in names}
    return {**left, into: at_last(total, complete, shard)}


def add_outcome(streams: Mapping[str, Stream], shard: Shard, *, stream: str, weight: float) -> Mapping[str, Stream]:
    """``r + weight * outcome`` at every entry of the named stream; a stream `outcome` stays as it is.

    CAPO (arXiv:2508.02298) with weight 2 and rewards 0 and -1 on the tokens of right and wrong steps: +2, +1, 0, -1.
    Where the outcome is absent, so is the reward.

    Raises:
        ConfigError: no stream of that name.
    """
    raised = named(streams, stream)
    present = raised.present & shard.outcome_present[:, None]
    rewards = known(raised.rewards, present) + weight * known(shard.outcome, shard.outcome_present)[:, None]
    return {**streams, stream: Stream(rewards=known(rewards, present).to(raised.rewards.dtype), present=present)}
