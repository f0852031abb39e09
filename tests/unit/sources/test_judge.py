"""The generative judge as a source: rewards where verdicts are, nothing where there are none, and methods by hand."""

from __future__ import annotations

import re

import pytest
import torch

from rlprm.batch import flatten
from rlprm.cli.compose import composed
from rlprm.config import TrainConfig, validated
from rlprm.core.credit import credit, outcome_stream
from rlprm.core.metrics import numbers
from rlprm.core.reduce import Identity
from rlprm.errors import AlignmentError, ConfigError, VerifierError
from rlprm.records import Stream
from rlprm.run.factories import plans
from rlprm.sources.base import OWN
from rlprm.sources.judge import GenerativeJudge
from rlprm.sources.judge_prompts import OneStepProbability, Rubric, StepVerdicts, WholeVerdict
from rlprm.sources.judge_server import JudgeServer
from tests.unit.made import context, scorable, shard
from tests.unit.sources.judged import chain_judge, endpoint, judge, row, said, serving, settings

RIGHT = ["3+5=1\n", "1*2=2"]  # both steps right, the answer 2
WRONG = ["3+5=4\n", "4*2=1"]  # wrong, then right from there, the answer 1


def rows(*steps, outcomes, train=None, labels=None):
    """A shard and its texts: one token per character; the question is always 3+5*2 modulo 7."""
    index = [[number for number, step in enumerate(each) for _ in step] for each in steps]
    made = shard([len(each) for each in index], outcomes, steps=index, train=train, labels=labels)
    return scorable(made, texts=tuple(row(each) for each in steps))


def by_row(stream, given):
    """Present rewards of each row by position in the response."""
    found = []
    for at in range(len(given.shard.lengths)):
        begin = int(given.shard.prompt_lengths[at])
        there = stream.present[at].nonzero().flatten().tolist()
        found.append({position - begin: float(stream.rewards[at, position]) for position in there})
    assert torch.all(stream.rewards[~stream.present] == 0)
    return found


@pytest.fixture(scope="module")
def server():
    with JudgeServer(chain_judge(), 0) as running:
        yield running


def scored(given, url, **changes):
    source = judge(context(), url, **changes)
    try:
        return source.score(given)
    finally:
        source.close()


def test_a_step_is_paid_at_its_last_token(server):
    given = rows(RIGHT, WRONG, outcomes=[1.0, 0.0])
    scores = scored(given, server.url, right=0.5, wrong=-1.0)
    assert by_row(scores.streams[OWN], given) == [{5: 0.5, 10: 0.5}, {5: -1.0, 10: 0.5}]
    assert by_row(scores.streams["verdict"], given) == [{10: 1.0}, {10: 0.0}]
    assert by_row(scores.streams["fraction"], given) == [{10: 1.0}, {10: 0.5}]
    assert scores.measurement is None


def test_or_on_each_of_its_tokens(server):
    given = rows(WRONG, outcomes=[0.0])
    (found,) = by_row(scored(given, server.url, where="step_tokens", right=0.0, wrong=-1.0).streams[OWN], given)
    assert found == dict.fromkeys(range(6), -1.0) | dict.fromkeys(range(6, 11), 0.0)


def test_what_it_pays_may_be_the_verdict_or_the_fraction(server):
    given = rows(WRONG, outcomes=[0.0])
    assert by_row(scored(given, server.url, pays="fraction").streams[OWN], given) == [{10: 0.5}]
    whole = scored(given, server.url, pays="verdict", judgement=WholeVerdict(instructions="Judge.", gold=True))
    assert by_row(whole.streams[OWN], given) == [{10: 0.0}]
    assert by_row(whole.streams["fraction"], given) == [{}]  # it says nothing of steps


def test_a_probability_is_paid_in_proportion(server):
    given = rows(WRONG, outcomes=[0.0])
    prompt = OneStepProbability(instructions="Is it?", gold=False)
    (found,) = by_row(scored(given, server.url, judgement=prompt, right=1.0, wrong=-1.0).streams[OWN], given)
    assert found == {5: pytest.approx(-0.9), 10: pytest.approx(0.9)}  # -1 + 2 * 0.05, -1 + 2 * 0.95


def test_only_rows_that_train_are_judged_and_an_empty_response_is_not(server):
    given = rows(RIGHT, WRONG, [], outcomes=[1.0, 0.0, 0.0], train=[True, False, True])
    before = server.answered
    scores = scored(given, server.url)
    assert server.answered - before == 1
    assert [len(each) for each in by_row(scores.streams[OWN], given)] == [2, 0, 0]


def test_no_rows_at_all_cost_nothing(server):
    given = rows(RIGHT, outcomes=[1.0], train=[False])
    assert numbers(scored(given, server.url).metrics.partial).keys() == {"judge/process/calls", "judge/process/seconds"}


def test_votes_have_seeds_of_their_own_which_change_with_the_step_and_repeat():
    seeds = []

    def answer(body, headers):
        seeds.append(body["seed"])
        return 200, said("?"), {}

    given = rows(RIGHT, WRONG, outcomes=[1.0, 0.0])
    with serving(answer) as url:
        for step in (1, 1, 2):
            scored(
                scorable(given.shard, texts=given.texts, step=step), url, votes=3, rule="union", temperature=1.0
            )  # fmt: skip
    assert len(set(seeds[:6])) == 6
    assert set(seeds[:6]) == set(seeds[6:12])
    assert not set(seeds[:6]) & set(seeds[12:])
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_engines_of_its_own_are_asked_with_seeds_of_48_bits():
    # 40 rows of 50 votes; of 2000 numbers below 2**48, half are 2**47 or more
    asked = []

    class Silent:
        def replies(self, questions):
            asked.extend(questions)
            return [[None] * len(each.seeds) for each in questions]

    source = GenerativeJudge(context(), **settings(votes=50, rule="union", temperature=1.0))
    source._client = Silent()
    source.score(rows(*[RIGHT] * 40, outcomes=[1.0] * 40))
    seeds = [seed for each in asked for seed in each.seeds]
    assert len(set(seeds)) == len(seeds) == 2000
    assert 2**47 < max(seeds) < 2**48


def voting(*by_seed_order):
    """A server whose n-th reply to a question gives the n-th of these verdicts (None: unreadable, a status: an error)."""
    asked: dict[str, int] = {}

    def answer(body, headers):
        text = body["messages"][0]["content"]
        number = asked.get(text, 0)
        asked[text] = number + 1
        words = by_seed_order[number]
        if isinstance(words, int):
            return words, {}, {}
        if words is None:
            return 200, said("I cannot tell."), {}
        marker = re.search(r"verdict (\w+):", text)[1]
        entries = " ".join(f"{at + 1}={word}" for at, word in enumerate(words.split()))
        return 200, said(f"verdict {marker}: {entries}"), {}

    return serving(answer)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # readable votes: (wrong, right), (wrong, wrong), (right, right): step 1 is wrong to 2 of 3, step 2 to 1 of 3
        ("intersection", {5: 1.0, 10: 1.0}),
        ("majority", {5: 0.0, 10: 1.0}),
        ("union", {5: 0.0, 10: 0.0}),
        ("average", {5: pytest.approx(1 / 3), 10: pytest.approx(2 / 3)}),
    ],
)
def test_votes_that_failed_are_missing_and_the_rest_decides(rule, expected):
    given = rows(WRONG, outcomes=[0.0])
    with voting("wrong right", None, "wrong wrong", 500, "right right") as url:
        scores = scored(given, url, votes=5, rule=rule, temperature=1.0)
    assert by_row(scores.streams[OWN], given) == [expected]
    found = numbers(scores.metrics.partial)
    assert found["judge/process/calls"] == 5
    assert found["judge/process/frac_failed"] == pytest.approx(1 / 5)
    assert found["judge/process/frac_unparsed"] == pytest.approx(1 / 4)
    assert found["judge/process/frac_absent"] == 0
    assert found["judge/process/disagreement"] == 1.0


def test_without_any_vote_there_is_no_reward_and_it_is_counted():
    given = rows(RIGHT, outcomes=[1.0])
    with voting(None, 500) as url:
        scores = scored(given, url, votes=2, rule="union", temperature=1.0, wrong=-1.0)
    for stream in scores.streams.values():
        assert by_row(stream, given) == [{}]
    found = numbers(scores.metrics.partial)
    assert (found["judge/process/frac_absent"], found["judge/process/frac_unparsed"]) == (1.0, 1.0)
    assert "judge/process/disagreement" not in found


def test_more_failures_than_allowed_end_the_run():
    with voting(None) as url, pytest.raises(VerifierError, match=r"no vote on 1 of 1 responses.*max_absent"):
        scored(rows(RIGHT, outcomes=[1.0]), url, max_absent=0.5)


def test_agreement_with_exact_labels_is_measured(server):
    given = rows(RIGHT, WRONG, outcomes=[1.0, 0.0], labels=[(1, 1), (0, 0)])  # the second label of WRONG is false
    assert numbers(scored(given, server.url).metrics.partial)["judge/process/label_agreement"] == 0.75
    unlabelled = rows(RIGHT, outcomes=[1.0])
    assert "judge/process/label_agreement" not in numbers(scored(unlabelled, server.url).metrics.partial)


def test_texts_and_tokens_that_disagree_about_steps_are_found(server):
    given = rows(RIGHT, outcomes=[1.0])
    broken = scorable(given.shard, texts=(row(["3+5=1\n1*2=2"]),))
    with pytest.raises(AlignmentError, match="2 steps by its tokens and 1 by its texts"):
        scored(broken, server.url)


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"client": endpoint(None)}, None, "neither an endpoint nor a model"),
        ({"votes": 4}, None, "votes is 4 with rule single"),
        ({"votes": 1, "rule": "majority"}, None, "votes is 1 with rule majority"),
        ({"votes": 2, "rule": "union"}, None, "2 times the same"),
        (
            {"votes": 2, "rule": "union", "temperature": 1.0, "pays": "verdict",
             "judgement": Rubric(instructions="Grade.", gold=False, levels=7)},
            None,
            "rule union counts verdicts",
        ),
        ({"judgement": Rubric(instructions="Grade.", gold=False, levels=7)}, None, "set pays to verdict"),
        ({"max_absent": 2.0}, None, "max_absent 2.0"),
        ({}, "folder", "set model to null"),
    ],
)  # fmt: skip
def test_judges_that_cannot_work_are_refused_at_the_start(changes, model, message):
    with pytest.raises(ConfigError, match=message):
        GenerativeJudge.check(model=model, learner=False, **settings(**changes))
    GenerativeJudge.check(model=None, learner=False, **settings())
    with pytest.raises(ConfigError, match="does not learn"):
        GenerativeJudge.check(model=None, learner=True, **settings())


# -- methods, from their YAML to advantages --------------------------------------------------------------------------


def advantages(method, given, streams, *overrides):
    """Each row's advantages on its response by the method's own pieces."""
    chosen = ["recipe=chain_arithmetic_cpu", f"method={method}", *overrides]
    values = composed("train", chosen, reads=lambda key: True).values
    config = validated(TrainConfig, values)
    padded = given.padded
    with_outcome = {"outcome": outcome_stream(padded)} if "outcome" in config.streams else {}
    found = credit(padded, {**with_outcome, **streams}, plans(config), Identity(), whiten=config.whiten, trust={})
    flat = flatten(found.advantages.total, given.shard.lengths)
    pieces = torch.split(flat, given.shard.lengths.tolist())
    return [piece[int(start) :].tolist() for piece, start in zip(pieces, given.shard.prompt_lengths, strict=True)]


def at_url(stream):
    return f"streams.{stream}.source.kind.client.url=http://127.0.0.1:1/v1"


def test_capo_from_the_judge_to_advantages(server):
    # Rewards per token: RIGHT 2 on 11 tokens; WRONG with outcome 0: -1 on 6 and 0 on 5 tokens.
    # mean 16/22 = 8/11; squares: 11 (14/11)^2 + 6 (19/11)^2 + 5 (8/11)^2 = (2156 + 2166 + 320) / 121 = 38.3636
    # std_b = sqrt(38.3636 / 21) = 1.351602; advantages 1.272727, -1.727273, -0.727273 over it
    given = rows(RIGHT, WRONG, outcomes=[1.0, 0.0])
    stream = scored(given, server.url, where="step_tokens", right=0.0, wrong=-1.0).streams[OWN]
    right, wrong = advantages("capo", given, {"process": stream}, at_url("process"))
    assert right == pytest.approx([0.941643] * 11, abs=1e-5)
    assert wrong == pytest.approx([-1.277945] * 6 + [-0.538082] * 5, abs=1e-5)


def levels(*values):
    """A server that answers every rubric with the level of its response, told by the response's first character."""

    def answer(body, headers):
        text = body["messages"][0]["content"]
        marker = re.search(r"verdict (\w+):", text)[1]
        first = re.search(rf"<step 1 {marker}>\n(.)", text)[1]
        return 200, said(f"verdict {marker}: {values[int(first)]}"), {}

    return serving(answer)


def test_papo_from_the_judge_to_advantages():
    # Levels 6, 7, 2 (and 7 for the wrong response): values 5/6, 1, 1/6, of right responses only: mean 2/3,
    # std_b = sqrt((1/36 + 4/36 + 9/36) / 2) = 0.440959: 0.377964, 0.755929, -1.133893, and 0 for the wrong one.
    # Outcomes 1, 1, 1, 0: mean 3/4, std_b 1/2: 0.5, 0.5, 0.5, -1.5.
    given = rows(["0"], ["1"], ["2"], ["3"], outcomes=[1.0, 1.0, 1.0, 0.0])
    with levels(6, 7, 2, 7) as url:
        scores = scored(given, url, pays="verdict", judgement=Rubric(instructions="Grade.", gold=False, levels=7))
    found = advantages("papo", given, {"process": scores.streams[OWN]}, at_url("process"))
    for one, expected in zip(found, [0.877964, 1.255929, -0.633893, -1.5], strict=True):
        assert one == pytest.approx([expected], abs=1e-5)


def test_the_four_cases_of_tp_grpo():
    # Outcomes 1, 0: z-score 0.707107, -0.707107 (std_b 0.707107). alpha 0.5, the group's accuracy 0.5: r_c = 0.25.
    given = rows(["aa", "bb"], ["aa", "bb"], outcomes=[1.0, 0.0])
    with voting("right wrong", "right wrong") as url:
        scores = scored(given, url)
    right, wrong = advantages("tp_grpo", given, {"process": scores.streams[OWN]}, at_url("process"))
    z = 0.707106
    assert right == pytest.approx([z, z, z - 0.25, z - 0.25], abs=1e-5)
    assert wrong == pytest.approx([0.0, 0.0, -z, -z], abs=1e-5)


def test_spark_selective_keeps_only_what_the_verdicts_support():
    # y 1, 0 and the format held by both: z-score 0.707107, -0.707107
    given = rows(["aa", "bb"], ["cc", "dd"], outcomes=[0.0, 0.0])
    ends = outcome_stream(given.padded).present
    held = Stream(rewards=ends.float(), present=ends)

    def answer(body, headers):
        text = body["messages"][0]["content"]
        marker = re.search(r"verdict (\w+):", text)[1]
        overall = "right" if "aa" in text else "wrong"
        return 200, said(f"verdict {marker}: 1=right 2=wrong overall={overall}"), {}

    with serving(answer) as url:
        scores = scored(given, url, judgement=StepVerdicts(instructions="Judge.", gold=False, overall=True))
    streams = {"steps": scores.streams[OWN], "verdict": scores.streams["verdict"], "format": held}
    first, second = advantages("spark_selective", given, streams, at_url("steps"))
    z = 0.707106
    assert first == pytest.approx([z, z, 0.0, 0.0], abs=1e-5)
    assert second == pytest.approx([0.0, 0.0, -z, -z], abs=1e-5)
    # without the format there is no reward, and no spread
    lost = {**streams, "format": Stream(rewards=torch.zeros(held.rewards.shape), present=ends)}
    assert advantages("spark_selective", given, lost, at_url("steps")) == [[0.0] * 4] * 2


def test_ppr_pays_no_turn_of_a_wrong_response_and_takes_nothing_from_a_right_one():
    # Grades 1 of 5 and 5 of 5 for the first turn (0.2 and 1), whatever for the last: ReNorm with mu 1.
    # right: 0.2 + 1 - 1 = 0.2; wrong: 1 + 0 - 1 = 0; the last turn has the outcome alone.
    config = validated(
        TrainConfig,
        composed(
            "train", ["recipe=chain_arithmetic_cpu", "method=ppr", at_url("process")], reads=lambda key: True
        ).values,
    )
    given = rows(["aa", "bb"], ["aa", "bb"], outcomes=[1.0, 0.0])
    stream = scored(given, "http://127.0.0.1:1/v1").streams[OWN]
    assert not stream.present.any()  # nobody answers: nothing to shift, so nothing is paid
    ends = torch.tensor([[False, False, True, False, True]] * 2)
    graded = Stream(rewards=torch.tensor([[0, 0, 0.2, 0, 0.9], [0, 0, 1.0, 0, 0.9]]), present=ends)
    (plan,) = [plan for plan in plans(config) if plan.name == "process"]
    merged = plan.merge({"process": graded, "outcome": outcome_stream(given.padded)}, given.padded)["process"]
    assert by_row(merged, given) == [{1: pytest.approx(0.2)}, {1: pytest.approx(0.0)}]


def test_it_says_where_its_rewards_stand_and_what_its_engine_must_hold():
    assert GenerativeJudge.granularity(**settings()) == "step"
    assert GenerativeJudge.granularity(**settings(where="step_tokens")) == "token"
    assert GenerativeJudge.granularity(**settings(pays="verdict", where="step_tokens")) == "whole"
    as_in_yaml = settings(client={"_target_": "rlprm.sources.judge_engines.OwnEngines", "max_prompt_tokens": 700})
    assert GenerativeJudge.engine_tokens(prompt=64, response=48, **as_in_yaml) == 700 + 512 + 1


def test_a_method_whose_judge_nobody_named_is_refused_before_anything_starts():
    values = composed("train", ["recipe=chain_arithmetic_cpu", "method=capo"], reads=lambda key: True).values
    with pytest.raises(ConfigError, match=r"streams\.process\.source: the judge has neither an endpoint nor a model"):
        validated(TrainConfig, values)
