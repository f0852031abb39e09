"""Merges at reward level: before any statistics, where a stream needs the outcome or another stream.

A merge is a function ``(streams, shard, **settings) -> streams``. Nothing is summed or dropped unless it is named here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from rlprm.core.groups import known
from rlprm.errors import ConfigError
from rlprm.records import Shard, Stream


def separate(streams: Mapping[str, Stream], shard: Shard) -> Mapping[str, Stream]:
    """The streams as they are."""
    return streams


def posterior_gate(streams: Mapping[str, Stream], shard: Shard, *, stream: str) -> Mapping[str, Stream]:
    """``1[outcome = 1] * r``: the named process stream is paid only in right responses (Posterior-GRPO).

    In a wrong response the reward is a present 0, which takes part in the statistics; where the outcome is absent the
    reward is absent too.

    Raises:
        ConfigError: no stream of that name.
    """
    gated = _named(streams, stream)
    right = (shard.outcome == 1)[:, None]
    judged = gated.present & shard.outcome_present[:, None]
    rewards = torch.where(right & judged, gated.rewards, torch.zeros_like(gated.rewards))
    return {**streams, stream: replace(gated, rewards=rewards, present=judged)}


def sum_into(
    streams: Mapping[str, Stream], shard: Shard, *, name: str, into: str, weight: float
) -> Mapping[str, Stream]:
    """``into <- into + weight * name``, and ``name`` is gone; an entry is present where either of the two is.

    Raises:
        ConfigError: no stream of one of the names, or a stream summed into itself.
    """
    if name == into:
        raise ConfigError(f"stream {name!r} cannot be summed into itself; name two streams")
    added, target = _named(streams, name), _named(streams, into)
    rewards = known(target.rewards, target.present) + weight * known(added.rewards, added.present)
    merged = Stream(rewards=rewards.to(target.rewards.dtype), present=target.present | added.present)
    return {**{key: value for key, value in streams.items() if key != name}, into: merged}


def _named(streams: Mapping[str, Stream], name: str) -> Stream:
    if name not in streams:
        raise ConfigError(f"a merge names the stream {name!r}; there are {', '.join(sorted(streams)) or 'none'}")
    return streams[name]
