"""PURE's credit assignment by the worst step (arXiv:2504.15275): a soft minimum instead of a sum.

Unlike the other estimators it is not linear, and with a baseline it looks at the other responses of the group, so it
centres by itself: the stream's normalizer must not do it again.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.groups import group_count, group_sum
from rlprm.core.steps import place_at_step_ends, step_ends, step_sums
from rlprm.errors import ConfigError
from rlprm.records import Shard

Baseline = Literal["none", "token", "step"]


def pure_softmin(
    rewards: Float[Tensor, "B T"],
    present: Bool[Tensor, "B T"],
    shard: Shard,
    *,
    temperature: float | None,
    baseline: Baseline,
    zero_ends: bool,
) -> Float[Tensor, "B T"]:
    """``A_t = sum over the steps h from t's on of (w_h R_h - b_h)``, ``w = softmax(-R / temperature)`` over the steps.

    Without a temperature ``w = 1``: the plain sum of step rewards, which PURE shows to collapse. (The released code's switch
    for that has ``w = 1 / H``, a very high temperature here.)

    ``baseline`` ``token``: ``b_h = (tokens of h but its end) * sum_{j != i} S_j / sum_{j != i} L_j`` with ``S_j`` the
    sum of response j's weighted rewards and ``L_j`` its tokens; ``step``: ``b_h = mean_{j != i} S_j / H_j`` with ``H_j``
    its steps, which favours few long steps (a known hack). A response without a rewarded sibling has no baseline and
    gets 0. ``zero_ends``: a step's last token, where the separator or EOS is, gets 0.

    The formulas are those of the authors' code. Their paper divides by the longest allowed response instead of the
    siblings' tokens. There advantages of step ends are taken away after the verifier's and the KL's part are added, too;
    here each stream speaks for itself, so those parts keep theirs. Steps without a reward have no weight and no
    baseline, nor do they count in H.

    >>> step_weights(torch.tensor([[0.9, -0.2, 0.6]]), torch.tensor([[True, True, True]]), 0.1).round(decimals=6).tolist()
    [[1.7e-05, 0.999648, 0.000335]]

    Raises:
        ConfigError: more than one reward in a step, a temperature that is not above 0, or an unknown baseline.
    """
    _check(temperature, baseline)
    received = present & shard.response_mask
    number = step_sums(torch.ones_like(rewards), received, shard.step_index)
    if bool((number > 1).any()):
        raise ConfigError(
            "pure_softmin takes one reward per step and found several in one; use a source that pays steps, or a splitter "
            "and a granularity that agree"
        )
    there = number > 0
    scores = step_sums(rewards, received, shard.step_index)
    paid = step_weights(scores, there, temperature) * scores
    shifted = paid - _baseline(paid, there, shard, baseline)
    judged = there if baseline == "none" else there & _has_sibling(there, shard)[:, None]
    at_ends, _ = place_at_step_ends(torch.where(judged, shifted, torch.zeros_like(shifted)), judged, shard.step_index)
    returns = at_ends.flip(1).cumsum(1).flip(1)
    kept = shard.response_mask & ~step_ends(shard.step_index) if zero_ends else shard.response_mask
    return torch.where(kept, returns, torch.zeros_like(returns)).to(rewards.dtype)


def step_weights(
    scores: Float[Tensor, "B S"], there: Bool[Tensor, "B S"], temperature: float | None
) -> Float[Tensor, "B S"]:
    """``softmax(-R / temperature)`` over the steps that are there, in float64; 0 elsewhere. No temperature: 1."""
    if temperature is None:
        return there.double()
    lowest = -scores.double() / temperature
    logits = torch.where(there, lowest, torch.full_like(lowest, -torch.inf))
    weights = logits.softmax(1)  # NaN in a row without any step
    return torch.where(there, weights, torch.zeros_like(weights))


def _baseline(paid: Tensor, there: Tensor, shard: Shard, baseline: Baseline) -> Tensor:
    """What is taken from each step's weighted reward, from the group's other responses."""
    if baseline == "none":
        return torch.zeros_like(paid)
    rows = there.any(1)
    total = paid.sum(1)
    if baseline == "step":
        mean = total / there.sum(1).clamp_min(1)
        siblings = (group_count(rows, shard.group) - 1).clamp_min(1)
        return ((group_sum(mean, rows, shard.group) - mean) / siblings)[:, None].expand_as(paid)
    length = shard.response_mask.sum(1).double()
    others = (group_sum(length, rows, shard.group) - length).clamp_min(1)
    per_token = (group_sum(total, rows, shard.group) - total) / others
    inner = shard.response_mask & ~step_ends(shard.step_index)
    return per_token[:, None] * step_sums(inner.double(), inner, shard.step_index)


def _has_sibling(there: Tensor, shard: Shard) -> Tensor:
    return group_count(there.any(1), shard.group) > 1


def _check(temperature: float | None, baseline: Baseline) -> None:
    if temperature is not None and not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(
            f"temperature is {temperature}; expected a number above 0, such as 0.1, or null for plain sums"
        )
    if baseline not in ("none", "token", "step"):
        raise ConfigError(f"baseline is {baseline!r}; expected none, token or step")
