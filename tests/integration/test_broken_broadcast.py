"""An engine that dies in the middle of a broadcast: the others leave the group, meet again, and get all weights."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rlprm.errors import WorkerLost

pytestmark = pytest.mark.integration

BUCKETS, BUCKET = 40, 1 << 20
PATIENCE = 60.0  # of the group; a lost member must not cost it


class Side:
    """A member of the group with real connections: it sends, receives, or dies on the way."""

    def __init__(self, dies_at: int | None = None) -> None:
        self._dies_at = dies_at
        self._group: Any = None
        self._whole = True

    def place(self) -> str:
        return "node here"

    def ready(self) -> bool:
        return True

    def version(self) -> int:
        return 3

    def manifest(self) -> Any:
        from rlprm.engine.weights import Manifest

        return Manifest.of(self._weights())

    def _weights(self) -> Iterator[tuple[str, Any]]:
        import torch

        return ((f"w{number:02d}", torch.full((BUCKET // 4,), float(number))) for number in range(BUCKETS))

    def rendezvous(self) -> tuple[str, int]:
        from rlprm.engine.distributed import reserve

        return "127.0.0.1", reserve("127.0.0.1")

    def join_transfer(self, *where: Any) -> None:
        from rlprm.engine.weights import make_group

        if self._group is not None:
            self._group.leave()
        self._group = make_group(*where)

    join_group = join_transfer

    def group_ranks(self) -> int:
        return 1

    def check(self, manifest: Any) -> None:
        assert self._whole, "mend() comes before another load"

    def mend(self) -> bool:
        self._whole = True
        return True

    def send_weights(self, bucket_bytes: int) -> str:
        from rlprm.engine.weights import send

        return send(self._group, self._weights(), bucket_bytes, digest=True)

    def load_group(self, version: int, manifest: Any, bucket_bytes: int) -> str:
        from rlprm.engine.weights import Digest, receive, recorded, unpack

        self._whole = False
        seen = Digest()
        for number, _ in enumerate(recorded(unpack(manifest, receive(self._group, manifest, bucket_bytes)), seen)):
            if number == self._dies_at:
                os._exit(9)
        self._whole = True
        return seen.hexdigest()


def started(*dying: int | None) -> tuple[Any, list[Any]]:
    """A policy of one rank, and an engine for each entry, which says at which weight it dies."""
    import ray

    from rlprm.actors.group import WorkerGroup
    from rlprm.actors.learners import Policy

    actor = ray.remote(Side).options(num_cpus=0)
    engines = [actor.remote(dies_at) for dies_at in dying]
    return Policy(WorkerGroup("policy", [actor.remote()], timeout_s=PATIENCE, logs="logs")), engines


def published(policy: Any, engines: list[Any], *, least: int, times: int = 1) -> tuple[Any, Any, float]:
    import ray

    from rlprm.actors.rollout import Rollouts
    from rlprm.actors.transfer import GroupTransfer

    ray.get([engine.ready.remote() for engine in engines])
    rollouts = Rollouts(
        engines, seed=0, temperature=1.0, max_tokens=1, samples=1, greedy=False, timeout_s=PATIENCE,
        min_engines=least, logs="logs",
        restart=lambda number: ray.remote(Side).options(num_cpus=0).remote(),
    )  # fmt: skip
    transfer = GroupTransfer(backend="gloo", bucket_bytes=BUCKET, timeout_s=PATIENCE)
    begin = time.perf_counter()
    try:
        for _ in range(times):
            transfer.publish(policy, rollouts)
            for loading in rollouts.engines._loading.values():
                ray.wait([loading.ready], timeout=PATIENCE)
        return transfer, rollouts, time.perf_counter() - begin
    finally:
        rollouts.engines.drop_helpers()
        for one in (*policy.group.workers, *rollouts.engines):
            ray.kill(one)


@pytest.mark.parametrize("dies_at", [0, BUCKETS // 2])
def test_survivors_meet_again_and_prove_what_they_received(ray_once: None, dies_at: int) -> None:
    transfer, rollouts, seconds = published(*started(None, dies_at, None), least=1)
    assert transfer.metrics == {"weights/version": 3.0, "weights/bytes": float(BUCKETS * BUCKET)}
    assert list(rollouts.engines.present()) == [0, 2]
    assert rollouts.take_metrics()["rollout/engines_lost"] == 1.0
    assert seconds < PATIENCE / 2  # nobody sat out the group's patience


def test_a_replacement_makes_the_group_anew(ray_once: None) -> None:
    transfer, rollouts, _ = published(*started(None, 5), least=1, times=3)
    # the first publish loses one, the second starts another, the third takes it in
    assert list(rollouts.engines.present()) == [0, 1]
    metrics = rollouts.take_metrics()
    assert (metrics["rollout/engines_lost"], metrics["rollout/engines_joined"]) == (1.0, 1.0)
    assert len(transfer._members) == 2


def test_too_few_survivors_end_the_run(ray_once: None) -> None:
    with pytest.raises(WorkerLost, match=r"rollout engine 1 on node here .* recovery\.min_engines asks for 2"):
        published(*started(None, 5), least=2)
