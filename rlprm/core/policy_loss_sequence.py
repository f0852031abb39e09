"""Policy losses whose ratio is the sequence's, not the token's (GSPO, arXiv:2507.18071)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rlprm.core.implicit import sequence_sums
from rlprm.core.policy_loss import Choices, check_band


def gspo(
    given: Choices, *, clip_low: float, clip_high: float
) -> tuple[Float[Tensor, "b t"], dict[str, Float[Tensor, "b t"]]]:
    """``-min(s_i A_t, clip(s_i, 1 - clip_low, 1 + clip_high) A_t)``, ``s_i = exp(mean_t log rho_t)`` of the sequence.

    Source: arXiv:2507.18071. All tokens share one ratio, so what a sequence learns is the *mean* of its advantages:
    the credit of single tokens is averaged away. With process rewards take :func:`gspo_token`. The loss of a sequence
    is the mean over its tokens (aggregation seq-mean-token-mean), as there. Differs from the authors: log-ratios are
    clamped to +-20 per token.

    Told besides ``ratio`` (the token's) and ``ppo_kl``: ``pg_clipfrac`` (the clipped branch decides) and
    ``sequence_ratio`` (s_i).

    >>> one = torch.tensor([[0, 0]])
    >>> given = Choices(logprobs=torch.tensor([[0.3, 0.1]]), old_logprobs=one + 0.0, advantages=one + 1.0,
    ...                 response_mask=one == 0, sequence=one, num_sequences=1)
    >>> [round(each, 4) for each in gspo(given, clip_low=0.5, clip_high=0.5)[0][0].tolist()]  # -exp(0.2)
    [-1.2214, -1.2214]

    Raises:
        ConfigError: clip bounds that leave no band around 1.
    """
    check_band(clip_low, clip_high)
    own = given.masked()
    return _clipped(own, _mean_log_ratio(own).exp(), clip_low, clip_high)


def gspo_token(
    given: Choices, *, clip_low: float, clip_high: float
) -> tuple[Float[Tensor, "b t"], dict[str, Float[Tensor, "b t"]]]:
    """:func:`gspo` with ``s_{i,t} = sg(s_i) pi_t / sg(pi_t)``: the sequence's ratio as value, the token's own gradient.

    Source: arXiv:2507.18071, section 4.3. Each token keeps its own advantage, so process rewards reach their tokens;
    where the advantages of a sequence are equal, value and gradient of its loss are those of :func:`gspo`.

    >>> one = torch.tensor([[0, 0]])
    >>> given = Choices(logprobs=torch.tensor([[0.3, 0.1]]), old_logprobs=one + 0.0, advantages=torch.tensor([[1.0, 0]]),
    ...                 response_mask=one == 0, sequence=one, num_sequences=1)
    >>> [round(each, 4) + 0 for each in gspo_token(given, clip_low=0.5, clip_high=0.5)[0][0].tolist()]
    [-1.2214, 0.0]

    Raises:
        ConfigError: clip bounds that leave no band around 1.
    """
    check_band(clip_low, clip_high)
    own = given.masked()
    ratio = _mean_log_ratio(own).detach().exp() * (own.logprobs - own.logprobs.detach()).exp()
    return _clipped(own, ratio, clip_low, clip_high)


def _mean_log_ratio(own: Choices) -> Float[Tensor, "b t"]:
    """``mean_t log rho_t`` of each token's sequence."""
    sums = sequence_sums(own.log_ratio, own.sequence, own.num_sequences)
    lengths = sequence_sums(own.response_mask.to(sums.dtype), own.sequence, own.num_sequences)
    return (sums / lengths.clamp_min(1))[own.sequence.clamp_min(0)]


def _clipped(own: Choices, ratio: Tensor, low: float, high: float) -> tuple[Tensor, dict[str, Tensor]]:
    free, clipped = -own.advantages * ratio, -own.advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(free, clipped), own.indicators(pg_clipfrac=clipped > free, sequence_ratio=ratio)
