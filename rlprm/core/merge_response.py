"""Merges that make one number of a response out of its steps."""

from __future__ import annotations

from collections.abc import Mapping

from rlprm.core.groups import known
from rlprm.core.merge_parts import How, at_last, named, over_steps
from rlprm.errors import ConfigError
from rlprm.records import Shard, Stream


def aggregate(streams: Mapping[str, Stream], shard: Shard, *, stream: str, how: How) -> Mapping[str, Stream]:
    """The named stream becomes one entry per response, at its last token: its rewarded steps' mean, min, sum, last or product.

    For normalizers and estimators of whole responses, where a sum over steps would pay for their number. A response
    without a rewarded step stays absent.

    Raises:
        ConfigError: no stream of that name, or an unknown way.
    """
    return {**streams, stream: at_last(*over_steps(named(streams, stream), shard, how), shard)}


def blend(
    streams: Mapping[str, Stream],
    shard: Shard,
    *,
    stream: str,
    into: str,
    share: float,
    how: How,
    alpha: float,
) -> Mapping[str, Stream]:
    """``into <- (1 - share) * into + share * (how(steps) + alpha * last step)``, and ``stream`` is gone.

    ReasonFlux-PRM (arXiv:2506.18896) with ``how`` mean: the response's number from its steps plus alpha times the final
    one, in one reward with the outcome, before any statistic; the stream with the larger spread then decides. An entry of
    ``into`` stays present only where the response has a rewarded step, too: a mixture without one half has another scale.
    The authors' released code feeds the whole response as a single step; here steps are steps.

    Raises:
        ConfigError: no stream of one of the names, a stream blended into itself, or a share outside [0, 1].
    """
    if stream == into:
        raise ConfigError(f"stream {stream!r} cannot be blended into itself; name two streams")
    if not 0 <= share <= 1:
        raise ConfigError(f"share is {share}; expected the part of the blend that is {stream!r}'s, in [0, 1]")
    source, target = named(streams, stream), named(streams, into)
    level, there = over_steps(source, shard, how)
    final, _ = over_steps(source, shard, "last")
    present = target.present & there[:, None]
    mixed = (1 - share) * known(target.rewards, present) + share * (level + alpha * final)[:, None]
    blended = Stream(rewards=known(mixed, present).to(target.rewards.dtype), present=present)
    return {**{key: value for key, value in streams.items() if key != stream}, into: blended}
