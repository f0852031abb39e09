"""Pairs, weights and the loss of a pair, worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from rlprm.core.preference import (
    Pair,
    balanced,
    outcome_pairs,
    preference_loss,
    pull,
    sampled,
    step_pairs,
    weighted_pairs,
)
from rlprm.errors import ConfigError, DataError
from rlprm.roles import StoredRollout


def response(
    tokens: tuple[int, ...],
    outcome: float | None,
    *,
    spans: tuple[tuple[int, int], ...] = (),
    labels: tuple[int, ...] = (),
    process: tuple[float | None, ...] = (),
) -> StoredRollout:
    return StoredRollout(
        where="runs/a/rollouts.jsonl:1",
        step=1,
        prompt=(9,),
        response=tokens,
        logprobs=tuple(-0.5 for _ in tokens),
        outcome=outcome,
        truncated=False,
        version=0,
        spans=spans,
        labels=labels,
        rewards={"process": process} if process else {},
    )


def named(pairs: list[Pair]) -> list[tuple[int, int, tuple[int, int], tuple[int, int]]]:
    return [(each.preferred, each.other, each.preferred_span, each.other_span) for each in pairs]


def test_dpo_takes_every_right_and_wrong_pair_whole_and_nobody_without_a_verdict_or_a_token():
    group = [response((1, 2), 1.0), response((3,), 0.0), response((4,), None), response((), 0.0), response((5,), 0.0)]
    assert named(outcome_pairs(group)) == [(0, 1, (0, 2), (0, 1)), (0, 4, (0, 2), (0, 1))]
    assert outcome_pairs([response((1,), 1.0)]) == []


TWO = ((0, 2), (2, 4))


def test_step_pairs_by_exact_labels_score_the_step_after_the_shared_right_beginning():
    group = [
        response((1, 2, 3, 4), 1.0, spans=TWO, labels=(1, 1)),
        response((1, 2, 5, 6), 0.0, spans=TWO, labels=(1, 0)),  # same first step, wrong second
        response((7, 8, 3, 4), 0.0, spans=TWO, labels=(0, 0)),  # wrong from the start: later wrong steps say nothing
        response((1, 0, 3, 4), 1.0, spans=TWO, labels=(1, 1)),  # another first step
    ]
    assert named(step_pairs(group, steps="labels")) == [
        (0, 1, (2, 4), (2, 4)),
        # after the prompt alone, every right first step is preferred to (7, 8); its response may be wrong later
        (0, 2, (0, 2), (0, 2)),
        (1, 2, (0, 2), (0, 2)),
        (3, 2, (0, 2), (0, 2)),
    ]


def test_an_unknown_step_before_the_first_wrong_one_makes_no_pair():
    group = [
        response((1, 2, 3, 4), 1.0, spans=TWO, labels=(1, 1)),
        response((1, 2, 5, 6), 0.0, spans=TWO, labels=(-1, 0)),
    ]
    assert step_pairs(group, steps="labels") == []
    assert step_pairs([response((1,), 1.0), response((2,), 0.0)], steps="labels") == []  # nothing stored


def test_step_pairs_by_process_rewards_take_the_first_fall_of_a_wrong_response():
    three = ((0, 1), (1, 2), (2, 3))
    group = [
        response((1, 2, 3), 1.0, spans=three, process=(0.1, 0.2, 0.2)),
        response((1, 2, 4), 0.0, spans=three, process=(0.1, 0.2, -0.3)),  # falls at the third step
        response((1, 5, 6), 0.0, spans=three, process=(0.1, -0.1, 0.9)),  # falls at the second already
        response((1, 2, 7), 1.0, spans=three, process=(0.1, 0.2, 0.1)),  # right, but its third step falls
        response((1, 2, 8), 0.0, spans=three, process=(0.1, 0.2, 0.3)),  # wrong without a fall
    ]
    assert named(step_pairs(group, steps="process")) == [
        (0, 1, (2, 3), (2, 3)),
        (0, 2, (1, 2), (1, 2)),
        (3, 2, (1, 2), (1, 2)),
    ]
    assert step_pairs(group, steps="other") == []


def test_weights_are_quality_differences_scaled_to_a_mean_of_one():
    group = [
        response((1,), 1.0, labels=(1, 1, 1, 0)),  # q = 3/4
        response((2,), 1.0, labels=(1, 0, -1, -1)),  # q = 1/2: unknown steps do not count
        response((3,), 0.0, labels=(0, 1, 0, 0)),  # q = 1/4
        response((4,), 0.0, labels=(1, 1, 0, 1)),  # q = 3/4: at least as good as both right ones
    ]
    pairs = weighted_pairs(group, quality="labels")
    assert [(each.preferred, each.other, each.weight) for each in pairs] == [(0, 2, 0.5), (1, 2, 0.25)]
    # mean 0.375: 0.5 / 0.375 = 4/3, 0.25 / 0.375 = 2/3
    assert [each.weight for each in balanced(pairs)] == pytest.approx([4 / 3, 2 / 3])


def test_a_quality_that_is_not_stored_is_named():
    group = [response((1,), 1.0, process=(0.5, None)), response((2,), 0.0, process=(0.25, 0.0))]
    (pair,) = weighted_pairs(group, quality="process")
    assert pair.weight == 0.5 - 0.125  # None is no reward: the mean is over the steps that have one
    with pytest.raises(DataError, match=r"rollouts.jsonl:1: no step reward of the stream 'judge'.*stored: process"):
        weighted_pairs(group, quality="judge")
    with pytest.raises(DataError, match="no exact step label"):
        weighted_pairs(group, quality="labels")


def test_at_most_so_many_pairs_drawn_by_the_seed():
    pairs = outcome_pairs([response((n,), float(n < 4)) for n in range(8)])
    assert len(pairs) == 16
    assert sampled(pairs, None, random.Random(0)) == pairs
    first, again, other = (sampled(pairs, 3, random.Random(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 3


def test_loss_and_gradient_by_hand():
    # margin 2, beta 0.5, weight 3: -3 log sigmoid(1) = 3 log(1 + e^-1) = 3 * 0.3132617 = 0.9397850
    # d/dm = -3 * 0.5 * sigmoid(-1) = -1.5 * 0.2689414 = -0.4034121
    margin = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([3.0], dtype=torch.float64)
    loss = preference_loss(margin, weight, 0.5)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.9397850, abs=1e-6)
    assert margin.grad.item() == pytest.approx(-0.4034121, abs=1e-6)
    assert pull(margin.detach(), weight, 0.5).item() == pytest.approx(0.4034121, abs=1e-6)


def test_an_undecided_pair_costs_log_2_and_extremes_stay_finite():
    loss = preference_loss(torch.tensor([0.0, 1e6, -1e6]), torch.ones(3), 1.0)
    assert loss.tolist() == pytest.approx([math.log(2), 0.0, 1e6])
    with pytest.raises(ConfigError, match="expected more than 0"):
        preference_loss(torch.zeros(1), torch.ones(1), 0.0)
