"""Held-out accuracy from hand-made verdicts, and when and with which seeds it is measured."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest

from rlprm.actors.judge import Group, rows_of
from rlprm.core.metrics import check_name
from rlprm.evaluation.evaluator import Evaluator, greedy, sampled
from tests.unit.actors.test_judge import judged
from tests.unit.made import prompt


def group(*outcomes: float | None) -> Group:
    return Group(index=0, keep=True, rows=rows_of(judged(*outcomes)), reference=None)


def test_greedy_leaves_absent_verdicts_out_and_counts_them():
    found = greedy([group(1.0), group(0.0), group(None), group(1.0)], "chain")
    assert found == {
        "val-core/chain/accuracy/greedy": pytest.approx(2 / 3),
        "val-aux/chain/num_prompts": 4.0,
        "val-aux/chain/response_length/mean": 2.0,
        "val-aux/chain/response_length/clip_ratio": 0.0,
        "val-aux/chain/frac_absent": 0.25,
    }


def test_sampled_mean_and_pass():
    found = sampled([group(1.0, 0.0), group(0.0, 0.0), group(1.0, None)], "chain")
    # mean over judged: 2 of 5; pass@2: of the two prompts that were judged in full the first has a right one
    assert found["val-core/chain/accuracy/mean@2"] == pytest.approx(0.4)
    assert found["val-core/chain/accuracy/pass@2"] == pytest.approx(1 / 2)
    assert set(sampled([group(1.0)], "chain")) == {"val-core/chain/accuracy/mean@1"}  # pass@1 would say it again


def test_no_verdict_at_all_is_no_number():
    assert math.isnan(greedy([group(None)], "chain")["val-core/chain/accuracy/greedy"])


class Rollouts:
    def __init__(self) -> None:
        self.asked = []

    def sample(self, requests):
        self.asked.append(list(requests))
        return iter([(index, None) for index in range(len(requests))])


class Judges:
    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts

    def judge(self, finished, told):
        assert [told() for _ in finished] == [None] * len(self.rollouts.asked[-1])
        return tuple(group(*[1.0] * len(request.seeds)) for request in self.rollouts.asked[-1])


def evaluator(*, every: int = 2, samples: int = 3, sets=None):
    rollouts, logged, told = Rollouts(), [], []

    class Stage:
        def advance(self) -> None:
            told.append("advanced")

    @contextmanager
    def notify(what: str, total: int):
        told.append((what, total))
        yield Stage()

    made = Evaluator(
        sets={"chain": [prompt(0), prompt(1)]} if sets is None else sets,
        rollouts=rollouts,
        judges=Judges(rollouts),
        every=every,
        samples=samples,
        temperature=0.8,
        max_tokens=9,
        seed=4,
        log=lambda step, metrics: logged.append((step, metrics)),
        notify=notify,
        left_out={"val-aux/chain/num_too_long": 1.0},
    )
    return made, rollouts, logged, told


def test_it_is_due_before_the_first_step_every_so_often_and_at_the_end():
    made, _, logged, _ = evaluator(every=2)
    for step in range(6):
        made.evaluate(step, last=step == 5)
    assert [step for step, _ in logged] == [0, 2, 4, 5]


def test_never_means_never_and_no_set_means_nothing():
    for made, _, logged, _ in (evaluator(every=0), evaluator(sets={})):
        made.evaluate(0, last=True)
        assert logged == []


def test_measures_greedy_and_sampled_under_listed_names():
    made, rollouts, _, told = evaluator()
    found = made.measure()
    assert {
        "val-core/chain/accuracy/greedy",
        "val-core/chain/accuracy/mean@3",
        "val-core/chain/accuracy/pass@3",
    } <= set(found)
    for name in found:
        check_name(name)
    first, second = rollouts.asked
    assert [(each.temperature, len(each.seeds), each.max_tokens) for each in first] == [(0.0, 1, 9)] * 2
    assert [(each.temperature, len(each.seeds), each.max_tokens) for each in second] == [(0.8, 3, 9)] * 2
    assert told.count("advanced") == 4


def test_without_samples_only_greedy_is_measured():
    made, rollouts, _, _ = evaluator(samples=0)
    assert not [name for name in made.measure() if "mean@" in name]
    assert len(rollouts.asked) == 1


def test_seeds_are_the_same_at_every_step_and_differ_between_prompts():
    made, rollouts, _, _ = evaluator()
    made.evaluate(0, last=False)
    made.evaluate(2, last=False)
    assert rollouts.asked[:2] == rollouts.asked[2:]
    seeds = [seed for request in rollouts.asked[1] for seed in request.seeds]
    assert len(set(seeds)) == 6
