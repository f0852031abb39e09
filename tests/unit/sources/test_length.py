"""DAPO's soft overlong punishment: 0, a straight line, the whole price."""

from __future__ import annotations

import pytest

from rlprm.batch import flatten
from rlprm.errors import ConfigError
from rlprm.sources.base import OWN
from rlprm.sources.length import Overlong
from tests.unit.made import context, scorable, shard

SETTINGS = {"max_length": 10, "buffer": 0.4, "factor": 1.0}


def scored(lengths, outcomes, **changes):
    given = shard(lengths, outcomes)
    stream = Overlong(context("overlong"), **{**SETTINGS, **changes}).score(scorable(given)).streams[OWN]
    assert bool((stream.present.sum(1) <= 1).all())
    ends = (given.lengths.cumsum(0) - 1).tolist()
    rewards, present = flatten(stream.rewards, given.lengths), flatten(stream.present, given.lengths)
    assert int(present.sum()) == int(present[ends].sum()), "only last tokens are present"
    return rewards[ends].tolist(), present[ends].tolist()


def test_price_by_length():
    # free up to 6; then (6 - L) / 4: 7 costs a quarter, 10 and beyond the whole
    rewards, present = scored([1, 6, 7, 9, 10, 12], [1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    assert rewards == pytest.approx([0.0, 0.0, -0.25, -0.75, -1.0, -1.0])
    assert present == [True] * 6  # a price of 0 is there
    assert scored([7, 12], [1.0, 1.0], factor=0.5)[0] == pytest.approx([-0.125, -0.5])


def test_dapo_numbers():
    # L_max 20480, buffer 4096: 18432 lies half way, ((20480 - 4096) - 18432) / 4096 = -0.5
    assert scored([18432], [1.0], max_length=20480, buffer=0.2)[0] == pytest.approx([-0.5])


def test_no_verdict_no_price():
    rewards, present = scored([12, 12], [None, 1.0])
    assert rewards == [0.0, -1.0]
    assert present == [False, True]


@pytest.mark.parametrize("change", [{"max_length": 0}, {"buffer": 0.0}, {"buffer": 1.5}, {"factor": -1.0}])
def test_settings_that_cannot_be_are_refused(change):
    with pytest.raises(ConfigError, match="overlong has max_length"):
        Overlong.check(model=None, learner=False, **{**SETTINGS, **change})


def test_it_takes_no_model_and_pays_whole_responses():
    with pytest.raises(ConfigError, match="has no model"):
        Overlong.check(model="somewhere", learner=False, **SETTINGS)
    assert Overlong.granularity(**SETTINGS) == "whole"
