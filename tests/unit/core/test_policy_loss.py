from __future__ import annotations

import math

import pytest
import torch

from rlprm.core.metrics import numbers
from rlprm.core.mismatch import mismatch_metrics, mismatch_weights
from rlprm.core.policy_loss import Choices, Denominators, aggregation_weights, ppo_clip, weighted_sum
from rlprm.core.reduce import Identity
from rlprm.errors import ConfigError

CLIP = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None}


def one(new, old, gain, on=None):
    """A single sequence."""
    return Choices(
        logprobs=new,
        old_logprobs=old,
        advantages=gain,
        response_mask=torch.ones_like(new, dtype=torch.bool) if on is None else on,
        sequence=torch.zeros_like(new, dtype=torch.int64),
        num_sequences=1,
    )


def loss_at(ratio, advantage, **settings):
    new = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, told = ppo_clip(one(new, torch.zeros(1, 1), torch.tensor([[advantage]])), **{**CLIP, **settings})
    loss.sum().backward()
    return loss.item(), new.grad.item(), {name: value.item() for name, value in told.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.1, 2.0, -2.2, -2.2, 0.0),  # inside the band: -rho A, d/dlogp the same
        (1.5, 2.0, -2.56, 0.0, 1.0),  # above 1.28 with A > 0: flat
        (0.5, 2.0, -1.0, -1.0, 0.0),  # below the band with A > 0: still pulled up
        (0.5, -2.0, 1.6, 0.0, 1.0),  # below 0.8 with A < 0: flat
        (1.5, -2.0, 3.0, 3.0, 0.0),  # above the band with A < 0: still pushed down
    ],
)
def test_clip(ratio, advantage, loss, gradient, clipped):
    found, slope, told = loss_at(ratio, advantage)
    assert (found, slope, told["pg_clipfrac"]) == pytest.approx((loss, gradient, clipped), abs=1e-6)
    assert told["ratio"] == pytest.approx(ratio)
    assert told["ppo_kl"] == pytest.approx(-math.log(ratio), abs=1e-6)


def test_dual_clip_bounds_the_loss_of_a_negative_advantage():
    # rho 5, A -2: 10 without, 3 * 2 = 6 and flat with dual_clip 3
    assert loss_at(5.0, -2.0)[0] == pytest.approx(10.0, abs=1e-5)
    loss, slope, told = loss_at(5.0, -2.0, dual_clip=3.0)
    assert (loss, slope, told["pg_clipfrac_lower"]) == (6.0, 0.0, 1.0)
    assert loss_at(5.0, 2.0, dual_clip=3.0)[2]["pg_clipfrac_lower"] == 0.0


def test_log_ratios_are_bounded():
    loss, _, _ = loss_at(math.exp(30), -1.0)
    assert loss == pytest.approx(math.exp(20), rel=1e-5)


def test_masked_nan_reaches_neither_loss_nor_gradient():
    nan = torch.tensor([[0.0, torch.nan]])
    new = nan.clone().requires_grad_()
    loss, told = ppo_clip(one(new, nan, torch.tensor([[1.0, torch.nan]]), torch.tensor([[True, False]])), **CLIP)
    loss.sum().backward()
    assert loss.tolist() == [[-1.0, 0.0]]
    assert new.grad.tolist() == [[-1.0, 0.0]]
    assert all(torch.isfinite(value).all() for value in told.values())


@pytest.mark.parametrize("settings", [{"clip_low": 0.0}, {"clip_low": 1.5}, {"clip_high": 0.0}, {"dual_clip": 0.5}])
def test_bounds_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError, match="clip"):
        loss_at(1.0, 1.0, **settings)


# losses [1, 2], [3, 4, 5], [6], and a fully masked sequence
LOSSES = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0], [6.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
MASK = torch.tensor([[True, True, False], [True] * 3, [True, False, False], [False] * 3])
SEQUENCE = torch.tensor([[0, 0, -1], [1, 1, 1], [2, -1, -1], [3, 3, 3]])


@pytest.mark.parametrize(
    ("mode", "horizon", "expected"),
    [
        ("token-mean", None, 3.5),  # 21 / 6
        ("seq-mean-token-sum", None, 7.0),  # (3 + 12 + 6) / 3
        ("seq-mean-token-mean", None, 3.833333),  # (1.5 + 4 + 6) / 3
        ("seq-mean-token-sum-norm", 8, 0.875),  # 7 / 8
        ("token-sum", None, 21.0),
    ],
)
def test_aggregation_golden(mode, horizon, expected):
    denominators = Denominators.count(MASK.sum(1), Identity())
    assert denominators == Denominators(tokens=6.0, sequences=3.0)
    weights = aggregation_weights(MASK, SEQUENCE, 4, mode=mode, denominators=denominators, horizon=horizon)
    assert weighted_sum(LOSSES, weights).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("mode", "horizon", "tokens", "message"),
    [
        ("token-mean", 8, 6.0, "horizon is 8"),
        ("seq-mean-token-sum-norm", None, 6.0, "horizon is None"),
        ("token-mean", None, 0.0, "must be skipped"),
    ],
)
def test_aggregation_refuses_what_it_would_ignore(mode, horizon, tokens, message):
    with pytest.raises(ConfigError, match=message):
        aggregation_weights(
            MASK, SEQUENCE, 4, mode=mode, denominators=Denominators(tokens=tokens, sequences=3.0), horizon=horizon
        )


# ratios pi_old / mu: 4, 0.25, 1.5 and masked
OLD = torch.tensor([[math.log(4), math.log(0.25), math.log(1.5), torch.nan]])
MU = torch.tensor([[0.0, 0.0, 0.0, torch.nan]])
ON = torch.tensor([[True, True, True, False]])


@pytest.mark.parametrize(
    ("mode", "cap", "low", "expected"),
    [
        ("none", None, None, [1.0, 1.0, 1.0, 1.0]),
        ("truncate", 2.0, None, [2.0, 0.25, 1.5, 1.0]),
        ("band", 2.0, 0.5, [0.0, 0.0, 1.5, 1.0]),
        ("sequence_truncate", 5.0, None, [1.5, 1.5, 1.5, 1.0]),  # 4 * 0.25 * 1.5
        ("sequence_truncate", 1.2, None, [1.2, 1.2, 1.2, 1.0]),
    ],
)
def test_mismatch_weights(mode, cap, low, expected):
    old = OLD.clone().requires_grad_()
    weights = mismatch_weights(old, MU, ON, mode=mode, cap=cap, low=low)
    assert weights[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert not weights.requires_grad


@pytest.mark.parametrize(("mode", "cap", "low"), [("none", 2.0, None), ("band", 2.0, None), ("truncate", 0.5, None)])
def test_mismatch_bounds_that_contradict_are_refused(mode, cap, low):
    with pytest.raises(ConfigError, match="rollout correction"):
        mismatch_weights(OLD, MU, ON, mode=mode, cap=cap, low=low)


def test_mismatch_metrics():
    # probabilities 0.5 against 0.25 and 0.25 against 0.25: differences 0.25 and 0; log ratios log 2 and 0
    old, mu = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.25]]).log()
    on = torch.tensor([[True, True]])
    told = numbers(mismatch_metrics(old, mu, on, mismatch_weights(old, mu, on, mode="truncate", cap=1.5, low=None)))
    assert told["training/rollout_probs_diff_mean"] == pytest.approx(0.125)
    assert told["training/rollout_probs_diff_max"] == pytest.approx(0.25)
    assert told["training/rollout_logprobs_diff_max"] == pytest.approx(math.log(2))
    assert told["training/rollout_kl"] == pytest.approx(-math.log(2) / 2)
    assert told["training/rollout_k3"] == pytest.approx((2 - 1 - math.log(2)) / 2)
    assert told["training/rollout_is_mean"] == pytest.approx(1.25)
    assert told["training/rollout_is_changed_frac"] == pytest.approx(0.5)
    uncorrected = mismatch_metrics(old, mu, on, torch.ones_like(old))
    assert numbers(uncorrected)["training/rollout_is_changed_frac"] == 0.0
