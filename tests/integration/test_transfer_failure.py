"""The way of the weights through a process group: whoever fails is named at once, and nobody waits for the rest."""

from __future__ import annotations

import time
from typing import Any

import pytest

from rlprm.errors import StaleWeights, WorkerLost

pytestmark = pytest.mark.integration

PATIENCE = 60.0  # seconds; a sender that fails must not cost them


class Side:
    """Sender and receiver in one, with the answers of a worker and of an engine."""

    def __init__(self, behaviour: str) -> None:
        self._behaviour = behaviour

    def place(self) -> str:
        return "node here"

    def rendezvous(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    def join_transfer(self, *arguments: Any) -> None: ...

    def join_group(self, *arguments: Any) -> None: ...

    def group_ranks(self) -> int:
        return 1

    def version(self) -> int:
        return 3

    def manifest(self) -> Any:
        from rlprm.engine.weights import Manifest

        return Manifest((), (), ())

    def check(self, manifest: Any) -> None: ...

    def mend(self) -> bool:
        return True

    def send_weights(self, bucket_bytes: int) -> str:
        return self._digest()

    def load_group(self, version: int, manifest: Any, bucket_bytes: int) -> str:
        return self._digest()

    def _digest(self) -> str:
        if self._behaviour == "fails":
            raise OSError("the cable is out")
        if self._behaviour == "waits":
            time.sleep(PATIENCE)
        return self._behaviour


def publish(sender: str, *receivers: str) -> dict[str, float]:
    import ray

    from rlprm.actors.group import WorkerGroup
    from rlprm.actors.learners import Policy
    from rlprm.actors.rollout import Rollouts
    from rlprm.actors.transfer import GroupTransfer

    actor = ray.remote(Side).options(num_cpus=0)
    first, *engines = [actor.remote(behaviour) for behaviour in (sender, *receivers)]
    policy = Policy(WorkerGroup("policy", [first], timeout_s=PATIENCE, logs="logs"))
    rollouts = Rollouts(engines, seed=0, temperature=1.0, max_tokens=1, samples=1, greedy=False, timeout_s=PATIENCE)
    transfer = GroupTransfer(backend="gloo", bucket_bytes=64, timeout_s=PATIENCE)
    try:
        transfer.publish(policy, rollouts)
    finally:
        for one in (first, *engines):
            ray.kill(one)
    return dict(transfer.metrics)


@pytest.mark.parametrize(("sender", "receiver"), [("fails", "waits"), ("waits", "fails")])
def test_one_side_that_fails_ends_the_wait_for_the_other(ray_once: None, sender: str, receiver: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(WorkerLost, match="the cable is out"):
        publish(sender, receiver)
    assert time.perf_counter() - begin < PATIENCE / 2


def test_digests_are_told_apart_by_side(ray_once: None) -> None:
    assert publish("same", "same", "same") == {"weights/version": 3.0, "weights/bytes": 0.0}
    with pytest.raises(StaleWeights, match=r"engines \[1\] received other bytes"):
        publish("same", "same", "other")
