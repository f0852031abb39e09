"""An error names the node that is lost, however Ray or gloo put it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from rlprm.actors import group, places
from rlprm.actors.nodes import Node
from rlprm.errors import ConfigError, WorkerLost

NODES = [
    Node(index=index, id=f"id{index}", name=f"host{index}", address=f"10.0.0.{index}", cpus=8.0, gpus=0.0)
    for index in range(2)
]


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Two ranks on two nodes; the ids of nodes that Ray says are alive."""
    alive = {"id0", "id1"}
    monkeypatch.setattr(places.ray, "nodes", lambda: [{"NodeID": node.id, "Alive": node.id in alive} for node in NODES])
    for rank, node in enumerate(NODES):
        actor_id = SimpleNamespace(hex=lambda rank=rank: f"{rank}" * 32)
        places.sits(SimpleNamespace(_actor_id=actor_id), f"policy rank {rank}", node)
    yield alive
    places.forget()


def failing(error: Exception) -> Any:
    def get(references: Any, timeout: float) -> Any:
        raise error

    return get


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("learn", "Traceback", cause, proctitle="ray::Worker", pid=1, ip="10.0.0.0")


@pytest.mark.parametrize(
    "error",
    [
        RayActorError(actor_id="1" * 32),
        ActorUnavailableError("RpcError: socket closed", bytes.fromhex("1" * 32)),
        task_error(ActorUnavailableError("RpcError", bytes.fromhex("1" * 32))),
    ],
    ids=["died", "unavailable", "inside a rank"],
)
def test_a_lost_rank_is_named_with_its_node(
    two_ranks: set[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(group.ray, "get", failing(error))
    with pytest.raises(WorkerLost, match=r"policy rank 1 on node host1 \(10\.0\.0\.1\)"):
        group.answer("reference", what="policy (policy update)", timeout_s=1.0)


@pytest.mark.parametrize(
    "error",
    [
        task_error(RuntimeError("[transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:41234")),
        task_error(RuntimeError("Timed out waiting 60000ms for recv operation to complete")),
        ObjectLostError("0" * 56, None, ""),
    ],
    ids=["closed", "gloo timeout", "lost value"],
)
def test_a_broken_connection_names_the_node_as_soon_as_ray_knows(
    two_ranks: set[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Which Ray takes a while to notice."""
    monkeypatch.setattr(group.ray, "get", failing(error))
    monkeypatch.setattr(places.time, "sleep", lambda seconds: two_ranks.discard("id1"))
    monkeypatch.setattr(places, "_dead_actors", lambda references: "")
    with pytest.raises(WorkerLost, match=r"node host1 \(10\.0\.0\.1\) is gone, and with it policy rank 1"):
        group.answer(["reference"], what="policy (policy update)", timeout_s=1.0)


def test_an_error_of_another_kind_waits_for_no_news(two_ranks: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group.ray, "get", failing(task_error(RuntimeError("shape mismatch"))))
    monkeypatch.setattr(places.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(WorkerLost, match=r"failed: RuntimeError: shape mismatch$"):
        group.answer(["reference"], what="policy", timeout_s=1.0)


def test_what_a_rank_raised_on_purpose_stays_what_it_is(two_ranks: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group.ray, "get", failing(task_error(ConfigError("wrong"))))
    with pytest.raises(ConfigError, match="wrong"):
        group.answer(["reference"], what="policy", timeout_s=1.0)


def test_silence_names_a_node_that_is_gone(two_ranks: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    two_ranks.discard("id0")
    monkeypatch.setattr(group.ray, "get", failing(GetTimeoutError("late")))
    with pytest.raises(WorkerLost, match=r"did not answer within 1 s; .*node host0 \(10\.0\.0\.0\) is gone"):
        group.answer(["reference"], what="policy", timeout_s=1.0)


def test_a_rank_that_sits_elsewhere_now_is_not_missed(two_ranks: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    two_ranks.discard("id1")
    assert "policy rank 1" in places.who_is_lost([], wait_s=0.0)
    places.sits(SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: "2" * 32)), "policy rank 1", NODES[0])
    assert places.who_is_lost([], wait_s=0.0) == ""


def test_where_nobody_was_seated_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group.ray, "get", failing(RayActorError(actor_id="1" * 32)))
    with pytest.raises(WorkerLost, match=r"^policy: its process died or cannot be reached: "):
        group.answer(["reference"], what="policy", timeout_s=1.0)
