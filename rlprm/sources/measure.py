"""How good a process source is: rows from each rank, and the numbers that all rows give together.

Measured on fresh rollouts of the first sampling round, before filtering and before the source learns from them, always
beside surprisal: a PRM that does not beat the surprise of the initial model has learnt nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlprm.batch import pad
from rlprm.core.quality import (
    auc,
    correlation,
    expected_calibration_error,
    first_wrong_chance,
    first_wrong_hit,
    pair_accuracy,
    step_auc,
)
from rlprm.core.steps import step_sums
from rlprm.records import JaggedShard, Record, cat

NUM_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows(Record):
    """One row per fresh response that has a verdict."""

    outcome: Float[Tensor, " n"]
    group: Int[Tensor, " n"]
    reward: Float[Tensor, " n"]  # r(y)
    reward_no_last: Float[Tensor, " n"]  # without the last step, which often just states the answer
    surprisal: Float[Tensor, " n"]  # log pi_ref(y): the baseline
    surprisal_no_last: Float[Tensor, " n"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one rank saw: rows, and per row the rewards, baseline and exact labels of its steps."""

    rows: Rows
    steps: tuple[tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]], ...]


def measure(shard: JaggedShard, rewards: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"]) -> Measurement:
    """The fresh rows of a shard, scored by per-token ``rewards`` and by surprisal."""
    padded = pad(shard)
    chosen = padded.fresh & padded.outcome_present
    by_step, base_by_step = (
        step_sums(each, padded.response_mask, padded.step_index) for each in (rewards, ref_logprobs)
    )
    last = padded.step_index.amax(1)
    before_last = torch.arange(by_step.shape[1])[None, :] < last[:, None]
    zero = torch.zeros((), dtype=by_step.dtype)
    rows = Rows(
        outcome=padded.outcome,
        group=padded.group,
        reward=by_step.sum(1),
        reward_no_last=torch.where(before_last, by_step, zero).sum(1),
        surprisal=base_by_step.sum(1),
        surprisal_no_last=torch.where(before_last, base_by_step, zero).sum(1),
    ).select(chosen)
    steps = tuple(
        (
            tuple(by_step[row, : last[row] + 1].tolist()),
            tuple(base_by_step[row, : last[row] + 1].tolist()),
            step_labels(padded.step_index[row], padded.step_label[row], int(last[row]) + 1),
        )
        for row in chosen.nonzero().flatten().tolist()
    )
    return Measurement(rows=rows, steps=steps)


def step_labels(index: Int[Tensor, " T"], label: Int[Tensor, " T"], count: int) -> tuple[int, ...]:
    """The label of each step; all tokens of a step carry the same one.

    >>> step_labels(torch.tensor([-1, 0, 0, 1]), torch.tensor([-1, 1, 1, 0]), 2)
    (1, 0)
    """
    labels = [-1] * count
    for step, found in zip(index.tolist(), label.tolist(), strict=True):
        if step >= 0:
            labels[step] = found
    return tuple(labels)


def quality(measurements: Sequence[Measurement]) -> dict[str, float]:
    """The ``prm/*`` numbers of all ranks' rows; what the rows do not allow (one class only) is left out."""
    rows = cat([each.rows for each in measurements])
    steps = [step for each in measurements for step in each.steps]
    everything: Bool[Tensor, " n"] = torch.ones(len(rows), dtype=torch.bool)
    right = rows.outcome > 0.5
    accuracy, mixed = pair_accuracy(rows.reward, rows.outcome, everything, rows.group)
    found: dict[str, float | None] = {
        "prm/pair_acc_fresh": accuracy,
        "prm/pair_acc_fresh_no_last": pair_accuracy(rows.reward_no_last, rows.outcome, everything, rows.group)[0],
        "prm/pair_acc_surprisal": pair_accuracy(rows.surprisal, rows.outcome, everything, rows.group)[0],
        "prm/auc_fresh": auc(rows.reward, right),
        "prm/auc_fresh_no_last": auc(rows.reward_no_last, right),
        "prm/auc_surprisal": auc(rows.surprisal, right),
        "prm/ece": expected_calibration_error(rows.reward, rows.outcome, NUM_BINS),
        "prm/corr_with_outcome": correlation(rows.reward, rows.outcome),
        "prm/mixed_groups": float(mixed),
        "prm/fresh_rows": float(len(rows)),
    }
    if any(label >= 0 for _, _, labels in steps for label in labels):
        found |= {
            "prm/step_auc": step_auc([step[0] for step in steps], [step[2] for step in steps]),
            "prm/step_auc_surprisal": step_auc([step[1] for step in steps], [step[2] for step in steps]),
            "prm/first_wrong_hit": _mean([first_wrong_hit(step[0], step[2]) for step in steps]),
            "prm/first_wrong_hit_surprisal": _mean([first_wrong_hit(step[1], step[2]) for step in steps]),
            "prm/first_wrong_hit_chance": _mean([first_wrong_chance(step[2]) for step in steps]),
        }
    return {name: value for name, value in found.items() if value is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
