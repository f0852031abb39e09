"""Learning to tell right steps from wrong ones, on one rank: a decoder with one number per token and a cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rlprm.batch import jagged_texts
from rlprm.core.metrics import Mean, Sum
from rlprm.core.quality import step_auc
from rlprm.engine.combine import Measured, agreed, combined
from rlprm.engine.learner import Learner, Outputs
from rlprm.engine.offline import Offline, Turns
from rlprm.records import JaggedShard, MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepExample:
    """Tokens of a solution as the PRM reads it, the positions of its numbers, and their labels (1, 0, -1 unknown)."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    labels: tuple[int, ...]


class StepLabels(Offline):
    """``-mean over labelled steps of (y log sigma(l) + (1 - y) log(1 - sigma(l)))`` over seeded mini-batches.

    The logit l of a step is the head's output at the position where its number stands. The learner's values describe the
    state *before* a token, so that logit is the value of the token behind the position; a last token is added for the
    last step, which a causal model does not see. All methods are collective.
    """

    name = "prm"

    def __init__(
        self, learner: Learner, examples: Sequence[StepExample], held_out: Sequence[StepExample], turns: Turns
    ) -> None:
        super().__init__(learner, len(examples), turns)
        self._examples = examples
        self._held_out = held_out

    def advance(self, steps: int) -> Measured:
        """Take ``steps`` optimizer steps; after the run's last one also measure the PRM on solutions it never saw."""
        learnt = combined([self._step() for _ in range(steps)], prefix="prm/")
        if self._learner.steps == self._learner.settings.total_steps and self._held_out:
            return learnt | agreed(**self.quality())
        return learnt

    def quality(self) -> dict[str, float]:
        """AUC of step numbers against labels on the held-out solutions; nothing where these are of one kind only.

        Every rank scores all of them: they are few, and so no rank waits for another.
        """
        shard, labels = laid_out(self._held_out)
        values = self._learner.values(shard)
        labelled = labels >= 0
        found = step_auc([values[labelled].tolist()], [labels[labelled].tolist()])
        return {} if found is None else {"prm/step_auc": found}

    def _step(self) -> dict[str, Any]:
        shard, labels = laid_out([self._examples[index] for index in self._next()])
        count = float(self._turns.reduce.sum((labels >= 0).sum().double()))
        prepared = self._micros(shard, torch.arange(len(shard)), {"label": labels}, {})
        return self._learner.update(prepared, partial(label_cross_entropy, count))


def laid_out(examples: Sequence[StepExample]) -> tuple[JaggedShard, Tensor]:
    """The examples as a shard, and per flat token the label of the step whose number is that token's value (else -1).

    >>> shard, labels = laid_out([StepExample(tokens=(5, 6, 7), positions=(1, 2), labels=(1, 0))])
    >>> shard.tokens.tolist(), labels.tolist()
    ([5, 6, 7, 0], [-1, -1, 1, 0])
    """
    pairs, labels = [], []
    for example in examples:
        begin = example.positions[0] + 1
        pairs.append((example.tokens[:begin], (*example.tokens[begin:], 0)))  # a 0 behind the end: nothing reads it
        own = [-1] * (len(example.tokens) + 1)
        for place, label in zip(example.positions, example.labels, strict=True):
            own[place + 1] = label
        labels += own
    return jagged_texts(pairs), torch.tensor(labels, dtype=torch.int64)


def label_cross_entropy(count: float, micro: MicroBatch, outputs: Outputs) -> tuple[Tensor, dict[str, Any]]:
    """``sum over this micro-batch's labelled steps of BCE(l, y) / count``, steps counted over the whole optimizer step."""
    assert outputs.values is not None
    label = micro.token_fields["label"]
    known = micro.response_mask & (label >= 0)
    logits, wanted = outputs.values[known], label[known].to(outputs.values.dtype)
    loss = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / max(count, 1.0)
    return loss, {"loss": Sum(float(loss.detach())), "label_mean": Mean.of(wanted)}
