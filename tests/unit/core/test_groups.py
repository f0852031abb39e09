from __future__ import annotations

import pytest
import torch

from rlprm.core.groups import group_centre, group_mean, group_std, leave_one_out, lone, no_spread

ALL = torch.tensor([True, True, True, True])


def test_ids_need_not_be_contiguous():
    # groups 9 = {1, 3}, 2 = {10, 30}; means 2 and 20; std_b sqrt(2) and sqrt(200)
    values, group = torch.tensor([1.0, 10.0, 3.0, 30.0]), torch.tensor([9, 2, 9, 2])
    assert group_mean(values, ALL, group).tolist() == [2.0, 20.0, 2.0, 20.0]
    assert group_std(values, ALL, group).tolist() == pytest.approx([2**0.5, 200**0.5, 2**0.5, 200**0.5])
    assert leave_one_out(values, ALL, group).tolist() == [-2.0, -20.0, 2.0, 20.0]


def test_absent_members_do_not_count():
    # present: 1 and 3, so the mean is 2; the absent NaN is neither read nor given a result
    values, present = torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([True, False, True])
    group = torch.tensor([0, 0, 0])
    assert group_centre(values, present, group).tolist() == [-1.0, 0.0, 1.0]
    assert leave_one_out(values, present, group).tolist() == [-2.0, 0.0, 2.0]


def test_a_lone_member_gets_zero_and_is_named():
    values, group = torch.tensor([5.0, 7.0]), torch.tensor([0, 0])
    present = torch.tensor([True, False])
    assert leave_one_out(values, present, group).tolist() == [0.0, 0.0]
    assert lone(present, group).tolist() == [True, False]


@pytest.mark.parametrize("reward", [0.7, 0.3, 0.35, 0.4])
def test_equal_rewards_have_exactly_no_spread(reward):
    # in float32, seven rewards of 0.7 over (std + 1e-6) give 0.056: rounding alone
    values, present = torch.full((7,), reward), torch.ones(7, dtype=torch.bool)
    group = torch.zeros(7, dtype=torch.int64)
    assert group_std(values, present, group).tolist() == [0.0] * 7
    assert group_centre(values, present, group).tolist() == [0.0] * 7


def test_a_large_mean_does_not_eat_the_spread():
    # E[x^2] - E[x]^2 at 1e6 would be 1e12 - 1e12; two passes give std_b of (0, 1) = 0.707107
    values, present = torch.tensor([1e6, 1e6 + 1]), torch.tensor([True, True])
    assert group_std(values, present, torch.tensor([0, 0])).tolist() == pytest.approx([0.7071067811865476] * 2)


def test_a_group_without_present_members_has_no_spread():
    present = torch.tensor([False, False, True, True])
    assert no_spread(torch.tensor([1.0, 2.0, 3.0, 4.0]), present, torch.tensor([0, 0, 1, 1])).tolist() == [
        True, True, False, False,
    ]  # fmt: skip
