"""The prover pays differences of estimated success; what is sampled and graded is exactly what was written."""

from __future__ import annotations

import pytest
import torch

from rlprm.batch import chosen_rows
from rlprm.errors import ConfigError
from rlprm.roles import Rollout, RowText
from rlprm.sources.base import OWN, Engines, Grader
from rlprm.sources.prover import Prover
from tests.unit.made import context, prompt, scorable, shard

GOOD = {"samples": 2, "best_of": 1, "start": "sampled", "at_most": None}


class Continues(Engines):
    """Appends the token 90 + sample; remembers what it was asked."""

    def __init__(self):
        self.requests = []

    def sample(self, requests):
        self.requests += requests
        return [
            [
                Rollout(
                    prompt=r.prompt, sample=n, tokens=(90 + n,), logprobs=(-1.0,), finish="stop", version=0, seed=seed
                )
                for n, seed in enumerate(r.seeds)
            ]
            for r in requests
        ]


class Grades(Grader):
    """The outcomes of each judged text, by its tokens without the continuation."""

    def __init__(self, table):
        self.table = table
        self.seen = []

    def outcomes(self, groups):
        self.seen += groups
        return [list(self.table[group[0].tokens[:-1]]) for group in groups]


def two_rows(**changes):
    # row 0: tokens 1 2 | 3 | 4 5; row 1: tokens 6 | 7 (a prompt token 0 before each)
    return shard([5, 2], [1.0, 0.0], steps=[[0, 0, 1, 2, 2], [0, 1]], **changes)


def scored(given, table, **settings):
    engines, grader = Continues(), Grades(table)
    texts = tuple(RowText(prompt=prompt(), response="", steps=()) for _ in range(len(given)))
    source = Prover(context(engines=engines, grader=grader, max_response_tokens=16), **(GOOD | settings))
    scores = source.score(scorable(given, texts=texts))
    return scores, engines, grader


def test_hand_table_of_success_becomes_progress_at_step_ends():
    table = {(): (0.0, 1.0), (1, 2): (1.0, 1.0), (1, 2, 3): (0.0, 1.0), (6,): (0.0, 0.0)}
    #       Q_0 = 1/2; row 0: Q_1 = 1, Q_2 = 1/2, Q_3 = outcome 1; row 1: Q_1 = 0, Q_2 = outcome 0
    scores, engines, grader = scored(two_rows(), table)
    stream = scores.streams[OWN]
    #                                prompt  1    2     3    4    5
    assert stream.rewards[0].tolist() == [0.0, 0.0, 0.5, -0.5, 0.0, 0.5]
    assert stream.rewards[1].tolist() == [0.0, -0.5, 0.0, 0.0, 0.0, 0.0]
    assert stream.present[1].tolist() == [False, True, True, False, False, False]
    assert stream.rewards.sum(1).tolist() == [1.0 - 0.5, 0.0 - 0.5]
    # one prompt start for the group, prefixes for every step but the last; the limit is what the response has left
    asked = [(r.prompt.tokens, r.max_tokens) for r in engines.requests]
    assert asked == [((0,), 16), ((0, 1, 2), 14), ((0, 1, 2, 3), 13), ((0, 6), 15)]
    assert {r.temperature for r in engines.requests} == {1.0}
    # what is graded is prefix and continuation as a response to the row's own prompt
    assert [each.tokens for each in grader.seen[2]] == [(1, 2, 3, 90), (1, 2, 3, 91)]
    assert all(each.prompt == prompt() for group in grader.seen for each in group)
    assert all(len(each.tokens) == len(each.logprobs) for group in grader.seen for each in group)
    assert scores.metrics.partial["prover/rollouts"].value == 8.0
    assert scores.metrics.partial["prover/frac_absent"].value == 0.0


def test_best_of_two_needs_two_verdicts():
    table = {(): (0.0, 1.0), (1, 2): (None, 1.0), (1, 2, 3): (0.0, 0.0), (6,): (1.0, 0.0)}
    # best of 2 from 2 samples: Q_0 = 1; row 0: Q_1 absent, Q_2 = 0; row 1: Q_1 = 1
    scores, _, _ = scored(two_rows(), table, best_of=2)
    stream = scores.streams[OWN]
    assert stream.present[0].tolist() == [False, False, False, False, False, True]
    assert stream.rewards[0].tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert stream.rewards[1].tolist() == [0.0, 0.0, -1.0, 0.0, 0.0, 0.0]
    assert scores.metrics.partial["prover/frac_absent"].value == 1 / 8


def test_start_from_the_group_costs_nothing():
    given = shard([2, 2, 2, 2], [1.0, 0.0, 0.0, None], steps=[[0, 1]] * 4)
    table = {(1,): (1.0, 0.0), (3,): (0.0, 0.0), (5,): (1.0, 1.0), (7,): (0.0, 0.0)}
    # outcomes 1, 0, 0: best of 2 is 1 - 1/3; Q_1 = best of 2 of 2 samples: 1, 0, 1, 0
    scores, engines, _ = scored(given, table, best_of=2, start="group")
    assert len(engines.requests) == 4
    rewards = scores.streams[OWN].rewards
    assert rewards[:, 1].tolist() == pytest.approx([1 / 3, -2 / 3, 1 / 3, -2 / 3])
    assert rewards[:3, 2].tolist() == [0.0, 0.0, -1.0]
    assert scores.streams[OWN].present[3].tolist() == [False, True, False]  # no verdict of its own
    with pytest.raises(ConfigError, match="has 1 responses, fewer than best_of 2"):
        scored(shard([2], [1.0], steps=[[0, 1]]), {(1,): (1.0, 0.0)}, best_of=2, start="group")


def test_fewer_tried_steps_keep_the_sum():
    table = {(): (0.0, 1.0), (1, 2): (1.0, 1.0), (6,): (0.0, 0.0)}
    scores, _, _ = scored(two_rows(), table, at_most=1)
    # row 0 has three steps: after the first (0.5) and the last (1 - 1 = 0)
    assert scores.streams[OWN].rewards[0].tolist() == [0.0, 0.0, 0.5, 0.0, 0.0, 0.0]
    assert scores.streams[OWN].present[0].tolist() == [False, False, True, False, False, True]


def test_rows_that_do_not_train_cost_nothing():
    scores, engines, _ = scored(two_rows(train=[False, False]), {})
    assert not engines.requests
    assert not scores.streams[OWN].present.any()


def test_seeds_differ_by_step_row_prefix_and_sample_and_repeat():
    table = {(): (0.0, 1.0), (1, 2): (1.0, 1.0), (1, 2, 3): (0.0, 1.0), (6,): (0.0, 0.0)}
    first = [seed for r in scored(two_rows(), table)[1].requests for seed in r.seeds]
    again = [seed for r in scored(two_rows(), table)[1].requests for seed in r.seeds]
    assert first == again
    assert len(set(first)) == len(first) == 8


def test_what_is_sampled_does_not_depend_on_the_number_of_ranks():
    table = {(): (0.0, 1.0), (1,): (1.0, 1.0), (3,): (0.0, 1.0), (5,): (0.0, 0.0), (7,): (0.0, 1.0)}
    batch = shard([2, 2, 2, 2], [1.0, 0.0, 0.0, 1.0], groups=[0, 0, 1, 1], steps=[[0, 1]] * 4)

    def asked(*shards):
        parts = [chosen_rows(batch, torch.tensor(rows)) for rows in shards]
        requests = [request for part in parts for request in scored(part, table)[1].requests]
        return {request.prompt.id: (request.prompt.tokens, request.seeds) for request in requests}

    one_rank, two_ranks = asked([0, 1, 2, 3]), asked([2, 3], [0, 1])
    assert len(one_rank) == 6  # two starts, and one prefix of each row
    assert two_ranks == one_rank
    assert {"a/0+0.-1", "a/0+2.-1", "a/0+3.0"} <= set(one_rank)


def test_a_prover_that_adds_nothing_is_refused():
    settings = {"samples": 8, "best_of": 4, "start": "sampled", "at_most": None}
    Prover.check(model=None, learner=False, **settings)
    Prover.check(model="folder", learner=False, **settings | {"best_of": 1})
    with pytest.raises(ConfigError, match="adds nothing"):
        Prover.check(model=None, learner=False, **settings | {"best_of": 1})
    with pytest.raises(ConfigError, match="1 <= best_of <= samples"):
        Prover.check(model=None, learner=False, **settings | {"samples": 3})
    with pytest.raises(ConfigError, match="set start to 'sampled'"):
        Prover.check(model="folder", learner=False, **settings | {"start": "group"})
    with pytest.raises(ConfigError, match="does not learn"):
        Prover.check(model="folder", learner=True, **settings)
    with pytest.raises(ConfigError, match="at_most is 0"):
        Prover.check(model=None, learner=False, **settings | {"at_most": 0})
