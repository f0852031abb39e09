"""What a publish through a group does when it breaks: mend, meet again, send again, and not for ever; pretended Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from rlprm.actors.engines import MAX_TRIES
from rlprm.actors.group import WorkerGroup
from rlprm.actors.learners import Policy
from rlprm.actors.rollout import Rollouts
from rlprm.actors.transfer import GroupTransfer
from rlprm.engine.weights import GroupBroken
from rlprm.errors import StaleWeights, WorkerLost
from tests.unit.actors.pretended import Engine, Ref, died, pretend

__all__ = ["pretend"]

pytestmark = pytest.mark.usefixtures("pretend")

MANIFEST = SimpleNamespace(nbytes=12)


def broken() -> RayTaskError:
    return RayTaskError("load_group", "traceback", GroupBroken("the weights' group broke: connection reset"))


class Side(Engine):
    """Sender or receiver; ``loads``: what its sends or loads answer, one after the other, the last again and again."""

    def __init__(self, name: str, *loads: Any, mends: Any = True) -> None:
        super().__init__(name)
        self.calls: list[str] = []
        self._loads = list(loads or ["same"])
        self.answers = {"version": 3, "manifest": MANIFEST, "rendezvous": ("127.0.0.1", 1), "group_ranks": 1,
                        "join_transfer": None, "join_group": None, "check": None, "mend": mends}  # fmt: skip

    def _answer(self, name: str) -> Any:
        self.calls.append(name)
        return self.answers[name]

    def _load(self) -> Ref:
        self.calls.append("load")
        return Ref(self._loads.pop(0) if len(self._loads) > 1 else self._loads[0])

    def do_send_weights(self, bucket_bytes: int) -> Ref:
        return self._load()

    def do_load_group(self, *arguments: Any) -> Ref:
        return self._load()


def publish(sender: Side, *engines: Side, least: int = 1, times: int = 1) -> Rollouts:
    policy = Policy(WorkerGroup("policy", [sender], timeout_s=1.0, logs="logs"))
    rollouts = Rollouts(
        engines, seed=0, temperature=1.0, max_tokens=1, samples=1, greedy=False, timeout_s=1.0, min_engines=least
    )
    transfer = GroupTransfer(backend="gloo", bucket_bytes=64, timeout_s=1.0)
    for _ in range(times):
        transfer.publish(policy, rollouts)
    return rollouts


def test_a_group_that_holds_is_joined_once():
    sender, one = Side("policy"), Side("one")
    publish(sender, one, times=3)
    assert one.calls == ["mend", "group_ranks", "join_group", *["check", "load"] * 3]
    assert sender.calls.count("join_transfer") == 1


def test_survivors_of_a_broken_broadcast_are_mended_before_they_meet_again():
    sender, one, two = Side("policy", broken(), "same"), Side("one", broken(), "same"), Side("two", died())
    rollouts = publish(sender, one, two)
    assert list(rollouts.engines.present()) == [0]
    once = ["mend", "group_ranks", "join_group", "check", "load"]
    assert one.calls == [*once, *once]
    assert rollouts.take_metrics()["rollout/engines_lost"] == 1.0


def test_an_engine_that_cannot_be_mended_is_dropped():
    sender, one, two = Side("policy", broken(), "same"), Side("one", broken(), "same"), Side("two", broken())
    ask = two._answer
    two._answer = lambda name: (two.calls.count("mend") == 0 if name == "mend" else True) and ask(name)  # type: ignore[method-assign]
    rollouts = publish(sender, one, two)
    assert list(rollouts.engines.present()) == [0]
    assert two.killed


def test_a_group_that_breaks_again_and_again_ends_the_run():
    sender, one = Side("policy", broken()), Side("one", broken())
    with pytest.raises(WorkerLost, match=f"broke {MAX_TRIES} times while weights were sent"):
        publish(sender, one)
    assert one.calls.count("load") == MAX_TRIES


def test_another_failure_is_told_at_once_and_wrong_bytes_stay_fatal():
    failed = RayTaskError("load_group", "traceback", OSError("the cable is out"))
    with pytest.raises(WorkerLost, match=r"rollout engine 0 on node of one .*OSError: the cable is out"):
        publish(Side("policy", broken()), Side("one", failed))
    with pytest.raises(StaleWeights, match=r"engines \[1\] received other bytes"):
        publish(Side("policy"), Side("one"), Side("two", "other"))


def test_a_sender_that_dies_is_no_lost_engine():
    one = Side("one", broken())
    with pytest.raises(WorkerLost, match="policy"):
        publish(Side("policy", died()), one)
    assert not one.killed
