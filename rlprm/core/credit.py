"""From reward streams to advantages, in the one order that every method shares.

source -> merge -> normalizer -> estimator -> weight -> gate -> sum -> whiten
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlprm.core import credit_metrics
from rlprm.core.estimators import gae, none
from rlprm.core.gates import OUTCOME, Around, open_gate, trust_gate
from rlprm.core.moments import Moments, updated, uses_running
from rlprm.core.normalize import check_axes, is_raw, normalize
from rlprm.core.remax import minus_greedy
from rlprm.core.whiten import Whiten
from rlprm.core.whiten import whiten as whitened
from rlprm.errors import ConfigError
from rlprm.records import Advantages, Shard, Stream
from rlprm.roles import Reduce

KL, BASELINE = "kl", "baseline"
OTHER_CENTRES = ("best_of_group", "drpo", "minus_greedy")  # normalizers of their own that take a baseline away


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPlan:
    """What happens to one stream. Settings are bound with ``functools.partial`` (YAML: ``_partial_: true``).

    >>> from functools import partial
    >>> from rlprm.core.estimators import to_go
    >>> from rlprm.core.merge import separate
    >>> from rlprm.core.normalize import RAW
    >>> rloo = partial(RAW, unit="response", centre="leave_one_out")
    >>> StreamPlan(name="outcome", merge=separate, normalizer=rloo, estimator=partial(to_go, gamma=1.0), weight=1.0,
    ...            gate=open_gate).name
    'outcome'

    Raises:
        ConfigError: normalizer axes that contradict each other, or a normalized `kl` stream.
    """

    name: str
    merge: Callable[..., Mapping[str, Stream]]  # (streams, shard) -> streams
    normalizer: Callable[..., Tensor]  # (rewards, present, shard, reduce) -> rewards
    estimator: Callable[..., Tensor]  # (rewards, present, shard) -> advantages
    weight: float
    gate: Callable[..., Tensor]  # (part, around) -> part

    def __post_init__(self) -> None:
        if getattr(self.normalizer, "func", None) is normalize:
            check_axes(**self.normalizer.keywords)  # type: ignore[attr-defined]
        if self.name == KL and not is_raw(self.normalizer):
            raise ConfigError("the kl stream is never normalized (its weight is a price in nats); use normalizer raw")
        if self.name != OUTCOME and getattr(self.normalizer, "func", self.normalizer) is minus_greedy:
            raise ConfigError(
                f"stream {self.name!r} is measured from a greedy response, and of that only the outcome is known; use the "
                "normalizer greedy for the stream outcome"
            )
        if _baseline(self.estimator) and _centre(self.normalizer):
            raise ConfigError(
                f"stream {self.name!r} is centred twice: by its normalizer ({_centre(self.normalizer)}) and by its estimator's "
                f"baseline ({_baseline(self.estimator)}); set the normalizer to raw, or the estimator's baseline to none"
            )
        if _accumulates(self.normalizer) and self.estimator is not none:
            raise ConfigError(
                f"stream {self.name!r} is summed up twice: by its normalizer (accumulate {_accumulates(self.normalizer)}) and by "
                "its estimator; set the estimator to none, or the normalizer's accumulate"
            )
        if self.name == BASELINE:
            raise ConfigError("`baseline` is the critic's own part; give the stream another name")


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticPlan:
    """One critic for all streams, hence one gamma and one lambda for all of them."""

    gamma: float
    lam: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What the policy learns from: advantages, what the critic should have said, and global measurements."""

    advantages: Advantages
    value_targets: Float[Tensor, "B T"] | None  # without a critic there are none
    metrics: Mapping[str, float]  # equal on all ranks
    moments: Mapping[str, Moments]  # of streams with running statistics, this batch included; for the next batch


def credit(
    shard: Shard,
    streams: Mapping[str, Stream],
    plans: Sequence[StreamPlan],
    reduce: Reduce,
    *,
    whiten: Whiten,
    trust: Mapping[str, float],
    brake: Mapping[str, float] | None = None,
    moments: Mapping[str, Moments] | None = None,
    values: Float[Tensor, "B T"] | None = None,
    critic: CriticPlan | None = None,
) -> Credit:
    """``total = sum_k part_k``, ``part_k = whiten(gate_k(weight_k * estimate_k(normalize_k(merge(streams)_k))))``.

    Rows that training does not accept (``shard.train`` False) take part in no statistic and get advantage 0. Merges run
    in the order of the plans, each on all streams; afterwards the streams' names must be those of the plans: a stream
    is never summed or dropped in passing. ``trust`` holds the factor of each stream that earns trust, ``brake`` factors
    on weights that an alarm has lowered (None: none has), ``moments`` the running statistics so far (None: none yet).

    With a critic (``values``: the value of the state in which ``tokens[b, t]`` was chosen), GAE is the accumulation of
    every stream, and because it is linear, ``sum_k GAE(r_k, 0) + GAE(0, V)`` is the usual GAE: the second term is a
    part of its own, named ``baseline``. Value targets are those advantages before whitening, plus V.

    Raises:
        ConfigError: streams and plans that do not match; a critic with other estimators than `none` or with a gate that
            is not linear; values without a critic, or a critic without values.
    """
    check_plans(plans, critic)
    if (values is None) != (critic is None):
        raise ConfigError("a critic plan needs values and values need a critic plan; found only one of the two")
    mask = shard.response_mask & shard.train[:, None]
    given = _trainable(streams, shard)
    merged = _merge(given, plans, shard)
    factors = {} if brake is None else brake
    seen = _moments(plans, merged, shard, reduce, {} if moments is None else moments)
    weighted = {
        plan.name: factors.get(plan.name, 1.0)
        * _weighted(plan, merged[plan.name], shard, reduce, critic, seen.get(plan.name))
        for plan in plans
    }
    parts = {
        plan.name: plan.gate(
            weighted[plan.name],
            Around(name=plan.name, shard=shard, parts=weighted, streams=given, trust=trust.get(plan.name)),
        )
        for plan in plans
    }
    value_targets = None
    if values is not None and critic is not None:
        parts[BASELINE], _ = gae(torch.zeros_like(values), values, mask, critic.gamma, critic.lam)
        value_targets = torch.where(mask, sum(parts.values()) + values, torch.zeros_like(values))
    parts = whitened(parts, mask, reduce, whiten)
    total = torch.stack([*parts.values()]).sum(0)
    metrics = {
        **credit_metrics.reward_metrics(merged, shard, reduce),
        **credit_metrics.agreement_metrics(given, shard, reduce),
        **credit_metrics.advantage_metrics(parts, total, mask, reduce),
    }
    return Credit(
        advantages=Advantages(total=total, parts=parts), value_targets=value_targets, metrics=metrics, moments=seen
    )


def check_plans(plans: Sequence[StreamPlan], critic: CriticPlan | None) -> None:
    """Refuse streams without a name of their own, and pieces that one critic cannot be the baseline of.

    Raises:
        ConfigError: with the stream and what to change.
    """
    names = [plan.name for plan in plans]
    if not plans or len(set(names)) != len(names):
        raise ConfigError(f"the streams are {names}; expected at least one, each named once")
    if critic is None:
        return
    for plan in plans:
        if _accumulates(plan.normalizer):
            raise ConfigError(
                f"with a critic GAE accumulates stream {plan.name!r}; set its normalizer's accumulate to none"
            )
        if plan.estimator is not none:
            raise ConfigError(f"with a critic GAE accumulates stream {plan.name!r}; set its estimator to none")
        if plan.gate not in (open_gate, trust_gate):
            raise ConfigError(
                f"stream {plan.name!r} has a gate that is not linear, so one critic cannot be its baseline; "
                "use gate open or trust, or no critic"
            )


def outcome_stream(shard: Shard) -> Stream:
    """The verifier's outcome at the last response token; present iff the verifier answered."""
    last = _last(shard) & shard.outcome_present[:, None]
    rewards = torch.where(last, shard.outcome[:, None], torch.zeros_like(shard.outcome[:, None]))
    return Stream(rewards=rewards.to(shard.rollout_logprobs.dtype), present=last)


def kl_stream(old_logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"], shard: Shard) -> Stream:
    """``r_t = -(log pi_old - log pi_ref)``: the k1 estimate, detached, at each response token (nats).

    In the reward k1 is right (unbiased, no gradient flows through it); as a loss it is refused (:mod:`rlprm.core.kl`).
    """
    k1 = torch.where(shard.response_mask, (old_logprobs - ref_logprobs).detach(), torch.zeros_like(old_logprobs))
    return Stream(rewards=-k1, present=shard.response_mask)


def _centre(normalizer: Callable[..., Tensor]) -> str | None:
    """The axis by which a normalizer centres; None where it does not."""
    settings = getattr(normalizer, "keywords", {})
    name = getattr(getattr(normalizer, "func", normalizer), "__name__", "")
    if name in OTHER_CENTRES or settings.get("scale") == "rank":
        return name if name in OTHER_CENTRES else "rank"
    centre = settings.get("centre", "none")
    return None if centre == "none" else centre


def _accumulates(normalizer: Callable[..., Tensor]) -> str | None:
    """How a normalizer sums a row's entries up; None where it does not."""
    accumulate = getattr(normalizer, "keywords", {}).get("accumulate", "none")
    return None if accumulate == "none" else accumulate


def _baseline(estimator: Callable[..., Tensor]) -> str | None:
    """The baseline that an estimator subtracts itself; None where it has none."""
    baseline = getattr(estimator, "keywords", {}).get("baseline", "none")
    return None if baseline == "none" else baseline


def _last(shard: Shard) -> Tensor:
    position = torch.arange(shard.tokens.shape[1], device=shard.tokens.device)
    ends = torch.where(shard.response_mask, position, -1).amax(1, keepdim=True)
    return shard.response_mask & (position == ends)


def _trainable(streams: Mapping[str, Stream], shard: Shard) -> dict[str, Stream]:
    accepted = shard.response_mask & shard.train[:, None]
    return {name: Stream(rewards=stream.rewards, present=stream.present & accepted) for name, stream in streams.items()}


def _merge(streams: Mapping[str, Stream], plans: Sequence[StreamPlan], shard: Shard) -> Mapping[str, Stream]:
    for plan in plans:
        streams = plan.merge(streams, shard)
    names = [plan.name for plan in plans]
    if set(streams) != set(names):
        raise ConfigError(
            f"after merging there are the streams {sorted(streams)}, and plans for {sorted(names)}; "
            "give every stream a plan, or sum it into another one by name"
        )
    return streams


def _moments(
    plans: Sequence[StreamPlan],
    streams: Mapping[str, Stream],
    shard: Shard,
    reduce: Reduce,
    before: Mapping[str, Moments],
) -> dict[str, Moments]:
    """The running statistics with this batch, of the streams whose normalizer wants them."""
    return {
        plan.name: updated(
            before.get(plan.name),
            streams[plan.name].rewards,
            streams[plan.name].present,
            shard,
            reduce,
            plan.normalizer,
        )
        for plan in plans
        if uses_running(plan.normalizer)
    }


def _weighted(
    plan: StreamPlan,
    stream: Stream,
    shard: Shard,
    reduce: Reduce,
    critic: CriticPlan | None,
    moments: Moments | None,
) -> Tensor:
    running = {} if moments is None else {"moments": moments}
    rewards = plan.normalizer(stream.rewards, stream.present, shard, reduce, **running)
    if critic is None:
        estimate = plan.estimator(rewards, stream.present, shard)
    else:
        received = none(rewards, stream.present, shard)
        estimate, _ = gae(received, torch.zeros_like(received), shard.response_mask, critic.gamma, critic.lam)
    return plan.weight * torch.where(shard.train[:, None], estimate, torch.zeros_like(estimate))
