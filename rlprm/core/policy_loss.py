"""Policy losses per token, and the weights that turn them into one number.

A loss here is a function ``(given: Choices, **settings) -> (loss, indicators)`` on tensors of any layout; more of them
are in :mod:`rlprm.core.policy_loss_sequence` and :mod:`rlprm.core.policy_loss_free`. The scalar is :func:`weighted_sum`
with :func:`aggregation_weights`; its denominators are those of the whole optimizer step, so loss and gradient do not
depend on how the step is split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlprm.core.implicit import sequence_sums
from rlprm.errors import ConfigError
from rlprm.roles import Reduce

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum"]
LOG_RATIO_LIMIT = 20.0  # e^20 = 5e8: beyond, float32 exponentials of bf16 noise overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The tokens of one micro-batch as a loss sees them; each sequence lies in it whole."""

    logprobs: Float[Tensor, "b t"]  # log pi of the policy that learns, nats; gradients flow
    old_logprobs: Float[Tensor, "b t"]  # log pi_old, before the batch's first update
    advantages: Float[Tensor, "b t"]
    response_mask: Bool[Tensor, "b t"]  # nothing is read off it
    sequence: Int[Tensor, "b t"]  # which of the num_sequences a token belongs to; -1 on padding
    num_sequences: int

    def masked(self) -> Choices:
        """The same with 0 off the mask: a selection before any arithmetic, so that NaN reaches no gradient either."""
        zero = torch.zeros_like(self.logprobs)
        logprobs, old_logprobs, advantages = (
            torch.where(self.response_mask, each, zero) for each in (self.logprobs, self.old_logprobs, self.advantages)
        )
        return replace(self, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)

    @property
    def log_ratio(self) -> Float[Tensor, "b t"]:
        """``log pi - log pi_old``, clamped to +-20."""
        return (self.logprobs - self.old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    def indicators(self, **told: Tensor) -> dict[str, Float[Tensor, "b t"]]:
        """Per token, for means over response tokens: ``ratio``, ``ppo_kl`` (``log pi_old - log pi``, nats), ``told``."""
        zero = torch.zeros_like(self.logprobs)
        named = {"ratio": self.log_ratio.exp(), "ppo_kl": self.old_logprobs - self.logprobs, **told}
        return {
            name: torch.where(self.response_mask, values.detach().to(zero.dtype), zero)
            for name, values in named.items()
        }


def one_choice() -> Choices:
    """One token at which nothing has moved, for trying a loss with its settings.

    >>> ppo_clip(one_choice(), clip_low=0.2, clip_high=0.2, dual_clip=None)[0].item()
    -1.0
    """
    zero = torch.zeros(1, 1)
    return Choices(
        logprobs=zero - 1,
        old_logprobs=zero - 1,
        advantages=zero + 1,
        response_mask=zero == 0,
        sequence=zero.to(torch.int64),
        num_sequences=1,
    )


def check_band(clip_low: float, clip_high: float) -> None:
    """Refuse clip bounds that leave no band around 1.

    Raises:
        ConfigError: always with what was found.
    """
    if not (0 < clip_low <= 1 and clip_high > 0):
        raise ConfigError(f"clip bounds are {clip_low}, {clip_high}; expected clip_low in (0, 1] and clip_high above 0")


def ppo_clip(
    given: Choices, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Float[Tensor, "b t"], dict[str, Float[Tensor, "b t"]]]:
    """``-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)``, and for A < 0 at most ``-dual_clip A``.

    ``rho = exp(logprobs - old_logprobs)``, the log-ratio clamped to +-20 (PPO, arXiv:1707.06347; asymmetric bounds:
    DAPO, arXiv:2503.14476; dual clip: arXiv:1912.09729). PRIME's README writes the ratio against pi_ref; it is pi_old.

    Told besides ``ratio`` and ``ppo_kl``: ``pg_clipfrac`` (the clipped branch decides) and ``pg_clipfrac_lower`` (the
    dual clip decides).

    >>> moved = replace(one_choice(), logprobs=torch.tensor([[0.0]]))  # from log-prob -1: the ratio is e
    >>> loss, told = ppo_clip(moved, clip_low=0.2, clip_high=0.28, dual_clip=None)
    >>> round(loss.item(), 4), told["pg_clipfrac"].item()
    (-1.28, 1.0)

    Raises:
        ConfigError: clip bounds that leave no band around 1, or a dual clip that is not above 1.
    """
    check_band(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ConfigError(f"dual_clip is {dual_clip}; expected a number above 1, or null for none")
    own = given.masked()
    gain, ratio = own.advantages, own.log_ratio.exp()
    free, clipped = -gain * ratio, -gain * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(free, clipped)
    lowered = torch.zeros_like(own.response_mask)
    if dual_clip is not None:
        ceiling = -dual_clip * gain
        lowered = (gain < 0) & (loss > ceiling)
        loss = torch.where(lowered, ceiling, loss)
    return loss, own.indicators(pg_clipfrac=clipped > free, pg_clipfrac_lower=lowered)


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
