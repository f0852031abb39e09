"""How good a process source is: rows from each rank, and the numbers that all rows give together.

Measured on fresh rollouts of the first sampling round, before filtering and before the source learns from them, always
beside surprisal: a PRM that does not beat the surprise of the initial model has learnt nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
from rlprm.core.steps import step_counts, step_sums
from rlprm.records import JaggedShard, Record, cat

NUM_BINS = 10
CERTAIN = 1e-6  # a probability closer to 0 or 1 is moved here: its log-odds stay finite

Pooling = Literal["sum", "mean"]
Scale = Literal["logit", "probability", "plus_minus"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows(Record):
    """One row per fresh response that has a verdict and of which the source said anything."""

    outcome: Float[Tensor, " n"]
    group: Int[Tensor, " n"]
    reward: Float[Tensor, " n"]  # r(y)
    reward_no_last: Float[Tensor, " n"]  # without the last step, which often just states the answer
    no_last_present: Bool[Tensor, " n"]  # False where nothing is left to be pooled then
    logit: Float[Tensor, " n"]  # log-odds that the response is right, as r(y) says
    surprisal: Float[Tensor, " n"]  # log pi_ref(y): the baseline
    surprisal_no_last: Float[Tensor, " n"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one rank saw: rows, and per row the rewards, baseline and exact labels of its steps (-1: absent or unknown)."""

    rows: Rows
    steps: tuple[tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]], ...]


def measure(
    shard: JaggedShard,
    rewards: Float[Tensor, "B T"],
    present: Bool[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    *,
    pooling: Pooling,
    scale: Scale,
) -> Measurement:
    """The fresh rows of a shard, scored by per-token ``rewards`` where they are ``present``, and by surprisal.

    A step's reward is the sum of its present tokens'. ``r(y)`` is the sum of steps (implicit PRM: a log-ratio adds up
    over tokens) or the mean of present steps (a probability per step: the sum would grow with their number, so that six
    steps at 0.4 beat two at 0.95). ``scale`` says how ``r(y)`` is read as the chance of being right, for calibration:
    ``logit``: ``sigmoid(r)``; ``probability``: r itself; ``plus_minus``: ``(r + 1) / 2``.

    A response without any present step is left out, under either yardstick; absent steps take no part in step measures.
    A shard without rows gives an empty measurement.
    """
    padded = pad(shard)
    by_step = step_sums(rewards, present, padded.step_index)
    base_by_step = step_sums(ref_logprobs, padded.response_mask, padded.step_index)
    there = step_sums(torch.ones_like(rewards), present, padded.step_index) > 0
    counts = step_counts(padded.step_index)
    before_last = torch.arange(by_step.shape[1])[None, :] < (counts - 1)[:, None]
    reward, said = _pooled(by_step, there, counts > 0, pooling)
    no_last, no_last_said = _pooled(by_step, there & before_last, counts > 1, pooling)
    zero = torch.zeros((), dtype=by_step.dtype)
    chosen = padded.fresh & padded.outcome_present & said
    rows = Rows(
        outcome=padded.outcome,
        group=padded.group,
        reward=reward,
        reward_no_last=no_last,
        no_last_present=no_last_said,
        logit=_log_odds(reward, scale),
        surprisal=base_by_step.sum(1),
        surprisal_no_last=torch.where(before_last, base_by_step, zero).sum(1),
    ).select(chosen)
    steps = tuple(
        (
            tuple(by_step[row, : counts[row]].tolist()),
            tuple(base_by_step[row, : counts[row]].tolist()),
            tuple(
                label if known else -1
                for label, known in zip(
                    step_labels(padded.step_index[row], padded.step_label[row], int(counts[row])),
                    there[row, : counts[row]].tolist(),
                    strict=True,
                )
            ),
        )
        for row in chosen.nonzero().flatten().tolist()
    )
    return Measurement(rows=rows, steps=steps)


def _pooled(
    by_step: Float[Tensor, "B S"], there: Bool[Tensor, "B S"], any_step: Bool[Tensor, " B"], pooling: Pooling
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """``r(y)``, and where there is one: a sum over no step at all is 0, a mean over none is nothing."""
    count = there.sum(1)
    total = torch.where(there, by_step, torch.zeros_like(by_step)).sum(1)
    if pooling == "sum":
        return total, (count > 0) | ~any_step
    return total / count.clamp_min(1), count > 0


def _log_odds(reward: Float[Tensor, " B"], scale: Scale) -> Float[Tensor, " B"]:
    if scale == "logit":
        return reward
    return (reward if scale == "probability" else (reward + 1) / 2).logit(eps=CERTAIN)


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
    right, left = rows.outcome > 0.5, rows.no_last_present
    accuracy, mixed = pair_accuracy(rows.reward, rows.outcome, everything, rows.group)
    found: dict[str, float | None] = {
        "prm/pair_acc_fresh": accuracy,
        "prm/pair_acc_fresh_no_last": pair_accuracy(rows.reward_no_last, rows.outcome, left, rows.group)[0],
        "prm/pair_acc_surprisal": pair_accuracy(rows.surprisal, rows.outcome, everything, rows.group)[0],
        "prm/auc_fresh": auc(rows.reward, right),
        "prm/auc_fresh_no_last": auc(rows.reward_no_last[left], right[left]),
        "prm/auc_surprisal": auc(rows.surprisal, right),
        "prm/ece": expected_calibration_error(rows.logit, rows.outcome, NUM_BINS),
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
