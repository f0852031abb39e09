"""ReMax: a greedy response to the same prompt is the baseline."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.groups import known
from rlprm.core.steps import last_of
from rlprm.records import Shard
from rlprm.roles import Reduce


def minus_greedy(
    rewards: Float[Tensor, "B T"], present: Bool[Tensor, "B T"], shard: Shard, reduce: Reduce
) -> Float[Tensor, "B T"]:
    """``R_i - R(greedy)``, at the response's last present token: what the same policy earns without any chance.

    Source: ReMax (arXiv:2310.10505). The baseline knows nothing of the siblings, so one response per prompt is enough.
    The run samples a greedy response to each prompt where a stream is normalized this way, judges it with the others,
    and uses it for nothing else: it is in no batch, no statistic and no update. Where it got no verdict, the responses
    to its prompt have no baseline and become 0.

    For the outcome stream: of the greedy response only the outcome is known.

    >>> from dataclasses import replace
    >>> from rlprm.core.probe import made_up
    >>> from rlprm.core.reduce import Identity
    >>> ends = torch.tensor([[False, False, False, True]] * 2)  # a wrong and a right response; greedy is right
    >>> shard = replace(made_up(), greedy_outcome=torch.ones(2), greedy_present=torch.tensor([True, True]))
    >>> minus_greedy(shard.outcome[:, None] * ends, ends, shard, Identity())[:, 3].tolist()
    [-1.0, 0.0]
    """
    there = shard.greedy_present[:, None]
    ahead = known(rewards, present).sum(1, keepdim=True) - known(shard.greedy_outcome, shard.greedy_present)[:, None]
    holders = last_of(present, torch.where(present, 0, -1))
    return torch.where(holders & there, ahead, torch.zeros_like(ahead)).to(rewards.dtype)
