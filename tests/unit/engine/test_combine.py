"""Measurements of several optimizer steps and ranks become one number each."""

from __future__ import annotations

import pytest

from rlprm.core.metrics import Max, Mean, Min, Sum
from rlprm.engine.combine import Measured, agreed, combined, global_numbers


def test_optimizer_steps_are_joined_by_kind():
    updates = [
        {"entropy": Mean(3.0, 2.0), "pg_loss": Sum(1.0), "ratio_max": Max(1.2), "low": Min(0.5), "lr": 0.1},
        {"entropy": Mean(1.0, 2.0), "pg_loss": Sum(2.0), "ratio_max": Max(1.1), "low": Min(0.7), "lr": 0.3},
    ]
    found = combined(updates, prefix="actor/")
    # mean: (3 + 1) / (2 + 2); a loss is averaged over optimizer steps: (1 + 2) / 2; agreed numbers too: (0.1 + 0.3) / 2
    assert global_numbers([found]) == pytest.approx(
        {"actor/entropy": 1.0, "actor/pg_loss": 1.5, "actor/ratio_max": 1.2, "actor/low": 0.5, "actor/lr": 0.2}
    )


def test_ranks_add_losses_and_weigh_means_by_their_counts():
    ranks = [
        Measured(partial={"loss": Sum(0.25), "kl": Mean(1.0, 1.0), "most": Max(None)}, agreed={"grad_norm": 2.0}),
        Measured(partial={"loss": Sum(0.5), "kl": Mean(0.0, 3.0), "most": Max(4.0)}, agreed={"grad_norm": 2.0}),
    ]
    assert global_numbers(ranks) == {"loss": 0.75, "kl": 0.25, "most": 4.0, "grad_norm": 2.0}


def test_a_metric_of_one_step_only_is_the_mean_of_what_there_is():
    found = combined([{"first": Max(0.1), "lr": 0.2}, {"lr": 0.4}], prefix="")
    assert global_numbers([found]) == pytest.approx({"first": 0.1, "lr": 0.3})


def test_nothing_is_left_out_when_joined():
    both = agreed(a=1.0) | Measured(partial={"b": Sum(2.0)}, agreed={"c": 3.0})
    assert global_numbers([both]) == {"a": 1.0, "c": 3.0, "b": 2.0}
    assert global_numbers([combined([], prefix="actor/")]) == {}
