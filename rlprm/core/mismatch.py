"""The gap between the engine that sampled (mu) and the policy at the start of its update (pi_old)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.metrics import Max, Mean, Metric
from rlprm.core.policy_loss import LOG_RATIO_LIMIT
from rlprm.errors import ConfigError

Correction = Literal["none", "truncate", "band", "sequence_truncate"]


def mismatch_weights(
    old_logprobs: Float[Tensor, "B T"],
    rollout_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    mode: Correction,
    cap: float | None,
    low: float | None,
) -> Float[Tensor, "B T"]:
    """Importance weights ``w_t = pi_old / mu`` that multiply the per-token loss; detached, 1 off the mask.

    ``none``: 1. ``truncate``: ``min(w_t, cap)`` (truncated importance sampling; 2 is usual). ``band``: ``w_t`` inside
    [low, cap], else 0. ``sequence_truncate``: ``min(prod_t w_t, cap)``, the same for the whole row. The PPO ratio stays
    ``pi / pi_old``; where mu is taken *as* pi_old, the ratio holds the correction already and the mode must be none.

    >>> row = torch.tensor([[0.0, -1.0]])
    >>> mismatch_weights(row, 2 * row, row < 0, mode="truncate", cap=2.0, low=None).tolist()
    [[1.0, 2.0]]

    Raises:
        ConfigError: an unknown mode, a bound it needs and lacks, or one it would not read.
    """
    if mode not in get_args(Correction):
        raise ConfigError(f"rollout correction is {mode!r}; expected one of {', '.join(get_args(Correction))}")
    if (mode != "none") != (cap is not None) or (mode == "band") != (low is not None):
        raise ConfigError(f"rollout correction {mode} with cap {cap} and low {low}: none takes no bound, band takes "
                          "both, the others take cap alone; set the rest to null")  # fmt: skip
    if (cap is not None and not cap >= 1) or (low is not None and not 0 <= low <= 1):
        raise ConfigError(f"rollout correction bounds are low {low}, cap {cap}; expected low in [0, 1] and cap >= 1")
    ones = torch.ones_like(old_logprobs)
    if cap is None:
        return ones
    gap = _gap(old_logprobs, rollout_logprobs, mask)
    if mode == "sequence_truncate":
        gap = gap.sum(1, keepdim=True).expand_as(gap)
    weights = gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if low is not None:
        weights = torch.where((weights >= low) & (weights <= cap), weights, torch.zeros_like(weights))
    return torch.where(mask, weights.clamp_max(cap), ones)


def mismatch_metrics(
    old_logprobs: Float[Tensor, "B T"],
    rollout_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
) -> dict[str, Metric]:
    """``|pi_old - mu|`` in probability, ``KL(mu || pi_old)`` by k1 and k3 in nats, and what the correction did.

    The clip fraction counts tokens whose weight is not ``pi_old / mu`` itself, mode ``none`` left aside.
    """
    gap = _gap(old_logprobs, rollout_logprobs, mask)[mask]
    old, rollout = old_logprobs[mask].detach().double(), rollout_logprobs[mask].double()
    difference = (old.exp() - rollout.exp()).abs()
    used = weights[mask].double()
    ratio = gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().double()
    changed = ((used - ratio).abs() > 1e-6 * ratio) & bool((used != 1).any())
    return {
        "training/rollout_probs_diff_mean": Mean.of(difference),
        "training/rollout_probs_diff_max": Max.of(difference),
        "training/rollout_logprobs_diff_max": Max.of((old - rollout).abs()),
        "training/rollout_kl": Mean.of(-gap),
        "training/rollout_k3": Mean.of(ratio - 1 - gap.double()),
        "training/rollout_is_mean": Mean.of(used),
        "training/rollout_is_max": Max.of(used),
        "training/rollout_is_changed_frac": Mean.of(changed.double()),
    }


def _gap(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    zero = torch.zeros_like(old_logprobs)
    return torch.where(mask, old_logprobs.detach(), zero) - torch.where(mask, rollout_logprobs, zero)
