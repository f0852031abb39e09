"""Estimates of KL(pi || ref) per token, as values and as losses. ``d = log pi - log ref``, nats.

As *values* on the policy's own samples k1 and k3 are unbiased. As *losses*, differentiated through d, only k2 has the
gradient of the reverse KL (J. Schulman, "Approximating KL Divergence").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.policy_loss import LOG_RATIO_LIMIT
from rlprm.errors import ConfigError

KlLoss = Literal["k2", "k3", "straight_through"]


def k1(d: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``d``: unbiased, high variance, may be negative.

    >>> round(k1(torch.tensor(0.2)).item(), 6)
    0.2
    """
    return d


def k2(d: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``d^2 / 2``: slightly biased as a value, right as a gradient.

    >>> round(k2(torch.tensor(0.2)).item(), 6)
    0.02
    """
    return d**2 / 2


def k3(d: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``exp(-d) - 1 + d``: unbiased, never negative; d clamped to +-20 against overflow.

    >>> round(k3(torch.tensor(0.2)).item(), 6)
    0.018731
    """
    bounded = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(-bounded) + bounded


def kl_loss(
    logprobs: Float[Tensor, "b t"],
    ref_logprobs: Float[Tensor, "b t"],
    response_mask: Bool[Tensor, "b t"],
    *,
    kind: KlLoss,
) -> Float[Tensor, "b t"]:
    """Per-token KL penalty, 0 off the mask. ``straight_through``: the value of k3 with the gradient of k2.

    >>> on = torch.tensor([[True]])
    >>> round(kl_loss(torch.tensor([[0.2]]), torch.tensor([[0.0]]), on, kind="k2").item(), 6)
    0.02

    Raises:
        ConfigError: k1, or an unknown kind.
    """
    if kind == "k1":
        raise ConfigError("k1 as a loss has zero expected gradient; use k2 or straight_through, or k1 in the reward")
    if kind not in ("k2", "k3", "straight_through"):
        raise ConfigError(f"KL loss is {kind!r}; expected k2, k3 or straight_through")
    zero = torch.zeros_like(logprobs)
    d = torch.where(response_mask, logprobs, zero) - torch.where(response_mask, ref_logprobs, zero)
    if kind == "k3":
        return k3(d)
    if kind == "k2":
        return k2(d)
    return k2(d) + (k3(d) - k2(d)).detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustRegion:
    """A squared hinge on KL(pi_old || pi), priced only beyond ``delta`` nats per token (DisCO, DRPO: arXiv:2510.04474).

    The loss gains ``sg(factor) * KL``, whose gradient is that of ``weight / 2 * max(KL - delta, 0)^2``. KL is the mean of
    ``log pi_old - log pi`` over all response tokens of the optimizer step: its gradient on samples of pi_old is right.

    >>> region = TrustRegion(weight=1000.0, delta=1e-4)
    >>> round(region.factor(0.0021), 6), region.factor(5e-5)
    (2.0, 0.0)
    """

    weight: float
    delta: float

    def factor(self, kl: float) -> float:
        """``max(weight (KL - delta), 0)``."""
        return max(self.weight * (kl - self.delta), 0.0)
