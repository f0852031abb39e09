"""Seeds that nothing shares, and aborted samples that never look like responses; no Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from rlprm.actors.rollout import MAX_TRIES, RolloutActor, Rollouts, parts_of, seed_of
from rlprm.actors.sampled import BEGUN
from rlprm.errors import WorkerLost
from rlprm.roles import Finish, Request, Rollout
from tests.unit.made import prompt


def test_a_hundred_thousand_seeds_are_all_different():
    # step, round, position and sample of five runs: 5 * 50 * 2 * 50 * 4 = 100,000
    seeds = {
        seed_of(run, step, turn, position, f"a/{position}", sample)
        for run in range(5)
        for step in range(50)
        for turn in range(2)
        for position in range(50)
        for sample in range(4)
    }
    assert len(seeds) == 100_000
    assert all(0 <= seed < 2**48 for seed in seeds)


def test_seeds_do_not_depend_on_the_process():
    # Python's own hash() of text changes from process to process; blake2b("(0, 1, 'a')") does not
    assert seed_of(0, 1, "a") == seed_of(0, 1, "a")
    import hashlib

    assert seed_of(0, 1, "a") == int.from_bytes(hashlib.blake2b(b"(0, 1, 'a')", digest_size=6).digest(), "big")


def rollouts(seed: int = 0, greedy: bool = False) -> Rollouts:
    return Rollouts([], seed=seed, temperature=0.7, max_tokens=9, samples=3, greedy=greedy, timeout_s=1.0)


def test_requests_carry_the_run_s_temperature_and_limits():
    requests = rollouts().requests([prompt(0), prompt(1)], 5, 0)
    assert [(each.prompt.id, each.temperature, each.max_tokens) for each in requests] == [
        ("a/0", 0.7, 9),
        ("a/1", 0.7, 9),
    ]
    assert [len(each.seeds) for each in requests] == [3, 3]


def test_seeds_differ_between_steps_rounds_runs_and_repeated_prompts():
    asked = [
        *rollouts().requests([prompt(0), prompt(0)], 1, 0),  # the same prompt twice in a step
        *rollouts().requests([prompt(0)], 1, 1),
        *rollouts().requests([prompt(0)], 2, 0),
        *rollouts(seed=1).requests([prompt(0)], 1, 0),
    ]
    seeds = [seed for each in asked for seed in each.seeds]
    assert len(set(seeds)) == len(seeds) == 15
    assert rollouts().requests([prompt(0)], 1, 0) == rollouts().requests([prompt(0)], 1, 0)


class Engine:
    """Aborts the named prompts the given number of times; the last sample of a group only."""

    def __init__(self, aborts: dict[str, int]) -> None:
        self.left = dict(aborts)
        self.asked: list[list[str]] = []

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Rollout]]:
        self.asked.append([request.prompt.id for request in requests])
        for request in requests:
            left = self.left.get(request.prompt.id, 0)
            self.left[request.prompt.id] = left - 1
            finish: Finish = "abort" if left > 0 else "stop"
            yield [
                Rollout(
                    prompt=request.prompt, sample=sample, tokens=(5,), logprobs=(-0.1,), version=0, seed=seed,
                    finish=finish if sample == len(request.seeds) - 1 else "stop",
                )
                for sample, seed in enumerate(request.seeds)
            ]  # fmt: skip


def actor(engine: Engine) -> RolloutActor:
    made = RolloutActor.__new__(RolloutActor)  # without its constructor, which redirects this process's output
    made._generator = engine
    return made


def requested() -> list[tuple[int, Request]]:
    return list(enumerate(rollouts().requests([prompt(0), prompt(1)], 1, 0)))


def test_groups_come_with_the_index_of_their_request():
    found = list(actor(Engine({})).sample(requested()))
    assert found[0] == BEGUN
    assert [found[2], found[4]] == [(0, 0), (1, 0)]
    assert [found[1][0].prompt.id, found[3][0].prompt.id] == ["a/0", "a/1"]


def test_an_aborted_group_is_sampled_again_and_counted():
    engine = Engine({"a/0": 1})
    asked = requested()
    found = list(actor(engine).sample(asked))
    assert engine.asked == [["a/0", "a/1"], ["a/0"]]  # only the aborted one again
    assert [found[2], found[4]] == [(1, 0), (0, 3)]  # all three samples of the group were thrown away
    assert [each.finish for each in found[3]] == ["stop"] * 3
    assert tuple(each.seed for each in found[3]) == asked[0][1].seeds


def sharing_a_seed(greedy: bool = False) -> list[Request]:
    """Three requests, of which the last begins with the first one's seed."""
    asked = rollouts(greedy=greedy).requests([prompt(0), prompt(1), prompt(2)], 1, 0)
    return [*asked[:2], replace(asked[2], seeds=(asked[0].seeds[0], *asked[2].seeds[1:]))]


def test_requests_that_begin_with_the_same_seed_are_all_answered():
    engine = Engine({})
    asked = sharing_a_seed()
    found = actor(engine).sample_all(asked)
    assert engine.asked == [["a/0", "a/1"], ["a/2"]]  # never in one call, where the answers could not be told apart
    assert [tuple(each.seed for each in group) for group in found] == [request.seeds for request in asked]
    assert [{each.prompt.id for each in group} for group in found] == [{"a/0"}, {"a/1"}, {"a/2"}]


def test_the_same_request_twice_is_answered_twice():
    (request,) = rollouts().requests([prompt(0)], 1, 0)
    first, second = actor(Engine({})).sample_all([request, request])
    assert first == second


def test_with_a_greedy_response_besides_a_shared_seed_loses_nothing_either():
    engine = Engine({"a/2": 1})
    found = actor(engine).sample_all(sharing_a_seed(greedy=True))
    assert engine.asked == [["a/0", "a/0", "a/1", "a/1"], ["a/2", "a/2"], ["a/2", "a/2"]]  # the last: aborted, again
    assert [[each.greedy for each in group] for group in found] == [[False, False, False, True]] * 3
    assert [{each.prompt.id for each in group} for group in found] == [{"a/0"}, {"a/1"}, {"a/2"}]


def test_groups_come_before_a_later_batch_is_asked_for():
    engine = Engine({})
    finished = actor(engine).sample(list(enumerate(sharing_a_seed())))
    assert next(finished) == BEGUN
    assert [each.prompt.id for each in next(finished)] == ["a/0"] * 3
    assert engine.asked == [["a/0", "a/1"]]


def test_an_engine_that_always_aborts_is_an_error():
    with pytest.raises(WorkerLost, match=f"the engine aborted 1 groups {MAX_TRIES} times"):
        list(actor(Engine({"a/1": MAX_TRIES})).sample(requested()))


# -- a greedy response besides (ReMax) -------------------------------------------------------------------------------


def greedily() -> list[tuple[int, Request]]:
    return list(enumerate(rollouts(greedy=True).requests([prompt(0), prompt(1)], 1, 0)))


def test_a_greedy_response_comes_last_and_changes_no_sample():
    engine = Engine({})
    found = list(actor(engine).sample(greedily()))
    assert engine.asked == [["a/0", "a/0", "a/1", "a/1"]]
    assert [found[2], found[4]] == [(0, 0), (1, 0)]
    for (_, request), group in zip(requested(), (found[1], found[3]), strict=True):
        assert [each.greedy for each in group] == [False, False, False, True]
        assert tuple(each.seed for each in group[:3]) == request.seeds  # as without the baseline
        assert {each.prompt.id for each in group} == {request.prompt.id}


def test_the_greedy_part_is_asked_for_at_temperature_0_once():
    sampled, greedy = parts_of(greedily()[0][1])
    assert (sampled.temperature, len(sampled.seeds)) == (0.7, 3)
    assert (greedy.temperature, len(greedy.seeds), greedy.with_greedy) == (0.0, 1, False)
    assert greedy.seeds[0] not in sampled.seeds
    assert parts_of(requested()[0][1]) == [requested()[0][1]]


class Backwards(Engine):
    """Finishes in the opposite order, so that greedy responses come before the samples."""

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Rollout]]:
        yield from reversed(list(super().generate(requests)))


def test_the_order_in_which_parts_finish_does_not_matter():
    found = list(actor(Backwards({})).sample(greedily()))
    assert [found[2], found[4]] == [(1, 0), (0, 0)]
    assert [each.greedy for each in found[1]] == [False, False, False, True]


def test_an_aborted_part_samples_the_whole_group_again():
    engine = Engine({"a/0": 1})
    found = list(actor(engine).sample(greedily()))
    assert engine.asked == [["a/0", "a/0", "a/1", "a/1"], ["a/0", "a/0"]]
    assert found[4] == (0, 4)
    assert [each.greedy for each in found[3]] == [False, False, False, True]
