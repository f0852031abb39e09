"""Seats while nodes come and go: nobody is put on a node that is gone, and nobody on GPUs that are taken."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rlprm.actors import seating
from rlprm.actors.nodes import Node
from rlprm.actors.seating import Seating
from rlprm.errors import ConfigError


class Cluster:
    """What Ray says is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *gpus: float, busy: float = 0.0) -> None:
        self.there = [
            Node(
                index=index, id=f"{index + 1}" * 56, name=f"host{index}", address=f"10.0.0.{index}", cpus=8.0, gpus=each
            )
            for index, each in enumerate(gpus)
        ]
        monkeypatch.setattr(seating.cluster_nodes, "nodes", lambda: tuple(self.there))
        free = {node.id: {"GPU": node.gpus - busy} for node in self.there}
        monkeypatch.setattr(seating.state, "available_resources_per_node", lambda: free)

    def lose(self, name: str) -> Node:
        gone = next(node for node in self.there if node.name == name)
        self.there.remove(gone)
        return gone


def asked(**changed: Any) -> SimpleNamespace:
    values = {
        "policy_ranks": 2, "policy_nodes": None, "gpus_per_rank": 0.0, "prm_ranks": 1, "prm_nodes": None,
        "engines": 2, "engine_nodes": None, "tensor_parallel": 1, "gpus_per_engine": 0.0,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changed})


def test_a_lost_node_keeps_its_number_and_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 0.0, 0.0, 0.0)
    place = Seating(cluster.there)
    placement = asked(policy_nodes=[0, 1], prm_nodes=[1], engine_nodes=[2])
    place.engines(placement, 0)
    assert place.learners(placement).policy == (0, 1)
    gone = cluster.lose("host1")
    assert place.lost() == ("host1",)
    fewer = place.learners(asked(policy_ranks=1, policy_nodes=[0, 1], prm_nodes=[1], engine_nodes=[2]))
    assert fewer.policy == (0,)
    assert fewer.prm == (0,)  # nothing of its list is left, so it is dealt out
    cluster.there.append(replace(gone, id="a" * 56, index=2))
    assert place.lost() == ()
    assert place.learners(placement).policy == (0, 1)
    assert place.node(1).id == "a" * 56


def test_a_lost_engine_goes_back_to_its_node_or_to_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 0.0, 0.0, 0.0)
    place = Seating(cluster.there)
    placement = asked(policy_nodes=[0], prm_nodes=[0], engine_nodes=[1, 2])
    place.engines(placement, 0)
    place.learners(placement)
    assert place.again(1, placement) == 2  # only its process was lost
    gone = cluster.lose("host2")
    assert place.again(1, placement) is None  # without GPUs no node is given more processes than it had
    cluster.there.append(replace(gone, id="c" * 56, name="new"))
    assert place.again(1, placement) == 3
    assert place.node(3).name == "new"


def test_an_engine_waits_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 2.0, 2.0)
    place = Seating(cluster.there)
    placement = asked(policy_ranks=1, prm_ranks=1, engines=2, gpus_per_rank=1.0, gpus_per_engine=1.0)
    assert place.engines(placement, 0).engines == (1, 1)
    assert place.learners(placement).policy == (0,)
    gone = cluster.lose("host1")
    assert place.again(0, placement) is None
    cluster.there.append(replace(gone, id="b" * 56))
    assert place.again(0, placement) == 1
    assert place.options(1)["scheduling_strategy"].node_id == "b" * 56


def test_ranks_start_again_beside_the_engines_that_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 2.0, 3.0)
    place = Seating(cluster.there)
    placement = asked(policy_ranks=3, prm_ranks=1, engines=1, gpus_per_rank=1.0, gpus_per_engine=1.0)
    assert place.engines(placement, 0).engines == (1,)
    cluster.lose("host0")
    with pytest.raises(ConfigError, match="placement"):
        place.learners(placement)
    assert place.learners(asked(policy_ranks=1, gpus_per_rank=1.0, gpus_per_engine=1.0)).policy == (1,)


def test_a_run_without_a_prm_fills_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 4.0)
    place = Seating(cluster.there)
    placement = asked(policy_ranks=2, prm_ranks=1, engines=2, gpus_per_rank=1.0, gpus_per_engine=1.0)
    with pytest.raises(ConfigError, match="finds no room"):
        place.engines(placement, 0)
    assert place.engines(placement, 0, prm=False).engines == (0, 0)
    found = place.learners(placement, prm=False)
    assert (found.policy, found.prm) == ((0, 0), ())
    assert place.again(1, placement) == 0


def test_gpus_of_other_users_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 2.0, 4.0, busy=1.0)
    place = Seating(cluster.there)
    found = place.engines(asked(policy_ranks=2, prm_ranks=1, engines=1, gpus_per_rank=1.0, gpus_per_engine=1.0), 0)
    assert (found.policy, found.prm, found.engines) == ((0, 1), (1,), (1,))


def test_seated_processes_do_not_wait_for_cpus_and_go_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 0.0, 0.0)
    options = Seating(cluster.there).options(1)
    assert options["num_cpus"] == 0
    assert (options["scheduling_strategy"].node_id, options["scheduling_strategy"].soft) == ("2" * 56, False)
