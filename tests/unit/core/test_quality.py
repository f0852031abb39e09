from __future__ import annotations

import math

import pytest
import torch

from rlprm.core.quality import (
    auc,
    correlation,
    expected_calibration_error,
    first_wrong_chance,
    first_wrong_hit,
    pair_accuracy,
    pass_at_k,
    step_auc,
)
from rlprm.errors import ConfigError


def test_pair_accuracy_averages_groups_and_skips_unmixed_and_absent():
    # group 0: right 3 against wrong 1, 2 -> 1; group 4: right 1 against wrong 1, 2 -> (1/2 + 0)/2; group 9: all right
    # the absent NaN of group 0 would otherwise be a wrong pair
    rewards = torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0, 2.0, 5.0, 6.0, torch.nan])
    outcome = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    group = torch.tensor([0, 4, 0, 0, 4, 4, 9, 9, 0])
    present = torch.tensor([True] * 8 + [False])
    assert pair_accuracy(rewards, outcome, present, group) == (pytest.approx((1 + 0.25) / 2), 2)


def test_pair_accuracy_without_a_mixed_group_is_none():
    assert pair_accuracy(torch.ones(2), torch.ones(2), torch.tensor([True, True]), torch.tensor([0, 0])) == (None, 0)


def test_auc_against_all_pairs():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(5, (40,), generator=generator).float()  # many ties
    right = torch.rand(40, generator=generator) < 0.4
    gap = rewards[right][:, None] - rewards[~right][None, :]
    assert auc(rewards, right) == pytest.approx(float((gap > 0).float().mean() + 0.5 * (gap == 0).float().mean()))
    assert auc(rewards, torch.ones(40, dtype=torch.bool)) is None


def test_calibration():
    # bins of 0.5: sigmoid(-log 3) = 0.25 twice with outcomes 0, 1 -> 0.25 * 2/3; sigmoid(log 9) = 0.9, outcome 1
    logits = torch.tensor([-math.log(3), -math.log(3), math.log(9)])
    found = expected_calibration_error(logits, torch.tensor([0.0, 1.0, 1.0]), 2)
    assert found == pytest.approx(2 / 3 * 0.25 + 1 / 3 * 0.1, abs=1e-6)
    assert expected_calibration_error(torch.zeros(0), torch.zeros(0), 2) is None
    with pytest.raises(ConfigError, match="0 bins"):
        expected_calibration_error(logits, logits, 0)


def test_correlation():
    # (1, 2, 3) and (1, 3, 2): covariance 1, both variances 2 -> 0.5
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])) == pytest.approx(0.5)
    assert correlation(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])) is None


@pytest.mark.parametrize(
    ("rewards", "labels", "expected"),
    [
        ([0.0, -1.0, -0.5], [1, 0, 0], 1.0),
        ([0.0, -0.5, -1.0], [1, 0, 0], 0.0),  # finds a later wrong step, not the first
        ([-1.0, -1.0, 0.0], [1, 0, 1], 0.5),  # a tie of two
        ([-9.0, -1.0, 0.0], [-1, 0, 1], 1.0),  # an unlabelled step is no candidate
        ([-1.0, 0.0], [1, 1], None),
        ([], [], None),
    ],
)
def test_first_wrong_hit(rewards, labels, expected):
    assert first_wrong_hit(rewards, labels) == expected


def test_first_wrong_chance():
    assert first_wrong_chance([1, 0, 1, -1]) == pytest.approx(1 / 3)
    assert first_wrong_chance([1, 1]) is None


def test_step_auc_pools_rows():
    # right 2, 0; wrong 1: one of two pairs in order; the unlabelled 9 is left out
    assert step_auc([[2.0, 1.0], [0.0, 9.0]], [[1, 0], [1, -1]]) == 0.5
    with pytest.raises(ConfigError, match="one label per step"):
        step_auc([[1.0, 2.0]], [[1]])


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (16, 3, 4, 0.607143),  # 1 - C(13,4)/C(16,4) = 1 - 715/1820
        (4, 0, 4, 0.0),
        (4, 1, 4, 1.0),
        (1, 1, 1, 1.0),
        (10, 3, 1, 0.3),
    ],
)
def test_pass_at_k(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-6)


def test_pass_at_more_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="pass@5 of 4"):
        pass_at_k(4, 1, 5)
