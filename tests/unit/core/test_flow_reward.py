"""From deviations to prices, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from rlprm.core.flow_reward import debiased, flow_rewards
from rlprm.errors import ConfigError

ALL = torch.tensor([[True] * 6])


def prices(deviation, mask=None, *, threshold=0.6, keep=15, price=0.01):
    values = torch.tensor(deviation, dtype=torch.float64)
    found = flow_rewards(
        values, ALL if mask is None else torch.tensor(mask), threshold=threshold, keep=keep, price=price
    )
    return found.tolist()


def test_golden_row():
    # tau 0.8: every deviation times 0.8/0.2 = 4: 4, 8, 10, 12, 20, 24
    score = debiased(torch.tensor([[1.0, 2.0, 2.5, 3.0, 5.0, 6.0]]), torch.tensor([0.8]))
    assert score.tolist() == pytest.approx([4, 8, 10, 12, 20, 24])
    # min-max (24 - 4 = 20): 0, .2, .3, .4, .8, 1; below 0.6 it is 0; times -0.01
    assert prices([score.tolist()])[0] == pytest.approx([0, 0, 0, 0, -0.008, -0.01])


def test_several_noise_levels_are_debiased_before_they_are_averaged():
    # 1 * 0.5/0.5 = 1 and 2 * 0.8/0.2 = 8: mean 4.5
    assert debiased(torch.tensor([[1.0], [2.0]]), torch.tensor([0.5, 0.8])).tolist() == pytest.approx([4.5])


def test_only_the_largest_are_kept_and_ties_go_to_the_earlier_token():
    assert prices([[0, 9, 10, 8, 9, 9]], keep=3, price=1.0)[0] == pytest.approx([0, -0.9, -1.0, 0, -0.9, 0])


def test_the_minimum_is_the_true_one_and_masked_entries_are_not_in_it():
    # response tokens 2, 4, 6: min 2, not the masked 0 and not the second smallest 4: 0, .5, 1
    row = prices([[0, 2, 4, 6, 100, 0]], [[False, True, True, True, False, False]], threshold=0.5, price=1.0)
    assert row[0] == pytest.approx([0, 0, -0.5, -1.0, 0, 0])


def test_a_constant_row_and_an_empty_one_are_0():
    assert prices([[3.0] * 6])[0] == [0.0] * 6
    assert prices([[3.0] * 6], [[False] * 6])[0] == [0.0] * 6


def test_nan_under_the_mask_does_not_leak():
    row = prices([[torch.nan, 1, 2, 3, 4, 5]], [[False] + [True] * 5], threshold=0.0, price=1.0)
    assert row[0] == pytest.approx([0, 0, -0.25, -0.5, -0.75, -1.0])


def test_settings_out_of_range_are_refused():
    for bad in ({"keep": 0}, {"threshold": 1.5}):
        with pytest.raises(ConfigError, match="expected at least 1, and a number from 0 to 1"):
            prices([[1.0] * 6], **bad)
    for tau in (0.0, 1.0):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            debiased(torch.zeros(1, 1), torch.tensor([tau]))
