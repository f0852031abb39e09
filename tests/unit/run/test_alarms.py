"""The alarms of a run: said once, written every step, braking, stopping, and continued from a checkpoint."""

from __future__ import annotations

import json

import pytest

from rlprm.cli.compose import composed
from rlprm.config import TrainConfig, validated
from rlprm.core.alarms import Rule
from rlprm.core.metrics import check_name
from rlprm.errors import AlarmRaised, ConfigError
from rlprm.run.alarms import Alarms, rules

LENGTH = "response_length/mean"


def rule(action: str, name: str = "length", metric: str = LENGTH) -> Rule:
    return Rule(
        name=name, metric=metric, low=None, high=10.0, fall=None, rise=None, patience=2, action=action, advice="Look."
    )


class Seen:
    """What the alarms do to the run."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.brake: list[float] = []
        self.asked = 0

    def canaries(self) -> list[str]:
        self.asked += 1
        return ["an empty answer was paid", "another one"]


def alarms(seen: Seen, *rules: Rule, canary_every: int = 0) -> Alarms:
    return Alarms(
        rules,
        decay=0.9,
        warmup=2,
        brake_factor=0.5,
        brake_recovery=0.25,
        canary_every=canary_every,
        canaries=seen.canaries,
        brake=seen.brake.append,
        say=seen.said.append,
    )


def test_an_alarm_is_said_once_and_written_until_it_is_quiet():
    seen = Seen()
    made = alarms(seen, rule("log"))
    found = [made.check(step, {LENGTH: value}) for step, value in enumerate((11.0, 11.0, 11.0, 9.0, 11.0), start=1)]
    assert [each["alarm/length"] for each in found] == [0.0, 1.0, 1.0, 0.0, 0.0]
    assert [each["alarm/brake"] for each in found] == [1.0] * 5
    assert seen.said == ["alarm length: response_length/mean is 11 at step 2, above 10, since step 1. Look."]
    made.stop()  # nothing to stop
    for name in found[0]:
        check_name(name)


def test_a_braking_alarm_lowers_the_next_steps_weight_as_long_as_it_lasts():
    seen = Seen()
    made = alarms(seen, rule("brake"))
    for step, value in enumerate((11.0, 11.0, 11.0, 9.0, 9.0, 9.0), start=1):
        made.check(step, {LENGTH: value})
    assert seen.brake == [1.0, 0.5, 0.25, 0.5, 0.75, 1.0]
    assert seen.said == [
        "alarm length: response_length/mean is 11 at step 2, above 10, since step 1. Look. Process rewards now count 0.5 "
        "times their weight."
    ]


def test_a_stopping_alarm_lets_the_step_end_and_then_says_how_to_go_on():
    made = alarms(Seen(), rule("stop"))
    made.check(1, {LENGTH: 11.0})
    assert not made.stopping
    assert made.check(2, {LENGTH: 11.0})["alarm/length"] == 1.0
    assert made.stopping
    with pytest.raises(
        AlarmRaised, match=r"above 10, since step 1.*saved and has ended.*alarms.rules.length.action=log"
    ):
        made.stop()


def test_canaries_are_asked_when_due_and_watched():
    seen = Seen()
    made = alarms(seen, rule("log"), canary_every=2)
    assert "verifier/canaries_failed" not in made.check(1, {LENGTH: 1.0})
    assert made.check(2, {LENGTH: 1.0})["verifier/canaries_failed"] == 2.0
    assert seen.asked == 1
    assert seen.said == ["step 2: an empty answer was paid"]


def test_without_rules_nothing_is_asked_or_written():
    seen = Seen()
    assert alarms(seen, canary_every=1).check(1, {LENGTH: 99.0}) == {}
    assert (seen.asked, seen.brake) == (0, [])


def test_a_resumed_run_goes_on_counting_and_braking():
    first, second = Seen(), Seen()
    made = alarms(first, rule("brake"), rule("log", "gone"))
    for step in (1, 2):
        made.check(step, {LENGTH: 11.0})
    again = alarms(second, rule("brake"), rule("log", "new"))
    again.restore(json.loads(json.dumps(made.state())))
    assert second.brake == [0.5]
    again.check(3, {LENGTH: 11.0})
    assert second.brake == [0.5, 0.25]
    assert second.said == []  # it was said before, and the new rule has its own patience
    assert {key.partition(":")[0] for key in again.state()["watched"]} == {"length", "new"}


def test_the_shipped_alarms_become_rules_and_off_means_none():
    made = validated(TrainConfig, composed("train", ["model.path=x", "alarms=stop"]).values)
    found = {each.name: each for each in rules(made.alarms)}
    assert found["repetition_right"].high == 0.2  # PURE's own limit
    assert (found["accuracy"].fall, found["accuracy"].action) == (0.5, "stop")
    assert (found["steps"].action, found["copies"].action) == ("brake", "log")
    assert rules(validated(TrainConfig, composed("train", ["model.path=x", "alarms=off"]).values).alarms) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["alarms.rules.length.metric=response_length/men"], "nearest name is 'response_length/mean'"),
        (["alarms.rules.length.change=[null,null]"], "alarm 'length' has no limit"),
        (["alarms.rules.length.action=halt"], "alarms.rules.length.action: found 'halt'"),
        (["alarms.brake_factor=1.0"], "alarms.brake_factor: found 1.0"),
        (["alarms=brake", "method=dapo"], "no weight of its own that could be lowered"),
    ],
)
def test_what_cannot_work_is_refused_at_start_up(words, message):
    with pytest.raises(ConfigError, match=message):
        validated(TrainConfig, composed("train", ["model.path=x", *words]).values)
