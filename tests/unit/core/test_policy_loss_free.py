"""Losses without a flat branch, by hand: one token from log-prob -1 - log(ratio) to -1."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from rlprm.core.policy_loss import Choices
from rlprm.core.policy_loss_free import cispo, reinforce, sapo
from rlprm.errors import ConfigError


def learnt(surrogate, ratio, advantage):
    new = torch.tensor([[-1.0, torch.nan]], dtype=torch.float64).requires_grad_()
    loss, told = surrogate(
        Choices(
            logprobs=new,
            old_logprobs=torch.tensor([[-1 - math.log(ratio), torch.nan]], dtype=torch.float64),
            advantages=torch.tensor([[advantage, torch.nan]], dtype=torch.float64),
            response_mask=torch.tensor([[True, False]]),
            sequence=torch.tensor([[0, 0]]),
            num_sequences=1,
        )
    )
    loss.sum().backward()
    assert loss[0, 1] == new.grad[0, 1] == 0
    return loss[0, 0].item(), new.grad[0, 0].item(), {name: values[0, 0].item() for name, values in told.items()}


@pytest.mark.parametrize("ratio", [0.2, 1.0, 30.0])
def test_reinforce_reads_no_ratio(ratio):
    loss, gradient, told = learnt(reinforce, ratio, 2.0)
    assert (loss, gradient) == pytest.approx((2.0, -2.0))  # -A log pi, -A
    assert told["ratio"] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight", "clipped"),
    [
        (1.5, 2.0, 1.28, 1.0),  # PPO's gradient would be 0 here
        (1.1, 2.0, 1.1, 0.0),
        (0.5, 2.0, 0.8, 1.0),
        (0.5, -2.0, 0.8, 1.0),  # and here
    ],
)
def test_cispo_clips_the_weight_and_not_the_gradient(ratio, advantage, weight, clipped):
    loss, gradient, told = learnt(partial(cispo, clip_low=0.2, clip_high=0.28), ratio, advantage)
    assert loss == pytest.approx(weight * advantage)  # -w A * -1
    assert gradient == pytest.approx(-weight * advantage)
    assert told["pg_clipfrac"] == clipped


def test_cispo_without_a_lower_bound():
    # clip_low 1 bounds below at 0, which no ratio reaches; ScaleRL's absolute cap of 5 is clip_high 4
    bounds = partial(cispo, clip_low=1.0, clip_high=4.0)
    assert learnt(bounds, 0.01, 1.0)[1] == pytest.approx(-0.01)
    assert learnt(bounds, 7.0, 1.0)[1] == pytest.approx(-5.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "tau"),
    [(1.0, 1.0, 1.0), (1.0, -1.0, 1.05), (2.0, 3.0, 1.0), (2.0, -3.0, 1.05), (0.5, 3.0, 1.0)],
)
def test_sapo(ratio, advantage, tau):
    loss, gradient, told = learnt(partial(sapo, tau_positive=1.0, tau_negative=1.05), ratio, advantage)
    opening = 1 / (1 + math.exp(-tau * (ratio - 1)))
    assert loss == pytest.approx(-advantage * 4 / tau * opening)
    assert gradient == pytest.approx(-advantage * ratio * 4 * opening * (1 - opening))
    assert told["pg_damping"] == pytest.approx(1 - 4 * opening * (1 - opening))


def test_sapo_golden():
    # ratio 2, tau 1: sigma(1) = 0.731059; loss -4 * 0.731059; gradient -2 * 4 * 0.196612
    loss, gradient, told = learnt(partial(sapo, tau_positive=1.0, tau_negative=1.05), 2.0, 1.0)
    assert (loss, gradient) == pytest.approx((-2.924234, -1.572896), abs=1e-6)
    assert told["pg_damping"] == pytest.approx(0.213552, abs=1e-6)


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        (partial(cispo, clip_low=0.0, clip_high=0.2), "clip bounds"),
        (partial(sapo, tau_positive=0.0, tau_negative=1.0), "tau_positive"),
        (partial(sapo, tau_positive=1.0, tau_negative=-1.0), "tau_negative"),
    ],
)
def test_settings_that_cannot_be_are_refused(surrogate, message):
    with pytest.raises(ConfigError, match=message):
        learnt(surrogate, 1.0, 1.0)
