"""A trial of a run's plans on made-up responses, so that every piece checks its own settings before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rlprm.core.credit import CriticPlan, StreamPlan, check_plans, credit
from rlprm.core.implicit import Granularity
from rlprm.core.reduce import Identity
from rlprm.core.steps import to_step_ends
from rlprm.core.whiten import Whiten
from rlprm.records import Shard, Stream


def probe(
    plans: Sequence[StreamPlan],
    critic: CriticPlan | None,
    *,
    whiten: Whiten,
    sources: Mapping[str, Granularity],
    trusted: Sequence[str],
) -> None:
    """Run the plans on two made-up responses of two steps with two tokens each, one right and one wrong.

    ``sources`` says where each process stream has entries, so a stream of tokens meets the piece that takes one reward
    a step here, and not in the first step of a run. A stream that is neither planned for nor merged away is found, too.

    Raises:
        ConfigError: whatever a piece refuses, or :func:`rlprm.core.credit.check_plans`.
    """
    check_plans(plans, critic)
    shard = made_up()
    streams = {name: _stream(shard, granularity) for name, granularity in sources.items()}
    credit(
        shard,
        streams,
        plans,
        Identity(),
        whiten=whiten,
        trust=dict.fromkeys(trusted, 1.0),
        values=None if critic is None else torch.ones(2, 4),
        critic=critic,
    )


def made_up() -> Shard:
    """Two responses of four tokens to one prompt."""
    yes = torch.ones(2, dtype=torch.bool)
    mask = torch.ones(2, 4, dtype=torch.bool)
    steps = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    return Shard(
        tokens=torch.zeros(2, 4, dtype=torch.int64),
        attention_mask=mask,
        response_mask=mask,
        rollout_logprobs=-torch.ones(2, 4),
        step_index=steps,
        step_label=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
        outcome=torch.tensor([0.0, 1.0]),
        outcome_present=yes,
        greedy_outcome=torch.zeros(2),
        greedy_present=yes,
        group=torch.zeros(2, dtype=torch.int64),
        version=torch.zeros(2, dtype=torch.int64),
        truncated=~yes,
        fresh=yes,
        train=yes,
        row=torch.arange(2),
    )


def _stream(shard: Shard, granularity: Granularity) -> Stream:
    rewards = shard.outcome[:, None] - torch.arange(4.0)[None, :] / 8
    if granularity == "token":
        return Stream(rewards=rewards, present=shard.response_mask)
    spans = shard.step_index if granularity == "step" else torch.where(shard.response_mask, 0, -1)
    summed, present = to_step_ends(rewards, shard.response_mask, spans)
    return Stream(rewards=summed, present=present)
