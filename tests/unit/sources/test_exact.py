"""The oracle pays each step by its exact label, at the step's last token."""

from __future__ import annotations

import pytest

from rlprm.batch import flatten
from rlprm.errors import ConfigError
from rlprm.sources.base import OWN
from rlprm.sources.exact import ExactSteps
from tests.unit.made import context, scorable, shard


def scored(given, **settings):
    scores = ExactSteps(context(), **settings).score(scorable(given))
    stream = scores.streams[OWN]
    assert scores.measurement is None
    return flatten(stream.rewards, given.lengths).tolist(), flatten(stream.present, given.lengths).tolist()


def test_rewards_stand_at_the_last_token_of_each_labelled_step():
    made = shard([4, 3], [1.0, 0.0], steps=[[0, 0, 1, 1], [0, 1, 1]], labels=[(1, 0), (-1, 0)])
    rewards, present = scored(made, wrong=-1.0, right=0.5)
    #                  prompt  step 0      step 1        prompt  unknown  step 1
    assert rewards == [0.0, 0.0, 0.5, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0]
    assert present == [False, False, True, False, True, False, False, False, True]


def test_a_right_step_worth_nothing_is_present_all_the_same():
    rewards, present = scored(shard([2], [1.0], labels=[(1, 1)]), wrong=-1.0, right=0.0)
    assert rewards == [0.0, 0.0, 0.0]
    assert present == [False, True, True]


def test_no_labels_at_all_are_refused():
    with pytest.raises(ConfigError, match=r"gave no step labels.*chain_arithmetic"):
        scored(shard([2], [1.0]), wrong=-1.0, right=0.0)


def test_it_learns_nothing_keeps_nothing_and_takes_no_model():
    source = ExactSteps(context(), wrong=-1.0, right=0.0)
    assert source.stateful is False
    learned = source.learn(scorable(shard([2], [1.0])))
    assert (learned.partial, learned.agreed) == ({}, {})
    with pytest.raises(ConfigError, match="has no model"):
        ExactSteps.check(model="somewhere", learner=False, wrong=-1.0, right=0.0)
