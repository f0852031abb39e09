"""Alarms on hand-made series: what raises one, when, what quiets it, and what it says."""

from __future__ import annotations

import json

import pytest

from rlprm.core.alarms import AlarmState, Rule, braked, copies, matching, repetition, told, watch
from rlprm.errors import CheckpointError, ConfigError

LENGTH = "response_length/mean"


def rule(**changes) -> Rule:
    given = {
        "name": "length", "metric": LENGTH, "low": None, "high": None, "fall": None, "rise": None, "patience": 1,
        "action": "log", "advice": "Read rollouts.jsonl.",
    }  # fmt: skip
    return Rule(**{**given, **changes})


def rung(rules: list[Rule], series: list[dict[str, float]], *, decay: float = 0.5, warmup: int = 2):
    """Names raised at each step, and the state at the end."""
    state, names = AlarmState.start(), []
    for step, metrics in enumerate(series, start=1):
        state, raised = watch(state, rules, metrics, step=step, decay=decay, warmup=warmup)
        names.append([alarm.rule.name for alarm in raised])
    return names, state


def of(*values: float | None) -> list[dict[str, float]]:
    return [{} if value is None else {LENGTH: value} for value in values]


def test_a_band_is_left_on_both_sides_and_its_limits_belong_to_it():
    names, _ = rung([rule(low=2.0, high=4.0)], of(2.0, 4.0, 4.5, 3.0, 1.5))
    assert names == [[], [], ["length"], [], ["length"]]


def test_patience_counts_steps_in_a_row_and_an_unmeasured_one_neither_counts_nor_breaks_the_row():
    names, state = rung([rule(high=4.0, patience=3)], of(5.0, 5.0, 3.0, 5.0, None, 5.0, 5.0, 5.0))
    assert names == [[], [], [], [], [], [], ["length"], ["length"]]
    (watched,) = state.watched.values()
    assert (watched.outside, watched.since) == (4, 4)


def test_a_change_is_measured_from_the_moving_mean_which_is_held_while_it_is_outside():
    # means of values inside, decay 0.5: 10; 10 + (20 - 10) / 2 = 15; then 31 > 2 * 15 is outside and changes nothing,
    # so 31 stays outside; 29 <= 30 is inside: 15 + (29 - 15) / 2 = 22, and 31 <= 44
    names, state = rung([rule(rise=2.0)], of(10.0, 20.0, 31.0, 31.0, 29.0, 31.0))
    assert names == [[], [], ["length"], ["length"], [], []]
    (watched,) = state.watched.values()
    assert watched.baseline == 22 + (31 - 22) / 2
    assert watched.seen == 4


def test_the_first_values_are_averaged_plainly_so_that_the_very_first_does_not_rule_the_mean():
    # decay 0.99: 1/n is larger than 0.01 for long, so the mean of 4, 8, 12 is 8
    _, state = rung([rule(rise=2.0)], of(4.0, 8.0, 12.0), decay=0.99, warmup=10)
    (watched,) = state.watched.values()
    assert watched.baseline == pytest.approx(8.0)


def test_no_change_is_judged_before_the_warm_up_nor_from_a_mean_that_is_not_positive():
    assert rung([rule(rise=2.0)], of(1.0, 9.0, 9.0), warmup=3)[0] == [[], [], []]
    assert rung([rule(rise=2.0, fall=0.5)], of(-1.0, -1.0, -9.0, 0.5), warmup=1)[0] == [[], [], [], []]


def test_where_a_side_has_two_limits_both_must_be_crossed():
    both = [rule(metric="process_steps/frac_single", high=0.5, rise=1.5)]
    series = [{"process_steps/frac_single": value} for value in (1.0, 1.0, 1.0)]
    assert rung(both, series)[0] == [[], [], []]  # one step a response by choice: always so, no alarm
    series = [{"process_steps/frac_single": value} for value in (0.01, 0.01, 0.04, 0.6)]
    assert rung(both, series)[0] == [[], [], [], ["length"]]


def test_nan_is_no_measure():
    assert rung([rule(high=4.0)], of(float("nan"), float("inf")))[0] == [[], []]


def test_the_message_says_what_was_seen_the_limit_since_when_and_what_to_do():
    state = AlarmState.start()
    for step, value in enumerate((10.0, 10.0, 31.0), start=7):
        state, raised = watch(state, [rule(rise=2.0, patience=2)], {LENGTH: value}, step=step, decay=0.5, warmup=2)
        assert not raised
    state, (alarm,) = watch(state, [rule(rise=2.0, patience=2)], {LENGTH: 31.5}, step=10, decay=0.5, warmup=2)
    assert alarm.message == (
        "alarm length: response_length/mean is 31.5 at step 10, more than 2 times its usual 10, since step 9. "
        "Read rollouts.jsonl."
    )
    assert alarm.new
    _, (again,) = watch(state, [rule(rise=2.0, patience=2)], {LENGTH: 31.5}, step=11, decay=0.5, warmup=2)
    assert not again.new


def test_a_pattern_watches_every_process_stream_by_itself():
    gap = rule(name="wrong_paid", metric="reward/{stream}/right_wrong_gap", low=0.0)
    metrics = {
        "reward/prm/right_wrong_gap": -0.1,
        "reward/judge/right_wrong_gap": 0.1,
        "reward/outcome/right_wrong_gap": -1.0,
        "reward/kl/right_wrong_gap": -1.0,
    }
    assert matching(gap.metric, metrics) == ["reward/judge/right_wrong_gap", "reward/prm/right_wrong_gap"]
    _, (alarm,) = watch(AlarmState.start(), [gap], metrics, step=1, decay=0.5, warmup=0)
    assert alarm.metric == "reward/prm/right_wrong_gap"
    assert told([gap], metrics, [alarm]) == {"alarm/wrong_paid": 1.0}
    assert told([gap, rule(high=1.0)], {LENGTH: 0.5}, []) == {"alarm/length": 0.0}  # the other was not measured


def test_the_brake_multiplies_per_alarm_comes_back_and_stays_between_0_and_1():
    metrics = {LENGTH: 9.0}
    rules = [rule(name=name, high=1.0, action="brake") for name in ("a", "b")] + [rule(high=1.0)]
    _, raised = watch(AlarmState.start(), rules, metrics, step=1, decay=0.5, warmup=0)
    state = braked(AlarmState.start(), raised, factor=0.5, recovery=0.5)
    assert state.brake == 0.25  # two of the three brake
    state = braked(state, [], factor=0.5, recovery=0.5)
    assert state.brake == 0.75
    assert braked(state, [], factor=0.5, recovery=0.5).brake == 1.0
    assert braked(state, raised, factor=0.0, recovery=0.5).brake == 0.0


def test_the_state_goes_through_json():
    _, state = rung([rule(rise=2.0, patience=2)], of(10.0, 10.0, 31.0))
    assert AlarmState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    with pytest.raises(CheckpointError, match="expected watched and brake"):
        AlarmState.from_dict({"other": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "has no limit"),
        ({"low": 2.0, "high": 1.0}, "expected low below high"),
        ({"fall": 1.5}, "factor between 0 and 1"),
        ({"rise": 0.5}, "factor above 1"),
        ({"high": 1.0, "patience": 0}, "at least 1 step"),
        ({"high": 1.0, "name": "brake"}, "choose another name"),
        ({"high": 1.0, "metric": "response_length/meen"}, "nearest name is 'response_length/mean'"),
    ],
)
def test_an_impossible_rule_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        rule(**changes)


def test_repetition_by_hand():
    # 8-grams of 16 tokens with period 4: 9 of them, 4 distinct
    assert repetition([1, 2, 3, 4] * 4) == pytest.approx(1 - 4 / 9)
    assert repetition(list(range(16))) == 0.0
    assert repetition([1] * 7) == 0.0  # shorter than one 8-gram
    assert repetition([1] * 107) == pytest.approx(0.99)


def test_copies_are_of_earlier_responses_only():
    assert copies([(1,), (1, 2), (1,), (1,), ()]) == [False, False, True, True, False]
