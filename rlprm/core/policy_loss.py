"""Policy losses per token, and the weights that turn them into one number.

A loss here is a function ``(logprobs, old_logprobs, advantages, response_mask, **settings) -> (loss, indicators)`` on
tensors of any layout. The scalar is :func:`weighted_sum` with :func:`aggregation_weights`; its denominators are those
of the whole optimizer step, so loss and gradient do not depend on how the step is split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlprm.core.implicit import sequence_sums
from rlprm.errors import ConfigError
from rlprm.roles import Reduce

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum"]
LOG_RATIO_LIMIT = 20.0  # e^20 = 5e8: beyond, float32 exponentials of bf16 noise overflow


def ppo_clip(
    logprobs: Float[Tensor, "b t"],
    old_logprobs: Float[Tensor, "b t"],
    advantages: Float[Tensor, "b t"],
    response_mask: Bool[Tensor, "b t"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Float[Tensor, "b t"], dict[str, Float[Tensor, "b t"]]]:
    """``-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)``, and for A < 0 at most ``-dual_clip A``.

    ``rho = exp(logprobs - old_logprobs)``, the log-ratio clamped to +-20 (PPO, arXiv:1707.06347; asymmetric bounds:
    DAPO, arXiv:2503.14476; dual clip: arXiv:1912.09729). PRIME's README writes the ratio against pi_ref; it is pi_old.

    Indicators per token, for means over response tokens: ``pg_clipfrac`` (the clipped branch decides),
    ``pg_clipfrac_lower`` (the dual clip decides), ``ppo_kl`` (``log pi_old - log pi``, nats), ``ratio``.

    >>> on = torch.tensor([[True]])
    >>> loss, told = ppo_clip(torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[2.0]]), on, clip_low=0.2,
    ...                       clip_high=0.28, dual_clip=None)
    >>> round(loss.item(), 4), told["pg_clipfrac"].item()
    (-2.56, 1.0)

    Raises:
        ConfigError: clip bounds that leave no band around 1, or a dual clip that is not above 1.
    """
    if not (0 < clip_low <= 1 and clip_high > 0):
        raise ConfigError(f"clip bounds are {clip_low}, {clip_high}; expected clip_low in (0, 1] and clip_high above 0")
    if dual_clip is not None and not dual_clip > 1:
        raise ConfigError(f"dual_clip is {dual_clip}; expected a number above 1, or null for none")
    zero = torch.zeros_like(logprobs)
    # Masked before any arithmetic: where() after it would still send NaN into the gradient.
    new, old, gain = (torch.where(response_mask, each, zero) for each in (logprobs, old_logprobs, advantages))
    log_ratio = (new - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    free, clipped = -gain * ratio, -gain * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(free, clipped)
    lowered = torch.zeros_like(response_mask)
    if dual_clip is not None:
        ceiling = -dual_clip * gain
        lowered = (gain < 0) & (loss > ceiling)
        loss = torch.where(lowered, ceiling, loss)
    indicators = {
        "pg_clipfrac": ((clipped > free) & response_mask).to(loss.dtype),
        "pg_clipfrac_lower": (lowered & response_mask).to(loss.dtype),
        "ppo_kl": (old - new).detach(),
        "ratio": torch.where(response_mask, ratio, zero).detach(),
    }
    return torch.where(response_mask, loss, zero), indicators


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """What one optimizer step divides by, over all ranks and micro-batches."""

    tokens: float  # response tokens
    sequences: float  # sequences with at least one response token

    @classmethod
    def count(cls, response_lengths: Int[Tensor, " n"], reduce: Reduce) -> Denominators:
        """The denominators of sequences with these many response tokens (0: fully masked, excluded).

        >>> from rlprm.core.reduce import Identity
        >>> Denominators.count(torch.tensor([2, 0, 3]), Identity())
        Denominators(tokens=5.0, sequences=2.0)
        """
        counts = torch.stack([response_lengths.sum(), (response_lengths > 0).sum()]).double()
        tokens, sequences = reduce.sum(counts).tolist()
        return cls(tokens=tokens, sequences=sequences)


def aggregation_weights(
    response_mask: Bool[Tensor, "b t"],
    sequence: Int[Tensor, "b t"],
    num_sequences: int,
    *,
    mode: Aggregation,
    denominators: Denominators,
    horizon: int | None,
) -> Float[Tensor, "b t"]:
    """Per-token weights w such that the loss of the optimizer step is ``sum w * loss`` over all its micro-batches.

    ======================= ==================================== =========================
    token-mean              ``1 / tokens``                       DAPO
    seq-mean-token-mean     ``1 / (sequences * L_i)``            GRPO
    seq-mean-token-sum      ``1 / sequences``                    REINFORCE
    seq-mean-token-sum-norm ``1 / (sequences * horizon)``        Dr. GRPO (horizon: the response limit)
    token-sum               ``1``
    ======================= ==================================== =========================

    A sequence must lie in one micro-batch whole. Fully masked sequences weigh nothing and are in no denominator.

    >>> on = torch.tensor([[True, True, True]])
    >>> aggregation_weights(on, torch.tensor([[0, 0, 1]]), 2, mode="seq-mean-token-mean",
    ...                     denominators=Denominators(tokens=3.0, sequences=2.0), horizon=None).tolist()
    [[0.25, 0.25, 0.5]]

    Raises:
        ConfigError: an unknown mode, a horizon that is missing or read by nobody, or a step without response tokens.
    """
    if mode not in get_args(Aggregation):
        raise ConfigError(f"loss aggregation is {mode!r}; expected one of {', '.join(get_args(Aggregation))}")
    if (mode == "seq-mean-token-sum-norm") != (horizon is not None):
        raise ConfigError(f"horizon is {horizon} with aggregation {mode}; seq-mean-token-sum-norm alone needs one")
    if denominators.tokens <= 0 or denominators.sequences <= 0:
        raise ConfigError(f"the optimizer step has {denominators}; a step without response tokens must be skipped")
    ones = response_mask.to(torch.float32)
    if mode == "token-sum":
        return ones
    if mode == "token-mean":
        return ones / denominators.tokens
    weights = ones / denominators.sequences
    if mode == "seq-mean-token-mean":
        lengths = sequence_sums(ones, sequence, num_sequences).clamp_min(1)
        return torch.where(response_mask, weights / lengths[sequence.clamp_min(0)], torch.zeros_like(weights))
    return weights if horizon is None else weights / horizon


def weighted_sum(loss: Float[Tensor, "b t"], weights: Float[Tensor, "b t"]) -> Float[Tensor, ""]:
    """``sum w * loss`` over the tokens whose weight is not 0.

    >>> weighted_sum(torch.tensor([[2.0, torch.nan]]), torch.tensor([[0.5, 0.0]])).item()
    1.0
    """
    return (torch.where(weights != 0, loss, torch.zeros_like(loss)) * weights).sum()
