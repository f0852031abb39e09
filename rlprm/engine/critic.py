"""The learned value function of PPO on one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from rlprm.batch import pad, unflatten
from rlprm.core.credit import CriticPlan
from rlprm.core.metrics import Mean, Sum
from rlprm.core.policy_loss import Denominators
from rlprm.core.value import explained_variance, value_loss
from rlprm.engine.batching import Passes, micros
from rlprm.engine.combine import Measured, agreed, combined
from rlprm.engine.learner import Learner, Outputs
from rlprm.records import JaggedShard, MicroBatch
from rlprm.roles import Reduce


@dataclass(frozen=True, slots=True, kw_only=True)
class Critic:
    """The learned value function of PPO."""

    learner: Learner
    plan: CriticPlan
    clip: float | None
    passes: Passes

    def learn(
        self,
        parts: Sequence[Tensor],
        shard: JaggedShard,
        selected: Tensor,
        credit: Mapping[str, Tensor],
        reduce: Reduce,
    ) -> Measured:
        """An optimizer step on each of ``parts`` (rows of the shard); collective."""
        updates = []
        for rows in parts:
            denominators = Denominators.count((shard.lengths - shard.prompt_lengths)[rows], reduce)
            if denominators.tokens == 0:
                continue
            prepared = micros(
                shard,
                rows,
                token_fields={name: credit[name] for name in ("values", "value_targets")},
                sequence_fields={},
                token_budget=self.passes.token_budget,
                layout=self.passes.layout,
            )
            updates.append(self.learner.update(prepared, partial(critic_loss, self.clip, denominators)))
        padded = pad(shard)
        explained = explained_variance(
            unflatten(credit["values"], shard.lengths),
            unflatten(credit["value_targets"], shard.lengths),
            padded.response_mask & selected[:, None],
            reduce,
        )
        measured = combined(updates, prefix="critic/")
        return measured if explained is None else measured | agreed(**{"critic/vf_explained_var": explained})


def critic_loss(
    clip: float | None, denominators: Denominators, micro: MicroBatch, outputs: Outputs
) -> tuple[Tensor, dict[str, Any]]:
    """The mean value loss per response token of the optimizer step."""
    fields, mask = micro.token_fields, micro.response_mask
    assert outputs.values is not None
    each, clipped = value_loss(outputs.values, fields["values"], fields["value_targets"], mask, clip=clip)
    metrics = {"vf_loss": Sum(float(each.detach().sum()) / denominators.tokens), "vf_clipfrac": Mean.of(clipped[mask])}
    return each.sum() / denominators.tokens, metrics
