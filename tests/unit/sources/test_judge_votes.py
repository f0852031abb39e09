"""The five rules, by hand. A vote of 0 says wrong; `wrong` below is what the rule makes of each step."""

from __future__ import annotations

import pytest

from rlprm.sources.judge_votes import RULES, disagreement, merged

# Four critiques of four steps, found wrong by 0, 1, 2 and 4 of them.
BY_STEP = {0: [1.0, 1.0, 1.0, 1.0], 1: [1.0, 0.0, 1.0, 1.0], 2: [0.0, 1.0, 0.0, 1.0], 4: [0.0, 0.0, 0.0, 0.0]}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("intersection", [1.0, 1.0, 1.0, 0.0]),  # wrong only where all four say so
        ("majority", [1.0, 1.0, 0.0, 0.0]),  # two of four is half, and half is enough
        ("union", [1.0, 0.0, 0.0, 0.0]),  # one is enough
        ("average", [1.0, 0.75, 0.5, 0.0]),
    ],
)
def test_four_votes(rule, expected):
    assert [merged(votes, rule) for votes in BY_STEP.values()] == expected


def test_majority_of_three_needs_two():
    assert merged([0.0, 1.0, 1.0], "majority") == 1.0
    assert merged([0.0, 0.0, 1.0], "majority") == 0.0


def test_what_could_not_be_read_is_not_counted():
    # Of four asked two could be read: both wrong is all, one of two is half.
    assert merged([0.0, 0.0], "intersection") == 0.0
    assert merged([0.0, 1.0], "majority") == 0.0


def test_a_single_vote_is_itself():
    assert merged([0.3], "single") == 0.3


@pytest.mark.parametrize("rule", RULES)
def test_no_vote_left_says_nothing_under_any_rule(rule):
    assert merged([], rule) is None


def test_disagreement_is_the_distance_of_the_farthest_votes():
    assert [disagreement(votes) for votes in BY_STEP.values()] == [0.0, 1.0, 1.0, 0.0]
    assert disagreement([0.2, 0.9, 0.5]) == pytest.approx(0.7)
    assert disagreement([]) is None
