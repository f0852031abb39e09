"""What a normalizer subtracts from its entries and what it divides them by; the axes are told in
:mod:`rlprm.core.normalize`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlprm.core.groups import TIE, group_centre, group_count, group_mean, group_std, group_sum, known, no_spread
from rlprm.core.moments import Moments
from rlprm.core.normalize_axes import Centre, Scale
from rlprm.core.normalize_entries import wrong
from rlprm.records import Shard
from rlprm.roles import Reduce


def cells(shard: Shard, centre: Centre) -> Int[Tensor, "B T"]:
    """Which entries share a mean: the group's, or the group's at one step index or response token."""
    group = torch.unique(shard.group, return_inverse=True)[1][:, None].expand(shard.tokens.shape)
    if centre == "step_index":
        return group * (int(shard.step_index.max()) + 2 if shard.step_index.numel() else 1) + shard.step_index + 1
    if centre == "position":
        return group * (shard.tokens.shape[1] + 1) + shard.response_mask.cumsum(1)
    return group


def centred(
    values: Float[Tensor, "B T"],
    counts: Bool[Tensor, "B T"],
    shard: Shard,
    reduce: Reduce,
    centre: Centre,
    moments: Moments | None,
) -> Float[Tensor, "B T"]:
    """The entries minus the centre; 0 where there is nothing to compare with."""
    if centre == "none":
        return values
    if centre == "running" and moments is not None:
        return values - moments.mean
    if centre in ("group", "step_index", "position"):
        return _flat(group_centre, values, counts, cells(shard, centre))
    if centre == "batch":
        total, number = reduce.sum(torch.stack([known(values, counts).sum(), counts.sum().double()]))
        return values - total / number.clamp_min(1)
    if centre == "incorrect_mean":
        compared = counts & wrong(shard)[:, None]
        group = cells(shard, "group")
        baseline = _flat(group_mean, values, compared, group)
        number = _flat(group_sum, torch.ones_like(values), compared, group)
        return torch.where(number > 0, values - baseline, torch.zeros_like(values))
    return _against_rows(values, counts, shard, centre)


def _against_rows(values: Tensor, counts: Tensor, shard: Shard, centre: Centre) -> Tensor:
    """Centres that weigh a group's responses, not its entries."""
    num_entries = counts.sum(1)
    own = known(values, counts).sum(1)
    there = num_entries > 0
    mean = own / num_entries.clamp_min(1)
    if centre == "token_mean_group":
        return values - group_mean(mean, there, shard.group)[:, None]
    if centre == "length_weighted":
        length = shard.response_mask.sum(1).double()
        weighted = group_sum(length * own, there, shard.group) / group_sum(length, there, shard.group).clamp_min(1)
        flat = no_spread(own, there, shard.group)[:, None]
        return torch.where(flat, torch.zeros_like(values), values - weighted[:, None])
    siblings = group_count(there, shard.group) - 1  # of a response that is there; -1 never meets an entry
    if centre == "leave_one_out":
        others = group_sum(own, there, shard.group) - own
        baseline = others / (group_sum(num_entries.double(), there, shard.group) - num_entries).clamp_min(1)
        apart = values - baseline[:, None]
    else:
        means = group_sum(mean, there, shard.group)
        if centre == "token_mean_loo":
            apart = values - ((means - mean) / siblings.clamp_min(1))[:, None]
        else:
            size = (siblings + 1).clamp_min(1)
            apart = (values * size[:, None] - means[:, None]) / siblings.clamp_min(1)[:, None]
    return torch.where((siblings > 0)[:, None], apart, torch.zeros_like(apart))


def scaled(
    values: Float[Tensor, "B T"],
    counts: Bool[Tensor, "B T"],
    shard: Shard,
    reduce: Reduce,
    centre: Centre,
    scale: Scale,
    eps: float,
    moments: Moments | None,
) -> Float[Tensor, "B T"]:
    """The entries divided by the scale (or replaced by their rank); 0 where the scale finds no spread."""
    if scale == "none":
        return values
    if scale == "group_std":
        shared = cells(shard, centre)
        spread = _flat(group_std, values, counts, shared)
        return _divided(values, spread + eps, _flat(no_spread, values, counts, shared))
    if scale == "token_mean_std":
        mean = known(values, counts).sum(1) / counts.sum(1).clamp_min(1)
        there = counts.any(1)
        spread = group_std(mean, there, shard.group) + eps
        return _divided(values, spread[:, None], no_spread(mean, there, shard.group)[:, None])
    if scale == "batch_std":
        return values / (_batch_std(values, counts, reduce) + eps)
    if scale == "running_std" and moments is not None:
        return torch.zeros_like(values) if moments.std < TIE else values / (moments.std + eps)
    if scale == "length":
        return values / shard.response_mask.sum(1, keepdim=True).clamp_min(1)
    if scale == "min_max":
        return _min_max(values, counts)
    if scale == "rank":
        return _rank(values, counts, cells(shard, "group"))
    returns = known(values, counts).flip(1).cumsum(1).flip(1).abs()
    largest = torch.where(counts, returns, torch.zeros_like(returns)).reshape(-1)
    largest = torch.cat([largest, largest.new_zeros(1)]).amax()  # a shard without rewards still takes part
    return values / ((largest if scale == "local_return_range" else reduce.max(largest)) + eps)


def _divided(values: Tensor, divisor: Tensor, flat: Tensor) -> Tensor:
    return torch.where(flat, torch.zeros_like(values), values / divisor)


def _batch_std(values: Tensor, counts: Tensor, reduce: Reduce) -> Tensor:
    total, number = reduce.sum(torch.stack([known(values, counts).sum(), counts.sum().double()]))
    deviation = known(values - total / number.clamp_min(1), counts)
    return (reduce.sum((deviation**2).sum()) / (number - 1).clamp_min(1)).sqrt()


def _min_max(values: Tensor, counts: Tensor) -> Tensor:
    """``(v - min) / (max - min)`` of the row's entries; 0 in a row without spread."""
    infinite = torch.full_like(values, torch.inf)
    if not values.shape[1]:
        return values
    lowest = torch.where(counts, values, infinite).amin(1, keepdim=True)
    span = torch.where(counts, values, -infinite).amax(1, keepdim=True) - lowest
    flat = ~(span >= TIE)  # a row without entries has a span of -inf
    return _divided(torch.where(flat, torch.zeros_like(values), values - lowest), torch.where(flat, 1.0, span), flat)


def _rank(values: Tensor, counts: Tensor, groups: Tensor) -> Tensor:
    """``(below - above) / (n - 1)``: how many of the group's other entries lie below, less those above."""
    ids, index = torch.unique(groups, return_inverse=True)
    ranked = torch.zeros_like(values)
    for each in range(len(ids)):
        member = counts & (index == each)
        found = values[member]
        ordered = found.sort().values
        # Entries within TIE of each other are equal, so none of them is above the other.
        below = torch.searchsorted(ordered, found - TIE, right=False)
        above = len(found) - torch.searchsorted(ordered, found + TIE, right=True)
        ranked = ranked.masked_scatter(member, (below - above).double() / max(len(found) - 1, 1))
    return ranked


def _flat(statistic: Callable[..., Tensor], values: Tensor, counts: Tensor, shared: Tensor) -> Tensor:
    return statistic(values.reshape(-1), counts.reshape(-1), shared.reshape(-1)).reshape(values.shape)
