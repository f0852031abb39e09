"""Normalization of reward streams: one function of axes, applied in the order of this table.

========== ================================================================================================
unit       what one entry of the statistics is
           ``token``: a present token
           ``step``: the sum of a step's present rewards, kept at the step's last present token
           ``response``: the sum of a response's present rewards, kept at its last present token
subset     which entries there are: ``all``; ``correct``: those of responses whose outcome is there and 1;
           ``incorrect``: there and below 1. All others become 0
clip_first entries are clipped to [-c, c] before ``accumulate`` and any statistic; null: not at all
accumulate ``none``, or each entry becomes the sum of the row's entries up to it (``prefix``) or from it on (``suffix``),
           itself included; before the statistics, so these are statistics of sums
centre     what is subtracted from an entry
           ``none``
           ``group``: the mean of the group's entries
           ``leave_one_out``: the mean of the entries of the group's *other* responses, pooled (RLOO for ``response``)
           ``token_mean_group``: the mean over the group's responses of their mean entry ``m_j``
           ``token_mean_loo``: the same over the *other* responses (PRIME as written)
           ``token_mean_loo_released``: ``r K/(K-1) - sum_i m_i/(K-1)`` (PRIME as released; no true leave-one-out)
           ``length_weighted``: ``sum_j L_j R_j / sum_j L_j`` over the group, L response tokens (OPO)
           ``incorrect_mean``: the mean of the entries of the group's incorrect responses; 0 in a group without one
           ``step_index``: the mean of the group's entries at the same step index
           ``position``: the mean of the group's entries at the same response token
           ``batch``: the mean of all entries of all shards
           ``running``: the mean of all entries of all batches so far, faded by ``decay``
scale      what an entry is divided by
           ``none``
           ``group_std``: Bessel standard deviation + eps over the entries that share a mean: the group, or the group at
           one step index or position under these centres. Entries without spread become 0
           ``token_mean_std``: Bessel standard deviation + eps over the group's ``m_j``; without spread 0
           ``batch_std``: Bessel standard deviation + eps over all entries of all shards
           ``running_std``: that of all batches so far, of uncentred entries
           ``return_range``: largest absolute undiscounted return (suffix sum of a row's entries) of all shards + eps
           ``local_return_range``: the same of this shard only, as PRIME's and iStar's code have it
           ``min_max``: onto [0, 1] from the smallest to the largest entry of the response; without spread 0
           ``rank``: no division but a replacement: the entry's rank among the group's, mapped onto [-1, 1], ties averaged
           ``length``: the number of the response's tokens
order      ``centre_then_scale`` or ``scale_then_centre``: each takes its statistics from what the other left. Only where
           both are there; ``none`` where one is missing
bound      ``none``, ``tanh``, ``sigmoid`` (``sigma(r) - 1/2``), or a number c: clipped to [-c, c]. Last of all
eps        added to the divisor; 0 exactly where the scale cannot be 0
decay      what earlier batches weigh per further batch, in (0, 1]; 1 forgets nothing. null without running statistics
========== ================================================================================================

Absent entries are never read and stay 0. A response that has no present sibling in its group has no baseline: under the
three leave-one-out centres it becomes 0; :func:`rlprm.core.groups.lone` counts it. So does the last survivor under
``step_index`` and ``position``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.moments import Moments, measured
from rlprm.core.normalize_axes import Accumulate, Bound, Centre, Order, Scale, Subset, Unit, check_axes
from rlprm.core.normalize_entries import entries
from rlprm.core.normalize_statistics import centred, scaled
from rlprm.records import Shard
from rlprm.roles import Reduce

__all__ = ["LEAVE_ONE_OUT", "RAW", "check_axes", "is_raw", "normalize"]

LEAVE_ONE_OUT = ("leave_one_out", "token_mean_loo", "token_mean_loo_released")


def normalize(
    rewards: Float[Tensor, "B T"],
    present: Bool[Tensor, "B T"],
    shard: Shard,
    reduce: Reduce,
    *,
    unit: Unit,
    subset: Subset,
    clip_first: float | None,
    accumulate: Accumulate,
    centre: Centre,
    scale: Scale,
    order: Order,
    bound: Bound,
    eps: float,
    decay: float | None,
    moments: Moments | None = None,
) -> Float[Tensor, "B T"]:
    """``bound((entry - centre) / (scale + eps))`` of each present entry; see the axes above. Statistics in float64.

    Presets: GRPO (2402.03300) ``response, group, group_std, centre_then_scale, eps 1e-6``; Dr. GRPO (2503.20783)
    ``response, group``; RLOO (2402.14740) ``response, leave_one_out``; PRIME (2502.01456) as written ``token,
    token_mean_loo, return_range, scale_then_centre, eps 1e-6``, as released ``token_mean_loo_released`` and
    ``local_return_range``. PRIME's paper prints the sum of the sibling's rewards in the baseline; its picture and its
    code use the per-token mean, the dimensionally consistent reading.

    ``moments`` holds the running statistics *with* this batch (:func:`rlprm.core.moments.updated`); None: those of this
    batch alone. Nobody else reads it.

    Raises:
        ConfigError: axes that contradict each other (:func:`check_axes`).
    """
    check_axes(
        unit=unit, subset=subset, clip_first=clip_first, accumulate=accumulate, centre=centre, scale=scale, order=order,
        bound=bound, eps=eps, decay=decay,
    )  # fmt: skip
    given, counts = entries(
        rewards, present, shard, unit=unit, subset=subset, clip_first=clip_first, accumulate=accumulate
    )
    seen = moments if moments is not None or decay is None else measured(None, given, counts, reduce, decay)

    def centre_of(values: Tensor) -> Tensor:
        return centred(values, counts, shard, reduce, centre, seen)

    def scale_of(values: Tensor) -> Tensor:
        return scaled(values, counts, shard, reduce, centre, scale, eps, seen)

    first, second = (scale_of, centre_of) if order == "scale_then_centre" else (centre_of, scale_of)
    bounded = _bound(second(first(given)), bound)
    return torch.where(counts, bounded, torch.zeros_like(bounded)).to(rewards.dtype)


def is_raw(normalizer: Callable[..., Any]) -> bool:
    """True for :func:`normalize` with axes that leave token rewards as they are.

    >>> is_raw(RAW)
    True
    """
    return (
        isinstance(normalizer, partial)
        and normalizer.func is normalize
        and all(normalizer.keywords.get(axis) == RAW.keywords[axis] for axis in RAW.keywords)
    )


RAW = partial(
    normalize, unit="token", subset="all", clip_first=None, accumulate="none", centre="none", scale="none", order="none",
    bound="none", eps=0.0, decay=None,
)  # fmt: skip


def _bound(values: Tensor, bound: Bound) -> Tensor:
    if bound == "none":
        return values
    if bound == "sigmoid":
        return values.sigmoid() - 0.5
    return values.tanh() if isinstance(bound, str) else values.clamp(-bound, bound)
