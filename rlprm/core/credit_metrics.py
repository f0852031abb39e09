"""What is measured of streams and their parts: global, over present entries, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.groups import TIE, group_count, known, lone, no_spread
from rlprm.records import Shard, Stream
from rlprm.roles import Reduce


def reward_metrics(streams: Mapping[str, Stream], shard: Shard, reduce: Reduce) -> dict[str, float]:
    """``reward/{stream}/*``: mean, std, min, max over present entries, before any normalization.

    ``frac_present``: responses with a reward over all trained responses. ``frac_zero_std``: groups whose present
    responses all earn the same sum (one response included), over groups with a present response: they carry no signal
    within the group. ``frac_lone``: responses with a reward but without a sibling to be compared with, over those with
    a reward. Without any present entry only ``frac_present`` (0) is told.
    """
    metrics = {}
    for name, stream in streams.items():
        metrics |= {f"reward/{name}/{key}": value for key, value in _reward(stream, shard, reduce).items()}
    return metrics


def _reward(stream: Stream, shard: Shard, reduce: Reduce) -> dict[str, float]:
    entries = known(stream.rewards, stream.present)
    there = stream.present.any(1)
    sums = entries.sum(1)
    # Each response carries 1/K of its group, so that the sum over responses counts groups.
    share_of_group = known(1 / group_count(there, shard.group).clamp_min(1), there)
    flat = no_spread(sums, there, shard.group)
    alone = lone(there, shard.group)
    count, total, responses, trained, groups, flat_groups, lonely = reduce.sum(
        torch.stack(
            [
                stream.present.sum().double(),
                entries.sum(),
                there.sum().double(),
                shard.train.sum().double(),
                share_of_group.sum(),
                known(share_of_group, flat).sum(),
                alone.sum().double(),
            ]
        )
    )
    low = torch.full((1,), -torch.inf, dtype=torch.float64, device=entries.device)
    wide, present = stream.rewards.double(), stream.present
    highest = reduce.max(torch.cat([wide[present], low]).amax())
    lowest = -reduce.max(torch.cat([-wide[present], low]).amax())
    mean = total / count.clamp_min(1)
    square = reduce.sum((known(entries - mean, present) ** 2).sum())
    frac_present = float(responses / trained.clamp_min(1))
    if count == 0:
        return {"frac_present": frac_present}
    return {
        "mean": float(mean),
        "std": float((square / (count - 1).clamp_min(1)).sqrt()),
        "min": float(lowest),
        "max": float(highest),
        "frac_present": frac_present,
        "frac_zero_std": float(flat_groups / groups.clamp_min(1)),
        "frac_lone": float(lonely / responses.clamp_min(1)),
    }


def agreement_metrics(streams: Mapping[str, Stream], shard: Shard, reduce: Reduce) -> dict[str, float]:
    """``reward/{stream}/right_mean, wrong_mean, right_wrong_gap, corr_with_outcome``: does what is paid follow what is right?

    Of each stream but `outcome` (which is the question) and `kl`: ``S_i``, the sum of response i's present rewards, over
    trained responses that have a reward and a verdict; right means an outcome above 1/2. The correlation is Pearson's
    between ``S_i`` and the outcome. Taken before any merge, so that it tells of the source and not of a gate on outcomes.
    What the responses do not allow (none is right, nothing varies) is left out.
    """
    metrics = {}
    for name, stream in streams.items():
        if name not in ("outcome", "kl"):
            metrics |= {f"reward/{name}/{key}": value for key, value in _agreement(stream, shard, reduce).items()}
    return metrics


def _agreement(stream: Stream, shard: Shard, reduce: Reduce) -> dict[str, float]:
    counted = (stream.present & shard.response_mask).any(1) & shard.outcome_present & shard.train
    earned = known(known(stream.rewards, stream.present & shard.response_mask).sum(1), counted)
    outcome = known(shard.outcome, counted)
    right = counted & (shard.outcome > 0.5)
    count, num_right, total, total_right, outcomes = reduce.sum(
        torch.stack(
            [
                counted.sum().double(),
                right.sum().double(),
                earned.sum(),
                known(earned, right).sum(),
                outcome.sum(),
            ]
        )
    )
    number = count.clamp_min(1)
    x, y = known(earned - total / number, counted), known(outcome - outcomes / number, counted)
    squares, other_squares, products = reduce.sum(torch.stack([(x**2).sum(), (y**2).sum(), (x * y).sum()]))
    found = {}
    if num_right > 0:
        found["right_mean"] = float(total_right / num_right)
    if count > num_right:
        found["wrong_mean"] = float((total - total_right) / (count - num_right))
    if len(found) == 2:
        found["right_wrong_gap"] = found["right_mean"] - found["wrong_mean"]
    # A stream of equal rewards has a variance of rounding errors, and a correlation of noise with it.
    if squares > TIE**2 * number and other_squares > TIE**2 * number:
        found["corr_with_outcome"] = float(products / (squares * other_squares).sqrt())
    return found


def advantage_metrics(
    parts: Mapping[str, Float[Tensor, "B T"]],
    total: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    reduce: Reduce,
) -> dict[str, float]:
    """``adv/{stream}/*``: mean, abs_mean, std of each part and ``share = cov(part, total) / var(total)``.

    Over the trained response tokens of the whole batch. Shares sum to 1, because the parts sum to the total; each is
    the fraction of the update's variance that the stream accounts for (negative: it works against the rest). Where the
    total has no variance there is no share to tell, and all are 0.
    """
    names = list(parts)
    stacked = torch.stack([known(part, mask) for part in [*parts.values(), total]])
    count, *moments = reduce.sum(torch.stack([mask.sum().double(), *stacked.sum((1, 2)), *stacked.abs().sum((1, 2))]))
    number = count.clamp_min(1)
    means = torch.stack(moments[: len(stacked)]) / number
    deviation = torch.where(mask, stacked - means[:, None, None], torch.zeros_like(stacked))
    covariance, variance = reduce.sum(
        torch.stack([(deviation * deviation[-1]).sum((1, 2)), (deviation**2).sum((1, 2))])
    )
    metrics = {}
    for index, name in enumerate(names):
        metrics |= {
            f"adv/{name}/mean": float(means[index]),
            f"adv/{name}/abs_mean": float(moments[len(stacked) + index] / number),
            f"adv/{name}/std": float((variance[index] / (number - 1).clamp_min(1)).sqrt()),
            f"adv/{name}/share": float(covariance[index] / variance[-1]) if variance[-1] > 0 else 0.0,
        }
    return metrics
