"""The oracle pays each step by its exact label, at the step's last token."""

from __future__ import annotations

import pytest
import torch

from rlprm.errors import ConfigError
from rlprm.sources.exact import exact_steps
from tests.unit.made import shard


def test_rewards_stand_at_the_last_token_of_each_labelled_step():
    made = shard([4, 3], [1.0, 0.0], steps=[[0, 0, 1, 1], [0, 1, 1]], labels=[(1, 0), (-1, 0)])
    flat, measured = exact_steps("process", wrong=-1.0, right=0.5).score(made, torch.zeros(9), None)
    #                    prompt  step 0      step 1        prompt  unknown  step 1
    assert flat["rewards"].tolist() == [0.0, 0.0, 0.5, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0]
    assert flat["present"].tolist() == [False, False, True, False, True, False, False, False, True]
    assert measured is None


def test_a_right_step_worth_nothing_is_present_all_the_same():
    made = shard([2], [1.0], labels=[(1, 1)])
    flat, _ = exact_steps("process", wrong=-1.0, right=0.0).score(made, torch.zeros(3), None)
    assert flat["rewards"].tolist() == [0.0, 0.0, 0.0]
    assert flat["present"].tolist() == [False, True, True]


def test_no_labels_at_all_are_refused():
    with pytest.raises(ConfigError, match=r"gave no step labels.*chain_arithmetic"):
        exact_steps("process", wrong=-1.0, right=0.0).score(shard([2], [1.0]), torch.zeros(3), None)


def test_it_learns_nothing_and_keeps_nothing():
    source = exact_steps("process", wrong=-1.0, right=0.0)
    assert source.stateful is False
    learned = source.learn(shard([2], [1.0]), torch.zeros(3), None)
    assert (learned.partial, learned.agreed) == ({}, {})
