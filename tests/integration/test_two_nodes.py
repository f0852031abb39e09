"""A run on two Ray nodes of this machine: who sits where, that they learn together, and what is wrong with nodes."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.integration.namespaces import nodes

pytestmark = pytest.mark.integration

PROGRAM = [sys.executable, "-m", "tests.integration.two_nodes_program"]
PLACED = (
    "placement.policy_ranks=2",
    "placement.policy_nodes=[0,1]",
    "placement.engine_nodes=[1]",
    "policy.zero_stage=2",
)


@pytest.fixture(scope="module")
def found(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one driver saw: a run of two steps, then faults. In a process of its own, which has no other Ray."""
    folder = tmp_path_factory.mktemp("two_nodes")
    with nodes(folder, 2, separate=False) as made:
        screen = folder / "driver.log"
        driver = made.spawn(0, [*PROGRAM, made.address, model, str(folder), "2", *PLACED], screen)
        assert driver.wait(timeout=100) == 0, screen.read_text()[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_every_process_runs_on_its_seat(found: dict[str, Any]) -> None:
    assert found["names"] == ["node0", "node1"]
    numbers = {role: [each["node"] for each in members] for role, members in found["where"].items()}
    assert numbers == {"policy": [0, 1], "prm": [0], "engines": [1], "judge": [0]}


def test_both_nodes_learn_and_the_engine_has_their_weights(found: dict[str, Any]) -> None:
    assert found["steps"] == [1, 2]
    assert len(found["gaps"]) == 3
    assert max(found["gaps"]) < 1e-4
    assert "nodes: 0: node0 (127.0.0.1), 1: node1 (127.0.0.1)" in found["screen"]


def test_sockets_are_opened_on_the_address_of_the_node(found: dict[str, Any]) -> None:
    told = {
        (each["VLLM_HOST_IP"], each["GLOO_SOCKET_IFNAME"]) for members in found["where"].values() for each in members
    }
    assert told == {("127.0.0.1", "lo")}


def test_too_few_nodes_are_named_after_the_wait(found: dict[str, Any]) -> None:
    assert "2 of 9 nodes are there (node0, node1); missing 7" in found["missing"]
    assert "placement.nodes" in found["missing"]


def test_several_nodes_need_a_cluster(found: dict[str, Any]) -> None:
    assert "placement.nodes is 2 and placement.ray_address null" in found["alone"]
    assert "rlprm launch" in found["alone"]
    assert "placement.engine_nodes names node 2 and placement.nodes is 2" in found["no_such_node"]


def test_equal_nodes_have_no_findings_and_leave_no_files(found: dict[str, Any]) -> None:
    assert found["alike"] == []
    assert found["left"] == []


def test_unequal_nodes_are_named_with_what_differs(found: dict[str, Any]) -> None:
    (versions,) = found["versions"]
    assert versions.startswith(
        "node node1 (127.0.0.1) does not run what node node0 (127.0.0.1) runs: torch 1.0.0 (there 2."
    )
    (unshared,) = found["unshared"]
    assert "node node1 (127.0.0.1) cannot see the folder" in unshared
    assert "shared storage" in unshared
    (no_model,) = found["no_model"]
    assert "node node1 (127.0.0.1) has no model at" in no_model
    assert "(model.path)" in no_model
    (other,) = found["other_model"]
    assert "node node1 (127.0.0.1) has another model at" in other
