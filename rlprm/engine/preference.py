"""Preference optimisation on one rank: the policy's learner with the loss of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlprm.batch import chosen_rows, flat_response_mask, flat_rows
from rlprm.core.implicit import sequence_sums
from rlprm.core.metrics import Mean, Sum
from rlprm.core.preference import Pair, Span, preference_loss, pull
from rlprm.engine.combine import Measured, combined
from rlprm.engine.learner import Learner, Outputs
from rlprm.engine.offline import Offline, Turns
from rlprm.records import JaggedShard, MicroBatch

TEMPERATURE = 1.0  # the loss speaks of the model's own distribution


class Preference(Offline):
    """``-mean over pairs of weight * log sigmoid(beta * margin)`` over seeded mini-batches of pairs.

    ``pairs`` name rows of ``shard``, which every rank holds; the reference is the model as it is given, whose log-probs
    are computed once. Each optimizer step first scores its pairs without gradient: with the margins known, the gradient
    is a sum over sequences, so that the split into micro-batches leaves no trace (:func:`rlprm.core.preference.pull`).
    All methods are collective.
    """

    name = "policy"

    def __init__(
        self, learner: Learner, shard: JaggedShard, pairs: Sequence[Pair], turns: Turns, *, beta: float
    ) -> None:
        super().__init__(learner, len(pairs), turns)
        self._shard = shard
        self._pairs = tuple(pairs)
        self._beta = beta
        self._reference = self._reference_logprobs()

    def _reference_logprobs(self) -> Tensor:
        """log pi_ref per flat token of the shard, each rank scoring its share of the rows."""
        rows = torch.arange(self._turns.rank, len(self._shard), self._turns.world_size)
        own = self._learner.logprobs(chosen_rows(self._shard, rows), TEMPERATURE)
        everything = torch.zeros(len(self._shard.tokens), dtype=own.dtype)
        return self._turns.reduce.sum(everything.index_copy(0, flat_rows(self._shard.lengths, rows), own))

    def advance(self, steps: int) -> Measured:
        """Take ``steps`` optimizer steps."""
        return combined([self._step() for _ in range(steps)], prefix="dpo/")

    def _step(self) -> dict[str, Any]:
        pairs = [self._pairs[index] for index in self._next()]
        rows = torch.tensor([pair.preferred for pair in pairs] + [pair.other for pair in pairs], dtype=torch.int64)
        spans = [pair.preferred_span for pair in pairs] + [pair.other_span for pair in pairs]
        weight = torch.tensor([pair.weight for pair in pairs], dtype=torch.float64)
        part = chosen_rows(self._shard, rows)
        scored = inside(part, spans)
        moved = self._learner.logprobs(part, TEMPERATURE) - self._reference[flat_rows(self._shard.lengths, rows)]
        preferred, other = sequence_totals(moved, scored, part.lengths).split(len(pairs))
        margin = preferred - other
        pulls = pull(margin, weight, self._beta) / self._turns.batch_size
        updated = self._learner.update(
            self._micros(
                part, torch.arange(len(rows)), {"scored": scored}, {"pull": torch.cat([-pulls, pulls]).float()}
            ),
            pulled,
            temperature=TEMPERATURE,
        )
        return {
            **updated,
            "loss": Sum(float(preference_loss(margin, weight, self._beta).sum()) / self._turns.batch_size),
            "margin": Mean.of(margin),
            "accuracy": Mean.of((margin > 0).double() + 0.5 * (margin == 0).double()),
            "preferred_log_ratio": Mean.of(preferred),
            "other_log_ratio": Mean.of(other),
            "weight": Mean.of(weight),
        }


def pulled(micro: MicroBatch, outputs: Outputs) -> tuple[Tensor, dict[str, Any]]:
    """``sum over sequences of pull * log pi(scored tokens)``: its gradient is the loss's, its value is not."""
    assert outputs.logprobs is not None
    scored = micro.token_fields["scored"] & micro.response_mask
    logprobs = torch.where(scored, outputs.logprobs, torch.zeros_like(outputs.logprobs))
    sums = sequence_sums(logprobs, micro.sequence, micro.num_sequences)
    return (sums * micro.sequence_fields["pull"]).sum(), {}


def inside(shard: JaggedShard, spans: Sequence[Span]) -> Tensor:
    """True on the response tokens of each row that lie in its span, flat."""
    row = torch.arange(len(shard)).repeat_interleave(shard.lengths)
    starts = shard.lengths.cumsum(0) - shard.lengths + shard.prompt_lengths
    place = torch.arange(len(shard.tokens)) - starts[row]  # among the response's tokens; negative on the prompt
    bounds = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)
    return flat_response_mask(shard) & (place >= bounds[row, 0]) & (place < bounds[row, 1])


def sequence_totals(flat: Tensor, counted: Tensor, lengths: Tensor) -> Tensor:
    """Sum of the counted flat entries of each row, in float64."""
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    kept = torch.where(counted, flat.double(), torch.zeros((), dtype=torch.float64))
    return torch.zeros(len(lengths), dtype=torch.float64).index_add(0, row, kept)
