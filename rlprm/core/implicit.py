"""The implicit process reward model: rewards from log-ratios, learnt from outcomes.

``r_phi(y) = beta * sum_t (log pi_phi(y_t | y_<t) - log pi_ref(y_t | y_<t))`` (Free Process Rewards, arXiv:2412.01981).
Any loss on ``r_phi(y)`` yields process rewards for free, because partial sums of the log-ratio are a Q function.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlprm.core.steps import last_of, step_counts, to_step_ends
from rlprm.errors import ConfigError
from rlprm.records import Stream

Granularity = Literal["token", "step", "whole"]
LastToken = Literal["keep", "drop"]


def implicit_rewards(
    prm_logprobs: Float[Tensor, "*shape"],
    ref_logprobs: Float[Tensor, "*shape"],
    response_mask: Bool[Tensor, "*shape"],
    beta: float,
) -> Float[Tensor, "*shape"]:
    """``beta * (log pi_phi - log pi_ref)`` on the response, 0 elsewhere (PRIME, arXiv:2502.01456, eq. 5).

    Nats times beta; differentiable in ``prm_logprobs``. ``beta`` is part of the reward here, as in the paper. PRIME's
    own repository uses the raw log-ratio as reward and beta in the loss only; under the return-range normalizer the
    scale cancels, under any other it does not.

    >>> on = torch.tensor([[False, True]])
    >>> implicit_rewards(torch.tensor([[0.0, -1.0]]), torch.tensor([[9.0, -3.0]]), on, 0.5).tolist()
    [[0.0, 1.0]]
    """
    zero = torch.zeros_like(prm_logprobs)
    # Selected before the subtraction: a NaN under the mask must not reach the gradient either.
    return beta * (torch.where(response_mask, prm_logprobs, zero) - torch.where(response_mask, ref_logprobs, zero))


def implicit_stream(
    prm_logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    step_index: Int[Tensor, "B T"],
    *,
    beta: float,
    granularity: Granularity,
) -> Stream:
    """The implicit rewards as a stream, detached: one per token, per step (at its last token) or per response (at its
    last token).

    The EOS token keeps its reward. PRIME's repository has no step granularity; its ``whole`` puts the sum on the last
    token but subtracts the baseline on every token. Here only the last token is present.

    >>> row = torch.tensor([[-1.0, -2.0]])
    >>> implicit_stream(row, 2 * row, row < 0, torch.tensor([[0, 0]]), beta=1.0, granularity="step").rewards.tolist()
    [[0.0, 3.0]]

    Raises:
        ConfigError: an unknown granularity.
    """
    rewards = implicit_rewards(prm_logprobs, ref_logprobs, response_mask, beta).detach()
    if granularity == "token":
        return Stream(rewards=rewards, present=response_mask)
    if granularity not in ("step", "whole"):
        raise ConfigError(f"granularity is {granularity!r}; expected token, step or whole")
    spans = step_index if granularity == "step" else torch.where(response_mask, 0, -1)
    summed, present = to_step_ends(rewards, response_mask, spans)
    return Stream(rewards=summed, present=present)


def drop_last(stream: Stream, response_mask: Bool[Tensor, "B T"]) -> Stream:
    """The stream with reward 0 on each response's last token, which stays present: it still counts in a mean.

    What verl's PRIME recipe pays by leaving out that token (EOS, as a rule); a response of one token then earns 0.

    >>> row = torch.tensor([[1.0, 2.0, 4.0]])
    >>> on = torch.tensor([[False, True, True]])
    >>> drop_last(Stream(rewards=row, present=on), on).rewards.tolist()
    [[1.0, 2.0, 0.0]]
    """
    last = last_of(response_mask, torch.where(response_mask, 0, -1))
    return Stream(rewards=torch.where(last, torch.zeros_like(stream.rewards), stream.rewards), present=stream.present)


def sequence_sums(
    values: Float[Tensor, "b t"], sequence: Int[Tensor, "b t"], num_sequences: int
) -> Float[Tensor, " n"]:
    """``sum_{t of sequence i} values`` for each of the ``num_sequences``; padded and packed layouts alike.

    Tokens whose sequence is -1 (padding) are not read.

    >>> sequence_sums(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[0, 0, 1, -1]]), 2).tolist()
    [3.0, 4.0]
    """
    real = sequence >= 0
    return values.new_zeros(num_sequences).index_add(0, sequence[real], values[real])


def steps_of(step_index: Int[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Reasoning steps of each row, at least 1, so that a response without a token can be divided by them.

    >>> steps_of(torch.tensor([[-1, 0, 0, 1], [-1, -1, -1, -1]])).tolist()
    [2, 1]
    """
    return step_counts(step_index).clamp_min(1)
