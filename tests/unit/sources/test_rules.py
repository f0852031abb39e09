"""Rules pay by the label of a verifier function that runs in its own killable process."""

from __future__ import annotations

from functools import partial

import pytest

from rlprm.errors import ConfigError
from rlprm.roles import RowText
from rlprm.sources.base import OWN
from rlprm.sources.rules import ResponseRule, StepRule, TurnReward
from rlprm.verify import exact, python_blocks, single_answer, step_form
from tests.unit.made import context, prompt, scorable, shard

LIMITS = {"workers": 1, "timeout_s": 20.0, "memory_mb": 1024}
LINES = partial(step_form.verify, pattern=r"\d+\+\d+=\d+")


def text(*steps):
    return RowText(prompt=prompt(), response="".join(steps), steps=steps)


def scored(kind, given, texts, **settings):
    source = kind(context(), **(LIMITS | settings))
    try:
        scores = source.score(scorable(given, texts=texts))
    finally:
        source.close()
    return scores.streams[OWN], scores.metrics.partial


def test_a_response_is_paid_at_its_last_token():
    given = shard([3, 2, 2], [1.0, 0.0, 1.0])
    texts = (text(r"so \boxed{4}."), text(r"\boxed{4}", r"\boxed{5}"), text("4"))
    rule = partial(single_answer.verify, pattern=None)
    stream, metrics = scored(ResponseRule, given, texts, rule=rule, right=1.0, wrong=-0.5)
    assert stream.rewards.tolist() == [[0, 0, 0, 1.0], [0, 0, -0.5, 0], [0, 0, -0.5, 0]]
    assert stream.present.tolist() == [[False] * 3 + [True], [False, False, True, False], [False, False, True, False]]
    assert metrics["rule/process/frac_held"].value == pytest.approx(1 / 3)
    assert metrics["rule/process/frac_absent"].value == 0.0


def test_a_pattern_that_never_ends_is_killed_and_absent():
    given = shard([2, 2], [1.0, 0.0])
    texts = (text("a" * 40), text("b"))
    rule = partial(single_answer.verify, pattern=r"(?:a+)+$|b")
    stream, metrics = scored(
        ResponseRule, given, (text("a" * 40 + "c"), texts[1]), rule=rule, right=1.0, wrong=0.0, timeout_s=1.0
    )
    assert stream.present.tolist() == [[False, False, False], [False, False, True]]
    assert stream.rewards[1].tolist() == [0.0, 0.0, 1.0]
    assert metrics["rule/process/frac_absent"].value == 0.5


def test_each_step_is_paid_by_its_own_label():
    given = shard([4, 1], [1.0, 0.0], steps=[[0, 0, 1, 2], [0]])
    texts = (text("1+1=2\n", "so what\n", "2+2=4"), text("3"))
    stream, _ = scored(StepRule, given, texts, rule=LINES, right=0.0, wrong=-1.0)
    assert stream.rewards[0].tolist() == [0.0, 0.0, 0.0, -1.0, 0.0]
    assert stream.present[0].tolist() == [False, False, True, True, True]
    assert stream.rewards[1].tolist() == [0.0, -1.0, 0.0, 0.0, 0.0]


def test_a_step_without_code_is_absent():
    given = shard([3], [1.0], steps=[[0, 1, 2]])
    texts = (text("```python\nx = 1\n```\n", "hence\n", "```python\nx = = 2\n```\n"),)
    stream, _ = scored(StepRule, given, texts, rule=python_blocks.compiles, right=1.0, wrong=0.0)
    assert stream.present[0].tolist() == [False, True, False, True]
    assert stream.rewards[0].tolist() == [0.0, 1.0, 0.0, 0.0]


def test_a_rule_that_labels_no_steps_is_named():
    rule = partial(exact.verify, casefold=True)
    with pytest.raises(ConfigError, match=r"rlprm.verify.exact.verify gave None labels for 2 steps"):
        scored(StepRule, shard([2], [1.0], steps=[[0, 1]]), (text("1", "2"),), rule=rule, right=0.0, wrong=-1.0)


def test_turns_are_bad_by_form_first_and_by_label_then():
    given = shard([5, 1], [1.0, 0.0], steps=[[0, 1, 2, 2, 3], [0]], labels=[(1, 0, 0, -1), (-1,)])
    texts = (text("1+1=2\n", "1+1=3\n", "one and one\n", "4+4=8"), text("5+5=10"))
    stream, _ = scored(TurnReward, given, texts, rule=LINES, bad=-1.0, right=1.0, wrong=0.25)
    #                                    prompt right wrong bad (last token)  unknown
    assert stream.rewards[0].tolist() == [0.0, 1.0, 0.25, 0.0, -1.0, 0.0]
    assert stream.present[0].tolist() == [False, True, True, False, True, False]
    assert not stream.present[1].any()
    with pytest.raises(ConfigError, match="the verifier gave none"):
        scored(TurnReward, shard([1], [1.0]), (text("1+1=2"),), rule=LINES, bad=-1.0, right=1.0, wrong=0.0)


def test_limits_and_patterns_are_checked_at_the_start():
    good = {"rule": {"pattern": "a"}, "right": 1.0, "wrong": 0.0, **LIMITS}
    StepRule.check(model=None, learner=False, **good)
    with pytest.raises(ConfigError, match=r"'\(' is no regular expression"):
        StepRule.check(model=None, learner=False, **good | {"rule": {"pattern": "("}})
    with pytest.raises(ConfigError, match="timeout_s is 0"):
        StepRule.check(model=None, learner=False, **good | {"timeout_s": 0})
    with pytest.raises(ConfigError, match="has no model"):
        StepRule.check(model="x", learner=False, **good)
