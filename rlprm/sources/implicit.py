"""The online implicit PRM (PRIME, arXiv:2502.01456): token rewards from log-ratios, learnt from outcomes alone."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from rlprm.batch import flatten, pad, unflatten
from rlprm.core.implicit import Granularity, implicit_rewards, implicit_stream, outcome_cross_entropy, sequence_sums
from rlprm.core.metrics import Mean, Sum
from rlprm.engine.batching import micros, mini_batches
from rlprm.engine.combine import Measured, agreed, combined
from rlprm.engine.learner import Learner, Outputs
from rlprm.engine.policy import Passes
from rlprm.errors import AlignmentError
from rlprm.records import JaggedShard, MicroBatch
from rlprm.roles import Reduce
from rlprm.sources.measure import Measurement, measure

ReferenceKind = Literal["initial", "policy"]


class ImplicitPrm:
    """``r_t = beta * (log pi_phi - log pi_ref)``; ``r(y) = sum_t r_t`` is trained by cross-entropy on outcomes.

    ``reference`` initial: the frozen initial model; policy: the policy that is about to be updated (log pi_old).
    Scores come before any update of the same batch: all micro-batches are scored, then all are learnt from, so that no
    response is scored by a half-updated PRM (PRIME's code scores later mini-batches with an already updated one).
    All methods are collective over the PRM's ranks.
    """

    stateful = True
    exportable = True

    def __init__(
        self,
        learner: Learner,
        *,
        name: str,
        beta: float,
        reference: ReferenceKind,
        granularity: Granularity,
        passes: Passes,
        temperature: float,
        reduce: Reduce,
        tokenizer: Any,
    ) -> None:
        self.name = name
        self._learner = learner
        self._beta = beta
        self._reference = reference
        self._granularity = granularity
        self._passes = passes
        self._temperature = temperature
        self._reduce = reduce
        self._tokenizer = tokenizer

    def score(self, shard: JaggedShard, old: Tensor, ref: Tensor | None) -> tuple[dict[str, Tensor], Measurement]:
        """Flat rewards and presence, and this rank's measurements of fresh rollouts (before any update)."""
        logprobs = self._learner.logprobs(shard, self._temperature)
        measured = measure(
            shard,
            implicit_rewards(
                unflatten(logprobs, shard.lengths),
                unflatten(self._measured_from(old, ref), shard.lengths),
                pad(shard).response_mask,
                self._beta,
            ),
            unflatten(_required(ref), shard.lengths),
        )
        return self._stream(shard, logprobs, old, ref), measured

    def learn(self, shard: JaggedShard, old: Tensor, ref: Tensor | None) -> Measured:
        """Cross-entropy on the outcomes of every accepted rollout that has one."""
        base = self._measured_from(old, ref)
        known = shard.train & shard.outcome_present
        groups = int(self._reduce.max(torch.where(shard.train, shard.group, -1).max().double())) + 1
        updates = []
        for epoch in range(self._passes.epochs):
            for rows in mini_batches(
                shard.group,
                known,
                num_groups=groups,
                parts=self._passes.mini_batches,
                seed=(self._passes.seed * 1_000_003 + self._learner.steps) * 1_009 + epoch,
            ):
                sequences = float(self._reduce.sum(torch.tensor(float(len(rows)), dtype=torch.float64)))
                if sequences == 0:
                    continue
                prepared = micros(
                    shard,
                    rows,
                    token_fields={"base": base},
                    sequence_fields={"outcome": shard.outcome},
                    token_budget=self._passes.token_budget,
                    layout=self._passes.layout,
                )
                updates.append(
                    self._learner.update(prepared, partial(self._loss, sequences), temperature=self._temperature)
                )
        return combined(updates, prefix="prm/") | agreed(**{"prm/updates": float(len(updates))})

    def _loss(self, sequences: float, micro: MicroBatch, outputs: Outputs) -> tuple[Tensor, dict[str, Any]]:
        assert outputs.logprobs is not None
        mask = micro.response_mask
        rewards = implicit_rewards(outputs.logprobs, micro.token_fields["base"], mask, self._beta)
        sequence_reward = sequence_sums(rewards, micro.sequence, micro.num_sequences)
        outcome = micro.sequence_fields["outcome"]
        loss = outcome_cross_entropy(sequence_reward, outcome, torch.ones_like(outcome, dtype=torch.bool), sequences)
        detached = sequence_reward.detach()
        return loss, {
            "loss": Sum(float(loss.detach())),
            "label_mean": Mean.of(outcome),
            "log_ratio_abs": Mean.of(detached.abs() / self._beta),
            "kl_to_ref": Mean.of((rewards.detach() / self._beta)[mask]),
        }

    def _measured_from(self, old: Tensor, ref: Tensor | None) -> Tensor:
        return _required(ref) if self._reference == "initial" else old

    def _stream(self, shard: JaggedShard, logprobs: Tensor, old: Tensor, ref: Tensor | None) -> dict[str, Tensor]:
        padded = pad(shard)
        stream = implicit_stream(
            unflatten(logprobs, shard.lengths),
            unflatten(self._measured_from(old, ref), shard.lengths),
            padded.response_mask,
            padded.step_index,
            beta=self._beta,
            granularity=self._granularity,
        )
        return {
            "rewards": flatten(stream.rewards, shard.lengths),
            "present": flatten(stream.present, shard.lengths),
        }

    def save(self, folder: str) -> None:
        self._learner.save(folder)

    def load(self, folder: str) -> None:
        self._learner.load(folder)

    def export(self, folder: str) -> str:
        """An ordinary Hugging Face folder of the PRM."""
        self._learner.export(folder, self._tokenizer.name_or_path)
        return folder

    def close(self) -> None:
        self._learner.close()


class LearnsFirst(ImplicitPrm):
    """PRIME's update "before": `score` measures, learns and scores again with the updated PRM; `learn` does nothing.

    Quality is still measured before the update, on responses the PRM has never seen.
    """

    _learned = agreed()

    def score(self, shard: JaggedShard, old: Tensor, ref: Tensor | None) -> tuple[dict[str, Tensor], Measurement]:
        _, measured = super().score(shard, old, ref)
        self._learned = super().learn(shard, old, ref)
        return self._stream(shard, self._learner.logprobs(shard, self._temperature), old, ref), measured

    def learn(self, shard: JaggedShard, old: Tensor, ref: Tensor | None) -> Measured:
        return self._learned


class Frozen(ImplicitPrm):
    """A PRM that never learns while the policy trains."""

    def learn(self, shard: JaggedShard, old: Tensor, ref: Tensor | None) -> Measured:
        return agreed()


UPDATES = {"after": ImplicitPrm, "before": LearnsFirst, "never": Frozen}


def implicit_prm(
    learner: Learner,
    name: str,
    passes: Passes,
    temperature: float,
    reduce: Reduce,
    tokenizer: Any,
    *,
    beta: float,
    reference: ReferenceKind,
    granularity: Granularity,
    update: Literal["after", "before", "never"],
) -> ImplicitPrm:
    """The implicit PRM that ``conf/source/implicit*.yaml`` describe."""
    return UPDATES[update](
        learner,
        name=name,
        beta=beta,
        reference=reference,
        granularity=granularity,
        passes=passes,
        temperature=temperature,
        reduce=reduce,
        tokenizer=tokenizer,
    )


def _required(ref: Tensor | None) -> Tensor:
    if ref is None:
        raise AlignmentError("the implicit PRM needs log-probs of the reference and got none; give the run a reference")
    return ref
