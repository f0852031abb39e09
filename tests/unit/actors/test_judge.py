"""The judge on hand-made rollouts: verdicts, steps, rows, shards and counts; no Ray."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import pytest

from rlprm.actors.judge import PROBES, Group, Judge, JudgedGroup, Judges, lay_out, rows_of
from rlprm.core.steps import separator, whole
from rlprm.data.keep import accuracy_band
from rlprm.errors import AlignmentError, ConfigError, VerifierError
from rlprm.roles import RowText, Verdict
from rlprm.verify import exact
from rlprm.verify.pool import VerifierPool
from tests.unit.made import prompt, rollout, verified

TEXT = {5: "1+", 6: "1", 7: "\n", 8: "2", 9: ""}  # 9: EOS


class Tokenizer:
    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens, "the verifier must not see EOS"
        return "".join(TEXT[token] for token in tokens)


class Pool:
    """Answers at once, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []

    def submit(self, gold: str, response: str, question: str) -> Future[Verdict]:
        self.asked.append((gold, response, question))
        future: Future[Verdict] = Future()
        outcome = {"1+1\n2": 1.0, "2": 0.0}.get(response)
        reason = "judged" if outcome is not None else "timeout after 5.0 s"
        future.set_result(Verdict(outcome=outcome, reason=reason, seconds=0.0))
        return future


def judge() -> tuple[Judge, Pool]:
    pool = Pool()
    keep = partial(accuracy_band, low=0.2, high=0.8)
    return Judge(tokenizer=Tokenizer(), pool=pool, splitter=partial(separator, text="\n"), keep=keep), pool


def test_every_response_gets_its_verdict_and_steps():
    own, pool = judge()
    of = prompt(0, (1, 2))
    group = own.judge(
        [rollout((5, 6, 7, 8, 9), of=of), rollout((8, 9), of=of, sample=1), rollout((7,), of=of, sample=2)]
    )
    assert pool.asked == [("7", "1+1\n2", "question 0"), ("7", "2", "question 0"), ("7", "\n", "question 0")]
    assert [each.verdict.outcome for each in group.verified] == [1.0, 0.0, None]
    assert [each.text for each in group.verified] == ["1+1\n2", "2", "\n"]
    assert group.steps == ((0, 0, 0, 1, 1), (0, 0), (0,))  # EOS belongs to the last step
    assert [each.steps for each in group.texts] == [("1+1\n", "2"), ("2",), ("\n",)]
    assert [each.response for each in group.texts] == ["1+1\n2", "2", "\n"]
    assert own.keeps(group)  # one of the two judged is right


def test_answers_that_say_nothing_are_tried_on_the_last_prompts():
    verifier = partial(exact.verify, pattern=r"answer: (.*)")
    with VerifierPool(verifier, workers=1, timeout_s=20.0, memory_mb=512) as pool:
        own = Judge(tokenizer=Tokenizer(), pool=pool, splitter=whole, keep=None)
        for number in range(6):
            of = replace(prompt(number), text=f"answer: {number}", gold="5" if number else "")
            own.judge([rollout((8, 9), of=of), rollout((8,), of=of)])
        said = own.canaries()
        judged = pool.counts["judged"]
    assert [words.partition(" (")[0] for words in said] == [
        "the verifier paid 1 for its own prompt as the answer to a/5",
        # this pattern does not find the bare answers of the module's canaries
        "verifier rlprm.verify.exact.verify judged the canary gold='7', response='7' as 0.0",
    ]
    assert judged == 12 + 2 * PROBES + len(exact.CANARIES)


def test_a_row_knows_what_repeats_in_it_and_whether_it_is_a_copy():
    of = prompt(0, (1,))
    items = [verified(tokens, 1.0, of=of) for tokens in ((5, 6) * 8, (5, 6), (5, 6))]
    group = JudgedGroup(verified=tuple(items), steps=((0,) * 16, (0, 0), (0, 0)), texts=())
    first, second, third = rows_of(group)
    assert first.repetition == 1 - 2 / 9  # nine 8-grams, two distinct
    assert (second.repetition, second.copy, third.copy) == (0.0, False, True)


def test_group_without_verdict_is_not_kept():
    own, _ = judge()
    assert not own.keeps(own.judge([rollout((7,)), rollout((5,))]))


def judged(*outcomes: float | None, number: int = 0, length: int = 2, reason: str = "") -> JudgedGroup:
    of = prompt(number, (1, 2, 3))
    return JudgedGroup(
        verified=tuple(
            verified(tuple(range(5, 5 + length)), outcome, of=of, sample=sample, reason=reason)
            for sample, outcome in enumerate(outcomes)
        ),
        steps=tuple(tuple(range(length)) for _ in outcomes),
        texts=tuple(RowText(prompt=of, response="", steps=("",) * length) for _ in outcomes),
    )


def test_rows_say_what_the_driver_may_know():
    first, second = rows_of(judged(1.0, None, reason="timeout after 5.0 s"))
    assert (first.prompt_id, first.source, first.sample, first.outcome) == ("a/0", "a", 0, 1.0)
    assert (first.prompt_length, first.response_length, first.num_steps, first.version) == (3, 2, 2, 3)
    assert (second.sample, second.outcome, second.reason) == (1, None, "timeout after 5.0 s")
    assert not first.fresh
    assert not first.train
    assert rows_of(judged(0.0, length=0))[0].num_steps == 0


def test_shard_holds_whole_groups_with_the_plan_of_each():
    made = lay_out(
        [judged(1.0, 0.0, number=0), judged(None, number=1, length=1)],
        [(4, True, False, (8, 9)), (2, False, True, (3,))],
    )
    assert made.group.tolist() == [4, 4, 2]
    assert made.row.tolist() == [8, 9, 3]
    assert made.fresh.tolist() == [True, True, False]
    assert made.train.tolist() == [False, False, True]
    assert made.lengths.tolist() == [5, 5, 4]
    assert made.prompt_lengths.tolist() == [3, 3, 3]
    assert made.outcome_present.tolist() == [True, True, False]


class Remote:
    """An actor's method: remembers its arguments, and hands them back as the reference."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def options(self, *, num_returns):
        assert num_returns == 2  # the shard and its texts
        return self

    def remote(self, *arguments):
        self.calls.append(arguments)
        return arguments


class Actor:
    def __init__(self) -> None:
        self.collate = Remote()


def group(index: int, keep: bool, *outcomes: float | None, reason: str = "", length: int = 2) -> Group:
    made = judged(*outcomes, number=index, length=length, reason=reason)
    return Group(index=index, keep=keep, rows=rows_of(made), reference=f"group {index}")


def judges(**changes) -> tuple[Judges, Actor]:
    actor = Actor()
    settings = {"num_shards": 2, "max_error_fraction": 0.0, "timeout_s": 1.0, "needs_steps": False, **changes}
    return Judges([actor], **settings), actor


def test_batch_numbers_accepted_groups_first_and_keeps_the_fresh_others_for_measuring():
    own, actor = judges()
    first = [group(0, False, 1.0, 1.0), group(1, True, 1.0, 0.0), group(2, True, 0.0, 1.0)]
    second = [group(3, False, 0.0, 0.0), group(4, True, 1.0, 0.0), group(5, True, 1.0, 0.0)]
    batch = own.batch(7, [first, second], wanted=3)
    assert batch.step == 7
    ids = [(row.prompt_id, row.group, row.train, row.fresh) for row in batch.rows if row.sample == 0]
    assert ids == [
        ("a/1", 0, True, True),
        ("a/2", 1, True, True),
        ("a/4", 2, True, False),
        ("a/0", 3, False, True),  # not accepted, and sampled in the first round: the PRM is measured on it
    ]
    assert batch.selected == (True,) * 6 + (False,) * 2
    assert batch.num_groups == 3
    # every row is in exactly one shard, whole groups together
    assert sorted(row for rows in batch.members for row in rows) == list(range(8))
    for arguments, rows in zip(actor.collate.calls, batch.members, strict=True):
        references, plans = arguments
        assert tuple(row for plan in plans for row in plan[3]) == rows
        numbers = [int(reference.split()[1]) for reference in references]
        assert [batch.rows[plan[3][0]].prompt_id for plan in plans] == [f"a/{number}" for number in numbers]
        assert all(plan[:3] == (batch.rows[row].group, batch.rows[row].fresh, batch.rows[row].train)
                   for plan in plans for row in plan[3])  # fmt: skip
    assert batch.counts == {
        "keep/rounds": 2.0,
        "keep/prompts_sampled": 6.0,
        "keep/prompts_kept": 3.0,
        "keep/prompts_surplus": 1.0,  # a/5
        "keep/frac_kept": 4 / 6,
        "keep/rollouts_sampled": 12.0,
        "keep/dropped_low": 1.0,  # a/3, all wrong
        "keep/dropped_high": 1.0,  # a/0, all right
        "keep/dropped_unjudged": 0.0,
        "verifier/frac_absent": 0.0,
        "verifier/failures": 0.0,
        "verifier/timeouts": 0.0,
    }


def test_too_many_absent_verdicts_end_the_run():
    groups = [group(0, True, 1.0, None, reason="timeout after 5.0 s"), group(1, True, 1.0, 0.0)]
    with pytest.raises(VerifierError, match=r"1 of 4 responses got no verdict \(first reason: timeout after 5.0 s\)"):
        judges(max_error_fraction=0.2)[0].batch(1, [groups], wanted=2)
    counts = judges(max_error_fraction=0.25)[0].batch(1, [groups], wanted=2).counts  # exactly the limit passes
    assert (counts["verifier/frac_absent"], counts["verifier/timeouts"], counts["verifier/failures"]) == (
        0.25,
        1.0,
        0.0,
    )


def test_failures_that_are_no_timeouts_are_counted_apart():
    groups = [group(0, True, None, 1.0, reason="ValueError: x"), group(1, True, 1.0, 0.0)]
    counts = judges(max_error_fraction=1.0)[0].batch(1, [groups], wanted=2).counts
    assert (counts["verifier/timeouts"], counts["verifier/failures"]) == (0.0, 1.0)


def test_only_empty_responses_are_an_error():
    groups = [group(0, True, 0.0, 0.0, length=0), group(1, True, 0.0, 0.0, length=0)]
    with pytest.raises(ConfigError, match="every response is empty"):
        judges()[0].batch(1, [groups], wanted=2)


# -- a greedy response besides (ReMax) -------------------------------------------------------------------------------


def test_the_greedy_response_is_judged_and_stays_out_of_the_group():
    own, pool = judge()
    of = prompt(0, (1, 2))
    greedy = replace(rollout((5, 6, 7, 8, 9), of=of), greedy=True)
    group = own.judge([rollout((8, 9), of=of), rollout((8, 9), of=of, sample=1), greedy])
    assert len(pool.asked) == 3
    assert [each.verdict.outcome for each in group.verified] == [0.0, 0.0]
    assert len(group.steps) == len(group.texts) == len(rows_of(group)) == 2
    assert group.greedy is not None
    assert group.greedy.verdict.outcome == 1.0
    assert not own.keeps(group)  # two wrong answers: the greedy one decides nothing


def test_the_shard_says_what_the_greedy_response_earned():
    first, second, third = (
        replace(judged(1.0, 0.0, number=number), greedy=greedy)
        for number, greedy in enumerate([verified((5,), 1.0), verified((5,), None), None])
    )
    made = lay_out([first, second, third], [(0, True, True, (0, 1)), (1, True, True, (2, 3)), (2, True, True, (4, 5))])
    assert made.greedy_outcome.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert made.greedy_present.tolist() == [True, True, False, False, False, False]
    assert len(made) == 6


def test_a_greedy_rollout_is_refused_as_a_row():
    bad = replace(judged(1.0).verified[0], rollout=replace(rollout((5,)), greedy=True))
    with pytest.raises(AlignmentError, match="greedy baseline"):
        lay_out([replace(judged(1.0), verified=(bad,))], [(0, True, True, (0,))])


def test_greedy_responses_are_counted_and_are_no_rows():
    own, _ = judges(max_error_fraction=0.2)
    said, silent = (
        Verdict(outcome=outcome, reason=reason, seconds=0.0)
        for outcome, reason in ((1.0, ""), (None, "timeout after 5 s"))
    )
    first = replace(group(0, True, 1.0, 0.0), greedy=(said,))
    second = replace(group(1, True, 1.0, 0.0), greedy=(silent,))
    batch = own.batch(1, [[first, second]], wanted=2)
    assert len(batch.rows) == 4
    assert batch.counts["keep/rollouts_sampled"] == 6.0
    assert batch.counts["verifier/frac_absent"] == pytest.approx(1 / 6)
    assert batch.counts["verifier/timeouts"] == 1.0
    with pytest.raises(VerifierError, match="1 of 6 responses got no verdict"):
        judges()[0].batch(1, [[first, second]], wanted=2)
