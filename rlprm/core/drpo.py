"""Decoupled reward policy optimisation: right and wrong responses are weighed each among their own kind."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.groups import group_count, group_max, group_sum, known
from rlprm.core.steps import last_of
from rlprm.errors import ConfigError
from rlprm.records import Shard
from rlprm.roles import Reduce


def drpo(
    rewards: Float[Tensor, "B T"],
    present: Bool[Tensor, "B T"],
    shard: Shard,
    reduce: Reduce,
    *,
    tau: float,
    lam: float,
    max_length: int,
) -> Float[Tensor, "B T"]:
    """Weights of whole responses: ``K w_i / sum w`` for right ones, ``-K softmax_j(s_j / tau)`` for wrong ones.

    Source: DRPO (arXiv:2510.04474), whose loss per question is ``-sum_{i right} (w_i / sum w) (s_i - LSE_wrong)`` with
    ``s_i`` the length-mean log-prob, ``w_i = exp((1 - L_i / max_length) / lam)`` and ``LSE_wrong = tau log sum_{j wrong}
    exp(s_j / tau)``. Its gradient is that of ``-sum_i a_i s_i`` with the numbers above without K, so right answers are
    never pushed down for being long: length shares out what the right ones gain among themselves. A response is right
    at reward 1 and wrong at 0; a group without both gets 0, as does a graded reward.

    The factor K (judged responses of the group) belongs to the aggregation seq-mean-token-mean, which weighs a token by
    ``1 / (n L_i)``: with n = K Q rows, ``K a_i / (n L_i) = a_i / (Q L_i)``, the gradient of ``a_i s_i / Q``. Q counts the
    skipped questions too, as in the authors' code. Where groups differ in size (absent verdicts) or rows are dropped by
    ``select``, a question weighs in proportion to its size.

    Differs from the authors, who compute the softmax anew in each mini-batch: here ``s_j`` is the sampling engine's
    (``log mu``, which is log pi_old up to the gap between engine and trainer) and stays as it is for all updates of the
    batch. Their L_max is the width of the padded batch; here it is a setting.

    >>> from rlprm.core.reduce import Identity
    >>> from rlprm.core.probe import made_up
    >>> shard, ends = made_up(), torch.tensor([[False, False, False, True]] * 2)  # a wrong and a right response
    >>> drpo(shard.outcome[:, None] * ends, ends, shard, Identity(), tau=10.0, lam=0.1, max_length=8)[:, 3].tolist()
    [-2.0, 2.0]

    Raises:
        ConfigError: a temperature or a length that is not above 0.
    """
    if not (tau > 0 and lam > 0 and max_length > 0 and math.isfinite(tau + lam)):
        raise ConfigError(f"drpo has tau {tau}, lam {lam}, max_length {max_length}; expected finite numbers above 0")
    there, outcome = present.any(1), known(rewards, present).sum(1)
    lengths = shard.response_mask.sum(1).double()
    mean = known(shard.rollout_logprobs, shard.response_mask).sum(1) / lengths.clamp_min(1)
    right, wrong = there & (outcome == 1), there & (outcome == 0)
    both = (group_count(right, shard.group) > 0) & (group_count(wrong, shard.group) > 0)
    gain = _shares((1 - lengths / max_length) / lam, right, shard.group)
    blame = _shares(mean / tau, wrong, shard.group)
    weights = torch.where(both, group_count(there, shard.group) * (gain - blame), torch.zeros_like(gain))
    holders = last_of(present, torch.where(present, 0, -1))
    return torch.where(holders, weights[:, None], torch.zeros_like(weights[:, None])).to(rewards.dtype)


def _shares(values: Float[Tensor, " n"], members: Bool[Tensor, " n"], group: Tensor) -> Float[Tensor, " n"]:
    """Softmax of the members' values within their group; 0 for others."""
    largest = torch.where(members, group_max(values, members, group), values)
    grown = torch.where(members, (values - largest).exp(), torch.zeros_like(values))
    return grown / group_sum(grown, members, group).clamp_min(1e-300)
