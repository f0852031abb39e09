"""Engines that are lost, replaced and asked again: on pretended handles, without Ray's processes."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ObjectLostError, RayTaskError

from rlprm.actors.engines import MAX_TRIES, Engines, gone
from rlprm.actors.judge import Judges
from rlprm.actors.rollout import Rollouts
from rlprm.actors.services import EngineService
from rlprm.core.metrics import check_name
from rlprm.errors import ConfigError, StaleWeights, WorkerLost
from rlprm.roles import Request
from tests.unit.actors.pretended import LATE, Engine, Ref, died, get, pretend, rollouts_of
from tests.unit.made import prompt

__all__ = ["pretend"]

pytestmark = pytest.mark.usefixtures("pretend")


def rollouts(*engines: Any, least: int | None = 1, restart: Any = None) -> Rollouts:
    return Rollouts(
        list(engines), seed=0, temperature=1.0, max_tokens=4, samples=2, greedy=False, timeout_s=1.0, restart=restart,
        min_engines=least, logs="logs", start_timeout_s=60.0,
    )  # fmt: skip


def asked(role: Rollouts, count: int) -> list[Request]:
    return role.requests([prompt(number) for number in range(count)], 1, 0)


def of_cause(cause: Exception) -> RayTaskError:
    return RayTaskError("sample", "traceback", cause)


def test_without_a_loss_requests_are_dealt_in_turn_and_each_is_answered_once():
    one, two = Engine("one"), Engine("two")
    role = rollouts(one, two)
    requests = asked(role, 5)
    found = list(role.sample(requests))
    assert (one.asked, two.asked) == ([[0, 2, 4]], [[1, 3]])
    assert sorted(index for index, _ in found) == [0, 1, 2, 3, 4]
    assert all(get(reference) == rollouts_of(requests[index]) for index, reference in found)
    assert role.take_metrics() == {
        "rollout/engines": 2.0, "rollout/engines_lost": 0.0, "rollout/engines_joined": 0.0,
        "rollout/engines_failed": 0.0, "rollout/resampled_for_sources": 0.0, "rollout/resampled_groups": 0.0,
        "keep/aborted": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("after", [0, 1, 2])
def test_what_a_lost_engine_owes_the_others_are_asked_for_and_nothing_comes_twice(after: int):
    one, two = Engine("one", after=after), Engine("two")
    role = rollouts(one, two)
    requests = asked(role, 6)
    found = list(role.sample(requests))
    assert sorted(index for index, _ in found) == list(range(6))
    assert all(get(reference) == rollouts_of(requests[index]) for index, reference in found)  # the same samples
    owed = [0, 2, 4][after:]
    assert [index for call in two.asked[1:] for index in call] == owed
    assert one.killed  # it might only have been cut off
    metrics = role.take_metrics()
    assert (metrics["rollout/engines"], metrics["rollout/engines_lost"]) == (1.0, 1.0)
    assert metrics["rollout/resampled_groups"] == len(owed)
    assert role.take_metrics()["rollout/resampled_groups"] == 0.0  # counted once
    for name in metrics:
        check_name(name)


def test_an_engine_that_finishes_early_takes_its_share_of_what_another_owes():
    one, two, three = Engine("one", after=0), Engine("two"), Engine("three")
    role = rollouts(one, two, three)
    found = list(role.sample(asked(role, 12)))
    assert len({index for index, _ in found}) == len(found) == 12
    assert min(len(engine.asked) for engine in (two, three)) >= 2  # both helped


def test_death_between_rollouts_and_their_pair_hands_nothing_out():
    class Torn(Engine):
        def _items(self, requests: Any) -> Any:
            began, first, *_ = super()._items(requests)
            yield from (began, first, Ref(died()))

    role = rollouts(Torn("one"), Engine("two"))
    requests = asked(role, 2)
    found = list(role.sample(requests))
    assert sorted(index for index, _ in found) == [0, 1]
    assert role.take_metrics()["rollout/resampled_groups"] == 1.0


def test_too_few_left_is_an_error_that_names_engine_node_and_log():
    role = rollouts(Engine("one"), Engine("two", after=0), least=2)
    with pytest.raises(WorkerLost) as caught:
        list(role.sample(asked(role, 4)))
    said = str(caught.value)
    assert "rollout engine 1 on node of two (log: logs/rollout1.log) is gone: " in said
    assert "its node is gone" in said
    assert "1 of 2 rollout engines are left, and recovery.min_engines asks for 2" in said


def test_null_asks_for_all_engines_and_one_is_always_needed():
    role = rollouts(Engine("one"), Engine("two", after=0), least=None)
    with pytest.raises(WorkerLost, match=r"all 2 of placement\.engines are needed"):
        list(role.sample(asked(role, 4)))
    role = rollouts(Engine("one", after=0), least=1)
    with pytest.raises(WorkerLost, match="0 of 1 rollout engines are left"):
        list(role.sample(asked(role, 1)))


def test_a_request_that_kills_engine_after_engine_ends_the_run():
    engines = [Engine(str(number), after=0) for number in range(6)]
    role = rollouts(*engines)
    with pytest.raises(WorkerLost, match=rf"{MAX_TRIES} rollout engines died one after the other .*prompts a/0"):
        list(role.sample(asked(role, 1)))
    assert sum(bool(engine.asked) for engine in engines) == MAX_TRIES


def test_engines_that_were_dead_before_they_saw_a_request_do_not_blame_it():
    engines = [Engine(str(number), begins=False) for number in range(5)]  # a node with five of them
    role = rollouts(*engines, Engine("alive"))
    assert [index for index, _ in role.sample(asked(role, 1))] == [0]
    assert role.take_metrics()["rollout/engines_lost"] == 5.0


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (of_cause(ConfigError("prompt a/0: too long")), ConfigError, "prompt a/0: too long"),
        (of_cause(StaleWeights("broke off")), StaleWeights, "broke off"),
        (
            of_cause(ValueError("seven")),
            WorkerLost,
            r"rollout engine 0 on node of one \(log.* failed: ValueError: seven",
        ),
    ],
)
def test_what_an_engine_raises_itself_is_no_loss(error: Exception, raised: type[Exception], words: str):
    one, two = Engine("one", after=0, error=error), Engine("two")
    role = rollouts(one, two)
    with pytest.raises(raised, match=words):
        list(role.sample(asked(role, 2)))
    assert not one.killed


def test_an_error_of_a_task_is_a_loss_if_its_cause_is():
    assert gone(died())
    assert gone(of_cause(died()))
    assert gone(of_cause(ObjectLostError("ab" * 28, None, "")))
    assert not gone(of_cause(RuntimeError("no")))


# -- replacements ------------------------------------------------------------------------------------------------------


def lost_second(restart: Any) -> Rollouts:
    role = rollouts(Engine("one"), Engine("two", after=0), restart=restart)
    list(role.sample(asked(role, 2)))
    role.take_metrics()
    return role


def test_a_replacement_joins_at_the_publish_after_it_is_ready():
    started: list[tuple[int, Engine]] = []

    def restart(number: int) -> Engine:
        started.append((number, Engine("new")))
        started[-1][1].is_ready = LATE
        return started[-1][1]

    role = lost_second(restart)
    role.renew()
    role.renew()
    assert [number for number, _ in started] == [1]  # started once, and nobody waited for it
    assert list(role.engines.present()) == [0]
    handle = started[0][1]
    reference = role.engines._loading[1].ready
    reference.value = True
    role.renew()
    assert role.engines.present()[1] is handle
    metrics = role.take_metrics()
    assert (metrics["rollout/engines"], metrics["rollout/engines_joined"]) == (2.0, 1.0)
    assert {index for index, _ in role.sample(asked(role, 2))} == {0, 1}
    assert handle.asked == [[1]]


def test_no_room_now_is_tried_again_at_the_next_publish():
    room = [None, Engine("new")]
    role = lost_second(lambda number: room.pop(0))
    for _ in range(3):
        role.renew()
    assert len(role.engines) == 2
    assert room == []


def test_a_replacement_that_dies_while_it_loads_is_counted_said_and_tried_again():
    first, second = Engine("first"), Engine("second")
    first.is_ready = died("no such model folder on this node")
    come = [first, second]
    role = lost_second(lambda number: come.pop(0))
    said: list[str] = []
    role.engines.say = said.append
    role.renew()
    role.renew()  # the first has failed, the second is started
    role.renew()
    assert first.killed
    assert role.engines.present()[1] is second
    assert role.take_metrics()["rollout/engines_failed"] == 1.0
    assert "no such model folder on this node" in said[0]
    assert "joined: 2 of 2 rollout engines" in said[1]


def test_what_is_loading_is_ended_with_the_run():
    late = Engine("late")
    late.is_ready = LATE
    role = lost_second(lambda number: late)
    role.renew()
    role.engines.drop_helpers()
    assert late.killed
    assert len(role.engines) == 1


# -- answers of all engines --------------------------------------------------------------------------------------------


def engines_of(role: Rollouts) -> Engines:
    return role.engines


def test_answers_drop_who_is_gone_and_keep_the_numbers():
    one, two, three = Engine("one"), Engine("two"), Engine("three")
    engines = engines_of(rollouts(one, two, three))
    found = engines.answers({0: Ref("a"), 1: Ref(died()), 2: Ref("c")}, what="new weights")
    assert found == {0: "a", 2: "c"}
    assert list(engines.present()) == [0, 2]
    assert two.killed


def test_answers_do_not_blame_an_engine_for_weights_that_their_sender_has_lost():
    engines = engines_of(rollouts(Engine("one"), Engine("two")))
    with pytest.raises(WorkerLost, match=r"rollout engine 1 .*\(new weights\)"):
        engines.answers({0: Ref("a"), 1: Ref(of_cause(ObjectLostError("ab" * 28, None, "")))}, what="new weights")
    assert len(engines) == 2


def test_answers_that_do_not_come_name_the_engine_and_the_deadline():
    engines = engines_of(rollouts(Engine("one"), Engine("two")))
    with pytest.raises(WorkerLost, match=r"rollout engine 1 on node of two .* within 1 s \(new weights\)"):
        engines.answers({0: Ref("a"), 1: Ref(LATE)}, what="new weights")


# -- rollouts that are lost before they are judged ---------------------------------------------------------------------


class JudgeHandle:
    """Finds the first rollouts of the named groups gone."""

    def __init__(self, gone_once: set[int], error: Exception) -> None:
        self.left = set(gone_once)
        self.error = error
        self.asked: list[int] = []

    @property
    def judge(self) -> Any:
        outer = self

        class Judge:
            def options(self, **options: Any) -> Any:
                return self

            def remote(self, index: int, reference: Any) -> tuple[Ref, Ref]:
                outer.asked.append(index)
                if index in outer.left:
                    outer.left.remove(index)
                    return Ref(outer.error), Ref(outer.error)
                return Ref(f"group {index}"), Ref((index, True, (), ()))

        return Judge()


def judges(handle: Any) -> Judges:
    return Judges([handle], num_shards=1, max_error_fraction=1.0, timeout_s=1.0, needs_steps=False)


@pytest.mark.parametrize("cause", [died(), ObjectLostError("ab" * 28, None, "")])
def test_a_group_that_was_lost_with_its_node_is_sampled_and_judged_again(cause: Exception):
    role, handle, told = rollouts(Engine("one"), Engine("two")), JudgeHandle({1, 2}, of_cause(cause)), []
    groups = judges(handle).judge(role.sample(asked(role, 4)), lambda: told.append(1))
    assert [group.index for group in groups] == [0, 1, 2, 3]  # in prompt order, each once
    assert sorted(handle.asked) == [0, 1, 1, 2, 2, 3]
    assert len(told) == 4
    assert role.take_metrics()["rollout/resampled_groups"] == 2.0


def test_a_judge_that_dies_itself_ends_the_run():
    role = rollouts(Engine("one"))
    with pytest.raises(WorkerLost, match="judge"):
        judges(JudgeHandle({0}, died())).judge(role.sample(asked(role, 2)))


def test_rollouts_that_are_lost_again_and_again_end_the_run():
    class Never(JudgeHandle):
        def __init__(self) -> None:
            super().__init__(set(), of_cause(died()))

        @property
        def judge(self) -> Any:
            self.left = {0}
            return super().judge

    role = rollouts(Engine("one"))
    with pytest.raises(WorkerLost, match=rf"the rollouts of prompt a/0 were lost {MAX_TRIES} times"):
        judges(Never()).judge(role.sample(asked(role, 1)))


# -- engines that process sources use ----------------------------------------------------------------------------------


def test_a_source_gets_the_same_answers_from_the_engines_that_are_left():
    requests = asked(rollouts(Engine("x")), 5)
    expected = [rollouts_of(request) for request in requests]
    one, two, three = Engine("one", after=0), Engine("two"), Engine("three")
    service = EngineService([one, two, three], timeout_s=1.0, what="engines")
    assert service.sample(requests) == expected
    assert (one.asked, two.asked, three.asked) == ([[0, 3]], [[1, 4], [0]], [[2], [3]])


def test_a_source_whose_last_engine_is_gone_is_told_so():
    service = EngineService([Engine("one", after=0)], timeout_s=1.0, what="the engine of stream process")
    with pytest.raises(WorkerLost, match=r"the engine of stream process: the last one, number 0, is gone: .*its node"):
        service.sample(asked(rollouts(Engine("x")), 2))


def test_a_source_s_poison_is_bounded():
    engines = [Engine(str(number), after=0) for number in range(5)]
    service = EngineService(engines, timeout_s=1.0, what="engines")
    with pytest.raises(WorkerLost, match=rf"{MAX_TRIES} of them died one after the other"):
        service.sample(asked(rollouts(Engine("x")), 1))


def test_a_source_is_given_its_engine_s_own_error():
    service = EngineService(
        [Engine("one", after=0, error=of_cause(ConfigError("too long"))), Engine("two")], timeout_s=1.0, what="engines"
    )
    with pytest.raises(ConfigError, match="too long"):
        service.sample(asked(rollouts(Engine("x")), 2))


def test_log_probs_come_from_the_first_engine_that_lives():
    one, two = Engine("one", error=died()), Engine("two")
    two.answers["logprobs"] = [[0.0, -1.0]]
    assert EngineService([one, two], timeout_s=1.0, what="engines").logprobs([[1, 2]], 1.0) == [[0.0, -1.0]]
