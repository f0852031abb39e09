"""Statistics over groups of entries, in float64, over present entries only.

A group is a set of entries with the same id; ids need not be contiguous, sorted or small (length balancing and packing
change the row order, and implementations that loop over blocks of K rows corrupt their baselines silently). Functions
return one value per *entry*, so nothing is looked up again. ``present`` False means that the entry takes no part:
its value is never read and its result is 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Rewards closer than this are equal. Exact zero needs bit-equal rewards whose mean rounds back to them: in float32,
# seven rewards of 0.7 divided by (their std + 1e-6) give an advantage of 0.056.
TIE = 1e-6


def group_count(present: Bool[Tensor, " n"], group: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Present members of each entry's group.

    >>> group_count(torch.tensor([True, True, False]), torch.tensor([7, 3, 7])).tolist()
    [1.0, 1.0, 1.0]
    """
    return group_sum(torch.ones_like(present, dtype=torch.float64), present, group)


def group_sum(
    values: Float[Tensor, " n"], present: Bool[Tensor, " n"], group: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """``sum_{j in group(i), present} values_j`` for each entry i.

    >>> group_sum(torch.tensor([1.0, 5.0, 2.0]), torch.tensor([True, True, True]), torch.tensor([7, 3, 7])).tolist()
    [3.0, 5.0, 3.0]
    """
    ids, index = torch.unique(group, return_inverse=True)
    sums = torch.zeros(len(ids), dtype=torch.float64, device=group.device)
    return sums.index_add(0, index, known(values, present))[index]


def group_mean(
    values: Float[Tensor, " n"], present: Bool[Tensor, " n"], group: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Mean of the present members of each entry's group; 0 for a group with none.

    >>> group_mean(torch.tensor([1.0, 5.0, 2.0]), torch.tensor([True, True, True]), torch.tensor([7, 3, 7])).tolist()
    [1.5, 5.0, 1.5]
    """
    return group_sum(values, present, group) / group_count(present, group).clamp_min(1)


def group_centre(
    values: Float[Tensor, " n"], present: Bool[Tensor, " n"], group: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """``values_i - mean(group)``; exactly 0 in a group without spread, hence in a group of one.

    >>> group_centre(torch.tensor([1.0, 5.0, 2.0]), torch.tensor([True, True, True]), torch.tensor([7, 3, 7])).tolist()
    [-0.5, 0.0, 0.5]
    """
    centred = known(values, present) - group_mean(values, present, group)
    return torch.where(present & ~no_spread(values, present, group), centred, torch.zeros_like(centred))


def group_std(
    values: Float[Tensor, " n"], present: Bool[Tensor, " n"], group: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Bessel-corrected standard deviation of each entry's group; exactly 0 in a group without spread.

    Two passes: ``E[x^2] - E[x]^2`` loses all digits when the mean is large.

    >>> group_std(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([True, True, True]), torch.tensor([7, 3, 7])).tolist()
    [1.4142135623730951, 0.0, 1.4142135623730951]
    """
    square = group_centre(values, present, group) ** 2
    return (group_sum(square, present, group) / (group_count(present, group) - 1).clamp_min(1)).sqrt()


def leave_one_out(
    values: Float[Tensor, " n"], present: Bool[Tensor, " n"], group: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """``values_i - mean_{j != i} values_j = K/(K-1) (values_i - mean)`` over the K present members (RLOO, 2402.14740).

    An entry without a present sibling (:func:`lone`) has no baseline: its result is 0, and callers count such entries.
    Implementations elsewhere return the raw reward there, a push that is never negative.

    >>> leave_one_out(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([True] * 3), torch.tensor([0, 0, 0])).tolist()
    [0.5, -1.0, 0.5]
    """
    count = group_count(present, group)
    return group_centre(values, present, group) * count / (count - 1).clamp_min(1)


def lone(present: Bool[Tensor, " n"], group: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Present entries whose group has no other present member: a comparison within the group says nothing of them.

    >>> lone(torch.tensor([True, True, False]), torch.tensor([7, 3, 7])).tolist()
    [True, True, False]
    """
    return present & (group_count(present, group) < 2)


def no_spread(values: Float[Tensor, " n"], present: Bool[Tensor, " n"], group: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """True where ``max - min`` of the group's present values is below 1e-6 (a group of one or none included).

    >>> no_spread(torch.tensor([0.7, 0.7 + 1e-8, 0.5]), torch.tensor([True] * 3), torch.tensor([0, 0, 1])).tolist()
    [True, True, True]
    """
    ids, index = torch.unique(group, return_inverse=True)
    wide = known(values, present)
    infinite = torch.full_like(wide, torch.inf)
    start = torch.full((len(ids),), -torch.inf, dtype=torch.float64, device=group.device)
    highest = start.scatter_reduce(0, index, torch.where(present, wide, -infinite), "amax")
    lowest = (-start).scatter_reduce(0, index, torch.where(present, wide, infinite), "amin")
    return ((highest - lowest) < TIE)[index]  # -inf - inf in a group with no present member is below TIE, too


def group_max(
    values: Float[Tensor, " n"], present: Bool[Tensor, " n"], group: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The largest present value of each entry's group; -inf for a group with none.

    >>> group_max(torch.tensor([1.0, 5.0, 2.0]), torch.tensor([True, True, True]), torch.tensor([7, 3, 7])).tolist()
    [2.0, 5.0, 2.0]
    """
    ids, index = torch.unique(group, return_inverse=True)
    start = torch.full((len(ids),), -torch.inf, dtype=torch.float64, device=group.device)
    wide = torch.where(present, known(values, present), torch.full_like(start[index], -torch.inf))
    return start.scatter_reduce(0, index, wide, "amax")[index]


def known(values: Float[Tensor, "*shape"], present: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``values`` in float64, 0 where absent. A selection, not a product: NaN * 0 is NaN.

    >>> known(torch.tensor([2.0, torch.nan]), torch.tensor([True, False])).tolist()
    [2.0, 0.0]
    """
    return torch.where(present, values.double(), torch.zeros((), dtype=torch.float64, device=values.device))
