"""Normalization of reward streams: one function of six axes.

======== ==================================================================================================
unit     what one entry of the statistics is
         ``token``: a present token
         ``step``: the sum of a step's present rewards, kept at the step's last present token
         ``response``: the sum of a response's present rewards, kept at its last present token
centre   what is subtracted from an entry
         ``none``
         ``group``: the mean of the group's entries
         ``leave_one_out``: the mean of the entries of the group's *other* responses, pooled (RLOO for ``response``)
         ``token_mean_loo``: the mean over the other responses of their mean entry ``m_j`` (PRIME as written)
         ``token_mean_loo_released``: ``r K/(K-1) - sum_i m_i/(K-1)`` (PRIME as released; no true leave-one-out)
         ``step_index``: the mean of the group's entries at the same step index
         ``batch``: the mean of all entries of all shards
scale    what an entry is divided by
         ``none``
         ``group_std``: Bessel standard deviation + eps over the entries that share a mean: the group, or the group at
         one step index under ``centre: step_index``. Entries without spread become 0
         ``batch_std``: Bessel standard deviation + eps over all entries of all shards
         ``return_range``: largest absolute undiscounted return (suffix sum of a row's entries) of all shards + eps
         ``local_return_range``: the same of this shard only, as PRIME's and iStar's code have it
order    ``centre_then_scale`` or ``scale_then_centre``: each takes its statistics from what the other left. Only where
         both are there; ``none`` where one is missing
bound    ``none``, ``tanh``, or a number c: clipped to [-c, c]. Last of all, after the statistics
eps      added to the divisor; 0 exactly where there is no scale
======== ==================================================================================================

Absent entries are never read and stay 0. A response that has no present sibling in its group has no baseline: under the
three leave-one-out centres it becomes 0; :func:`rlprm.core.groups.lone` counts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlprm.core.groups import group_centre, group_count, group_std, group_sum, known, no_spread
from rlprm.core.steps import last_of, to_step_ends
from rlprm.errors import ConfigError
from rlprm.records import Shard
from rlprm.roles import Reduce

Unit = Literal["token", "step", "response"]
Centre = Literal["none", "group", "leave_one_out", "token_mean_loo", "token_mean_loo_released", "step_index", "batch"]
Scale = Literal["none", "group_std", "batch_std", "return_range", "local_return_range"]
Order = Literal["none", "centre_then_scale", "scale_then_centre"]
Bound = float | Literal["none", "tanh"]

LEAVE_ONE_OUT = ("leave_one_out", "token_mean_loo", "token_mean_loo_released")


def normalize(
    rewards: Float[Tensor, "B T"],
    present: Bool[Tensor, "B T"],
    shard: Shard,
    reduce: Reduce,
    *,
    unit: Unit,
    centre: Centre,
    scale: Scale,
    order: Order,
    bound: Bound,
    eps: float,
) -> Float[Tensor, "B T"]:
    """``bound((entry - centre) / (scale + eps))`` of each present entry; see the axes above. Statistics in float64.

    Presets: GRPO (2402.03300) ``response, group, group_std, centre_then_scale, eps 1e-6``; Dr. GRPO (2503.20783)
    ``response, group``; RLOO (2402.14740) ``response, leave_one_out``; PRIME (2502.01456) as written ``token,
    token_mean_loo, return_range, scale_then_centre, eps 1e-6``, as released ``token_mean_loo_released`` and
    ``local_return_range``. PRIME's paper prints the sum of the sibling's rewards in the baseline; its picture and its
    code use the per-token mean, the dimensionally consistent reading.

    Raises:
        ConfigError: axes that contradict each other (:func:`check_axes`).
    """
    check_axes(unit=unit, centre=centre, scale=scale, order=order, bound=bound, eps=eps)
    entries, counts = _entries(rewards, present, shard, unit)
    cells = _cells(shard, centre)

    def centred(values: Tensor) -> Tensor:
        return _centre(values, counts, shard, reduce, cells, centre)

    def scaled(values: Tensor) -> Tensor:
        return _scale(values, counts, reduce, cells, scale, eps)

    first, second = (scaled, centred) if order == "scale_then_centre" else (centred, scaled)
    values = _bound(second(first(entries)), bound)
    return torch.where(counts, values, torch.zeros_like(values)).to(rewards.dtype)


def check_axes(*, unit: Unit, centre: Centre, scale: Scale, order: Order, bound: Bound, eps: float) -> None:
    """Refuse combinations that mean nothing, and settings that would be read by nobody.

    >>> check_axes(unit="response", centre="step_index", scale="none", order="none", bound="none", eps=0.0)
    Traceback (most recent call last):
    rlprm.errors.ConfigError: centre step_index needs unit token or step; a whole response has no step index

    Raises:
        ConfigError: always with the axis, what was found and what to write instead.
    """
    for name, value, options in (
        ("unit", unit, get_args(Unit)),
        ("centre", centre, get_args(Centre)),
        ("scale", scale, get_args(Scale)),
        ("order", order, get_args(Order)),
    ):
        if value not in options:
            raise ConfigError(f"normalizer {name} is {value!r}; expected one of {', '.join(options)}")
    if centre == "step_index" and unit == "response":
        raise ConfigError("centre step_index needs unit token or step; a whole response has no step index")
    if centre.startswith("token_mean_loo") and unit != "token":
        raise ConfigError(f"centre {centre} needs unit token, found {unit}; use leave_one_out for steps and responses")
    if centre == "none" and scale == "group_std":
        raise ConfigError("scale group_std needs a centre: it is 0 in a group of equal rewards; set centre group")
    both = centre != "none" and scale != "none"
    if both and order == "none":
        raise ConfigError("order is none with both a centre and a scale; say centre_then_scale or scale_then_centre")
    if not both and order != "none":
        raise ConfigError(f"order is {order}, but there is no centre or no scale to be ordered; set order none")
    if scale == "none" and eps != 0:
        raise ConfigError(f"eps is {eps}, but scale none divides by nothing; set eps 0.0")
    if scale != "none" and not (eps > 0 and math.isfinite(eps)):
        raise ConfigError(f"eps is {eps}; scale {scale} needs one above 0, such as 1e-6")
    if isinstance(bound, str):
        if bound not in ("none", "tanh"):
            raise ConfigError(f"bound is {bound!r}; expected none, tanh or a number to clip at")
    elif not bound > 0:
        raise ConfigError(f"bound is {bound}; a clip bound must be above 0 (or none)")


def is_raw(normalizer: Callable[..., Any]) -> bool:
    """True for :func:`normalize` with axes that leave token rewards as they are.

    >>> is_raw(RAW)
    True
    """
    return (
        isinstance(normalizer, partial)
        and normalizer.func is normalize
        and [normalizer.keywords.get(axis) for axis in ("unit", "centre", "scale", "bound")]
        == ["token", "none", "none", "none"]
    )


RAW = partial(normalize, unit="token", centre="none", scale="none", order="none", bound="none", eps=0.0)


def _entries(rewards: Tensor, present: Tensor, shard: Shard, unit: Unit) -> tuple[Tensor, Tensor]:
    """The rewards regrouped into the entries of the statistics, and where an entry is."""
    if unit == "token":
        return known(rewards, present), present
    spans = shard.step_index if unit == "step" else torch.where(present, 0, -1)
    holders = last_of(present, spans)
    # to_step_ends works on the present tokens only, so that the sum sits where the reward is: a step's last token may
    # be off the stream (a judge that marks an inner token).
    sums, _ = to_step_ends(known(rewards, present), present, torch.where(present, spans, -1))
    return sums, holders


def _cells(shard: Shard, centre: Centre) -> Int[Tensor, "B T"]:
    """Which entries share a mean: the group's, or the group's at one step index."""
    group = torch.unique(shard.group, return_inverse=True)[1][:, None].expand(shard.tokens.shape)
    if centre != "step_index":
        return group
    return group * (int(shard.step_index.max()) + 2 if shard.step_index.numel() else 1) + shard.step_index + 1


def _centre(values: Tensor, counts: Tensor, shard: Shard, reduce: Reduce, cells: Tensor, centre: Centre) -> Tensor:
    if centre == "none":
        return values
    if centre in ("group", "step_index"):
        return _flat(group_centre, values, counts, cells)
    if centre == "batch":
        total, number = reduce.sum(torch.stack([known(values, counts).sum(), counts.sum().double()]))
        return values - total / number.clamp_min(1)
    num_entries = counts.sum(1)
    own = known(values, counts).sum(1)
    there = num_entries > 0
    siblings = group_count(there, shard.group) - 1  # of a response that is there; -1 never meets an entry
    if centre == "leave_one_out":
        others = group_sum(own, there, shard.group) - own
        baseline = others / (group_sum(num_entries.double(), there, shard.group) - num_entries).clamp_min(1)
        centred = values - baseline[:, None]
    else:
        mean = own / num_entries.clamp_min(1)
        means = group_sum(mean, there, shard.group)
        if centre == "token_mean_loo":
            centred = values - ((means - mean) / siblings.clamp_min(1))[:, None]
        else:
            size = (siblings + 1).clamp_min(1)
            centred = (values * size[:, None] - means[:, None]) / siblings.clamp_min(1)[:, None]
    return torch.where((siblings > 0)[:, None], centred, torch.zeros_like(centred))


def _scale(values: Tensor, counts: Tensor, reduce: Reduce, cells: Tensor, scale: Scale, eps: float) -> Tensor:
    if scale == "none":
        return values
    if scale == "group_std":
        flat = _flat(no_spread, values, counts, cells)
        return torch.where(flat, torch.zeros_like(values), values / (_flat(group_std, values, counts, cells) + eps))
    if scale == "batch_std":
        return values / (_batch_std(values, counts, reduce) + eps)
    returns = known(values, counts).flip(1).cumsum(1).flip(1).abs()
    largest = torch.where(counts, returns, torch.zeros_like(returns)).reshape(-1)
    largest = torch.cat([largest, largest.new_zeros(1)]).amax()  # a shard without rewards still takes part
    return values / ((largest if scale == "local_return_range" else reduce.max(largest)) + eps)


def _batch_std(values: Tensor, counts: Tensor, reduce: Reduce) -> Tensor:
    total, number = reduce.sum(torch.stack([known(values, counts).sum(), counts.sum().double()]))
    deviation = known(values - total / number.clamp_min(1), counts)
    return (reduce.sum((deviation**2).sum()) / (number - 1).clamp_min(1)).sqrt()


def _flat(statistic: Callable[..., Tensor], values: Tensor, counts: Tensor, cells: Tensor) -> Tensor:
    return statistic(values.reshape(-1), counts.reshape(-1), cells.reshape(-1)).reshape(values.shape)


def _bound(values: Tensor, bound: Bound) -> Tensor:
    if bound == "none":
        return values
    return values.tanh() if isinstance(bound, str) else values.clamp(-bound, bound)
