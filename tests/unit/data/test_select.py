"""Which rollouts train the policy: PROF's numbers, its order, and rows that lack a verdict or a process reward."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlprm.batch import Row
from rlprm.core.row_scores import of_steps
from rlprm.data.select import balanced, prof, removals
from rlprm.errors import ConfigError
from rlprm.roles import RowScore

SETTINGS: dict[str, Any] = {
    "stream": "process", "keep": 2, "aggregate": "mean", "negatives": "lowest", "penalty": 0.0, "most_steps": None, "seed": 0,
}  # fmt: skip


def row(outcome: float | None, sample: int, **changes: Any) -> Row:
    given_: dict[str, Any] = {
        "group": 0, "prompt_id": "a/0", "source": "a", "sample": sample, "outcome": outcome, "reason": "", "finish": "stop",
        "prompt_length": 2, "response_length": 4, "num_steps": 2,
        "repetition": 0.0, "copy": False, "version": 0, "fresh": True, "train": True,
    }  # fmt: skip
    return Row(**{**given_, **changes})


def rows(*outcomes: float | None, **changes: Any) -> list[Row]:
    return [row(outcome, sample, **changes) for sample, outcome in enumerate(outcomes)]


def scores(*steps: list[float] | None) -> dict[str, dict[int, RowScore]]:
    return {"process": {place: of_steps(each) for place, each in enumerate(steps) if each is not None}}


def kept(chosen: list[bool]) -> list[int]:
    return [place for place, stays in enumerate(chosen) if stays]


@pytest.mark.parametrize(
    ("right", "wrong", "removed"), [(5, 3, (3, 1)), (7, 1, (4, 0)), (1, 7, (0, 4)), (4, 4, (2, 2)), (8, 0, (4, 0))]
)
def test_golden_removals(right: int, wrong: int, removed: tuple[int, int]):
    # D = n+ - n-, n = 8, m = 4: removed+ = clip(ceil((D + 4) / 2), 0, 4): 6/2 = 3; 10/2 = 5 -> 4; -2/2 = -1 -> 0; 4/2 = 2
    assert removals(right, wrong, 4) == removed


@given(right=st.integers(0, 12), wrong=st.integers(0, 12), keep=st.integers(1, 16))
def test_removals_leave_the_most_pairs(right: int, wrong: int, keep: int):
    gone = removals(right, wrong, keep)
    stay = min(keep, right + wrong)
    best = max(a * (stay - a) for a in range(stay + 1) if a <= right and stay - a <= wrong)
    assert 0 <= gone[0] <= right
    assert 0 <= gone[1] <= wrong
    assert (right - gone[0]) + (wrong - gone[1]) == stay
    assert (right - gone[0]) * (wrong - gone[1]) == best


# five right, three wrong, means 0.9 0.8 0.1 0.5 0.3 | 0.7 0.2 0.4: of four, 5 - 3 = 2 right and 3 - 1 = 2 wrong stay
OUTCOMES = (1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
MEANS = (0.9, 0.8, 0.1, 0.5, 0.3, 0.7, 0.2, 0.4)


def test_right_rows_with_the_highest_and_wrong_rows_with_the_lowest_rewards_stay():
    found = scores(*([mean + 0.05, mean - 0.05] for mean in MEANS))
    assert kept(prof(rows(*OUTCOMES), found, **{**SETTINGS, "keep": 4})) == [0, 1, 6, 7]


def test_random_negatives_leave_the_positives_as_they_are_and_depend_on_the_seed():
    found = scores(*([mean] for mean in MEANS))
    settings = {**SETTINGS, "keep": 4, "negatives": "random"}
    drawn = {seed: kept(prof(rows(*OUTCOMES), found, **{**settings, "seed": seed})) for seed in range(20)}
    assert all(each[:2] == [0, 1] for each in drawn.values())
    assert {tuple(each[2:]) for each in drawn.values()} == {(5, 6), (5, 7), (6, 7)}
    assert drawn[3] == kept(prof(rows(*OUTCOMES), found, **{**settings, "seed": 3}))
    later = kept(prof(rows(*OUTCOMES, version=7), found, **{**settings, "seed": 3}))
    versions = {tuple(kept(prof(rows(*OUTCOMES, version=v), found, **settings))) for v in range(20)}
    assert later[:2] == [0, 1]
    assert len(versions) == 3  # the same prompt in a later step is drawn anew


@pytest.mark.parametrize(
    ("aggregate", "stays"),
    # three right rows, one stays: [0.5 0.5 0.5] [0.0 1.0 0.8] [0.9 0.1]: the means 0.5 0.6 0.5, lowest 0.5 0 0.1, sums 1.5 1.8 1,
    # last 0.5 0.8 0.1
    [("mean", 1), ("lowest", 0), ("sum", 1), ("last", 1)],
)
def test_aggregates(aggregate: str, stays: int):
    found = scores([0.5, 0.5, 0.5], [0.0, 1.0, 0.8], [0.9, 0.1])
    assert kept(prof(rows(1.0, 1.0, 1.0), found, **{**SETTINGS, "keep": 1, "aggregate": aggregate})) == [stays]


def test_penalty_hits_responses_of_one_step_and_of_too_many():
    # r = 0.9 - 0.5, 0.6, 0.8 - 0.5: without the penalty row 0 would stay
    given_ = [row(1.0, 0, num_steps=1), row(1.0, 1, num_steps=3), row(1.0, 2, num_steps=9)]
    found = scores([0.9], [0.6], [0.8])
    settings = {**SETTINGS, "keep": 1}
    assert kept(prof(given_, found, **settings)) == [0]
    assert kept(prof(given_, found, **{**settings, "penalty": 0.5, "most_steps": 9})) == [1]
    assert kept(prof(given_, found, **{**settings, "penalty": 0.35})) == [2]  # 0.55, 0.6, 0.8: no bound, no penalty
    # of wrong rows the lowest r stays, so the penalty keeps them: r_pro = -(mean - penalty)
    wrong = [row(0.0, 0, num_steps=1), row(0.0, 1, num_steps=3)]
    assert kept(prof(wrong, scores([0.5], [0.3]), **settings)) == [1]
    assert kept(prof(wrong, scores([0.5], [0.3]), **{**settings, "penalty": 0.5})) == [0]


def test_rows_without_a_process_reward_go_first():
    found = scores(None, [0.1], [0.2], None, [0.9], [0.8])
    outcomes = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    assert kept(prof(rows(*outcomes), found, **{**SETTINGS, "keep": 4})) == [1, 2, 4, 5]
    assert kept(prof(rows(*outcomes), scores(), **{**SETTINGS, "keep": 6})) == [0, 1, 2, 3, 4, 5]


def test_a_row_without_a_verdict_and_a_refused_row_never_stay():
    given_ = [*rows(1.0, None, 0.0), row(1.0, 3, group=1, train=False)]
    found = scores([0.1], [0.1], [0.1], [0.1])
    assert kept(prof(given_, found, **{**SETTINGS, "keep": 8})) == [0, 2]
    assert kept(balanced(given_, {}, keep=8, seed=0)) == [0, 2]


def test_groups_are_chosen_from_one_by_one():
    given_ = [*rows(1.0, 1.0, 0.0), *rows(0.0, 0.0, 1.0, group=1, prompt_id="a/1")]
    found = scores([0.1], [0.9], [0.5], [0.9], [0.1], [0.5])
    assert kept(prof(given_, found, **SETTINGS)) == [1, 2, 4, 5]


def test_ties_go_to_the_earlier_sample_whatever_the_order_of_rows():
    given_ = rows(1.0, 1.0, 1.0)
    found = scores([0.5], [0.5], [0.5])
    assert kept(prof(given_, found, **{**SETTINGS, "keep": 1})) == [0]
    assert kept(prof(given_[::-1], found, **{**SETTINGS, "keep": 1})) == [2]


def test_balanced_draws_by_seed_and_asks_no_stream():
    drawn = {tuple(kept(balanced(rows(*OUTCOMES), {}, keep=4, seed=seed))) for seed in range(30)}
    assert len(drawn) > 10
    assert all(sum(place < 5 for place in each) == 2 == sum(place >= 5 for place in each) for each in drawn)


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (
            partial(prof, **{**SETTINGS, "stream": "verdict"}),
            "stream 'verdict', and the run has process; set select.stream",
        ),
        (partial(prof, **{**SETTINGS, "keep": 0}), "select.keep is 0"),
        (partial(balanced, keep=0, seed=0), "select.keep is 0"),
    ],
)
def test_what_cannot_work_is_refused(choose, message):
    with pytest.raises(ConfigError, match=message):
        choose(rows(1.0), scores([0.5]))
