"""Merges at reward level: before any statistics, where a stream needs the outcome or another stream.

A merge is a function ``(streams, shard, **settings) -> streams``. Nothing is summed or dropped unless it is named here.
Merges that read the verdict are in :mod:`rlprm.core.merge_outcome`, those that make one number of a response in
:mod:`rlprm.core.merge_response`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from rlprm.core.groups import TIE, known
from rlprm.core.merge_parts import at_last, named, response_mean
from rlprm.core.steps import last_of
from rlprm.errors import ConfigError
from rlprm.records import Shard, Stream


def separate(streams: Mapping[str, Stream], shard: Shard) -> Mapping[str, Stream]:
    """The streams as they are."""
    return streams


def posterior_gate(streams: Mapping[str, Stream], shard: Shard, *, stream: str) -> Mapping[str, Stream]:
    """``1[outcome = 1] * r``: the named process stream is paid only in right responses (Posterior-GRPO).

    In a wrong response the reward is a present 0, which takes part in the statistics; where the outcome is absent the
    reward is absent too, and so it is where the source said nothing.

    Raises:
        ConfigError: no stream of that name.
    """
    gated = named(streams, stream)
    right = (shard.outcome == 1)[:, None]
    judged = gated.present & shard.outcome_present[:, None]
    rewards = torch.where(right & judged, gated.rewards, torch.zeros_like(gated.rewards))
    return {**streams, stream: replace(gated, rewards=rewards, present=judged)}


def sum_into(
    streams: Mapping[str, Stream], shard: Shard, *, name: str, into: str, weight: float
) -> Mapping[str, Stream]:
    """``into <- into + weight * name``, and ``name`` is gone; an entry is present where either of the two is.

    In a response of which ``into`` says nothing (no verdict) the sum says nothing either: an absent outcome must not
    become a 0 by way of a price.

    Raises:
        ConfigError: no stream of one of the names, or a stream summed into itself.
    """
    if name == into:
        raise ConfigError(f"stream {name!r} cannot be summed into itself; name two streams")
    added, target = named(streams, name), named(streams, into)
    rewards = known(target.rewards, target.present) + weight * known(added.rewards, added.present)
    there = target.present.any(1, keepdim=True) & (target.present | added.present)
    merged = Stream(rewards=torch.where(there, rewards, 0.0).to(target.rewards.dtype), present=there)
    return {**{key: value for key, value in streams.items() if key != name}, into: merged}


def zero_last(streams: Mapping[str, Stream], shard: Shard, *, stream: str) -> Mapping[str, Stream]:
    """The named stream's entry at the last response token becomes 0, and stays present: nothing is paid for EOS.

    The PRIME recipe of verl cuts token rewards one short, so EOS counts with 0 in its response's mean and an answer of
    one token earns nothing; PRIME's own code keeps the last token. Where that entry is absent it stays absent.

    Raises:
        ConfigError: no stream of that name.
    """
    kept = named(streams, stream)
    last = last_of(shard.response_mask, torch.where(shard.response_mask, 0, -1))
    return {**streams, stream: replace(kept, rewards=torch.where(last, torch.zeros_like(kept.rewards), kept.rewards))}


def gate_by(streams: Mapping[str, Stream], shard: Shard, *, gated: Sequence[str], by: str) -> Mapping[str, Stream]:
    """``1[by = 1] * r`` for each of the ``gated`` streams, and ``by`` is gone: paid only where another stream says so.

    ``by`` says one number per response (the mean of its entries there); anything below 1 closes the gate, as a missing
    answer block does in SPARK (arXiv:2512.03244). A closed gate leaves a present 0; where ``by`` is absent, the gated
    streams are absent, too. Differs from :func:`posterior_gate`, which asks the verifier's outcome and keeps it.

    Raises:
        ConfigError: no stream of one of the names, none to gate, or a stream that gates itself.
    """
    if not gated or by in gated:
        raise ConfigError(
            f"gate_by gates {list(gated)} by {by!r}; name at least one stream, and another one as the gate"
        )
    value, there = response_mean(named(streams, by))
    opened = (value > 1 - TIE)[:, None]
    left = {key: stream for key, stream in streams.items() if key != by}
    for name in gated:
        stream = named(streams, name)
        present = stream.present & there[:, None]
        rewards = torch.where(opened & present, stream.rewards, torch.zeros_like(stream.rewards))
        left[name] = Stream(rewards=rewards, present=present)
    return left


def hierarchical(
    streams: Mapping[str, Stream],
    shard: Shard,
    *,
    levels: Sequence[str],
    weights: Sequence[float],
    difficulty: float,
    into: str,
) -> Mapping[str, Stream]:
    """``sum_k w_k v_k 1[v_1 = ... = v_{k-1} = 1]``, the last term times ``difficulty``: a level pays once all before it are full.

    ``v_k`` in [0, 1] is what stream ``levels[k]`` says of the response (the mean of its entries there). The result is one
    entry at the last response token of ``into``, which is one of the levels; the other levels are gone. A response is
    absent where the first level that counts for it is absent: nobody knows whether it was reached in full.

    Shop-R1 (arXiv:2507.17842) pays format, then the kind of action, then its content, and scales the content by a large
    difficulty. Scaled before a statistic of the group, it makes the other terms vanish in groups where it is active.

    Raises:
        ConfigError: no stream of one of the names, not one weight per level, or ``into`` that is no level.
    """
    if not levels or len(set(levels)) != len(levels) or len(weights) != len(levels):
        raise ConfigError(
            f"levels are {list(levels)} and weights {list(weights)}; expected each level once, with its weight"
        )
    if into not in levels:
        raise ConfigError(
            f"levels are paid into {into!r}; expected one of them ({', '.join(levels)}), which is replaced"
        )
    earned = torch.zeros_like(shard.outcome).double()
    reached = torch.ones_like(shard.outcome_present)  # all earlier levels are there and full
    judged = torch.ones_like(shard.outcome_present)
    factors = [*weights[:-1], weights[-1] * difficulty]
    for name, factor in zip(levels, factors, strict=True):
        value, there = response_mean(named(streams, name))
        judged = judged & (there | ~reached)
        earned = earned + torch.where(reached & there, factor * value, torch.zeros_like(value))
        reached = reached & there & (value > 1 - TIE)
    left = {key: stream for key, stream in streams.items() if key not in levels}
    return {**left, into: at_last(earned, judged, shard)}
