"""Runs on nodes with addresses of their own: placed, joined late, cut off, killed and back again.

Where the machine allows no network namespaces the nodes are several Ray nodes of one address, with the reason printed,
for the tests that can be run so; a node that is cut off needs a link of its own.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.namespaces import Nodes, nodes, unavailable, wait_until
from tests.integration.support import CHAIN, PRM, SMALL, TRANSFORMERS, VLLM, json_lines

pytestmark = [pytest.mark.integration, pytest.mark.long]

START_S = 180.0  # a run on a loaded machine
PROGRAM = [sys.executable, "-m", "tests.integration.two_nodes_program"]
TRAIN = [sys.executable, "-m", "rlprm.cli.main", "train"]
BOTH = ("placement.policy_ranks=2", "placement.policy_nodes=[0,1]", "policy.zero_stage=2")


@pytest.fixture(scope="module")
def separate(pytestconfig: pytest.Config) -> bool:
    """Has each node a namespace of its own?"""
    reason = unavailable()
    if reason is not None:
        writer = pytestconfig.get_terminal_writer()
        writer.line(f"\nseveral Ray nodes of one address stand in for namespaces: {reason}")
    return reason is None


@pytest.fixture
def links(separate: bool) -> None:
    if not separate:
        pytest.skip("needs network namespaces (root and iproute2): a node is cut off by its link")


class Run:
    """`rlprm train` on node 0, as a user starts it."""

    def __init__(self, made: Nodes, folder: Path, model: str, *overrides: str) -> None:
        self.folder = folder / "runs" / "train" / "seed0"
        self.screen = folder / "driver.log"
        words = [
            *(*TRAIN, *SMALL, *CHAIN, *PRM, *TRANSFORMERS, f"model.path={model}", f"output_dir={folder / 'runs'}"),
            *(f"placement.ray_address={made.address}", "placement.collective_timeout_s=15", "resume=auto"),
            *("placement.stage_timeout_s=120", "checkpoint.every=1", *overrides),
        ]
        self.process = made.spawn(0, words, self.screen)

    @property
    def said(self) -> str:
        """Its screen, in one line."""
        return " ".join(self.screen.read_text().split()) if self.screen.exists() else ""

    @property
    def steps(self) -> list[int]:
        """Steps that are done."""
        file = self.folder / "metrics.jsonl"
        return [row["step"] for row in json_lines(file) if row["step"] > 0] if file.exists() else []

    def until_step(self, step: int) -> None:
        wait_until(lambda: step in self.steps, START_S, f"step {step}: {self.screen}", failed=self.ended)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def end(self, seconds: float) -> int:
        """Its exit code, within so many seconds."""
        try:
            return self.process.wait(timeout=seconds)
        finally:
            print(self.screen.read_text()[-4000:])


@pytest.fixture
def two(separate: bool, tmp_path: Path) -> Iterator[Nodes]:
    with nodes(tmp_path, 2, separate=separate) as made:
        yield made


def test_prime_with_ranks_on_both_nodes_and_the_engine_on_the_other(two: Nodes, model: str, tmp_path: Path) -> None:
    words = [*BOTH, "placement.engine_nodes=[1]", "rollout=vllm_cpu", *VLLM, "placement.weight_transport=gloo"]
    driver = two.spawn(0, [*PROGRAM, two.address, model, str(tmp_path), "2", *words], tmp_path / "driver.log")
    assert driver.wait(timeout=START_S) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    numbers = {role: [each["node"] for each in members] for role, members in found["where"].items()}
    assert numbers == {"policy": [0, 1], "prm": [0], "engines": [1], "judge": [0]}
    assert found["steps"] == [1, 2]
    assert max(found["gaps"]) < 1e-4
    for members in found["where"].values():
        for each in members:  # every socket is on the node's own address
            assert each["VLLM_HOST_IP"] == two.ip(each["node"])
            assert each["GLOO_SOCKET_IFNAME"] == (f"rlprm{each['node']}" if two.separate else "lo")
    assert found["alike"] == []


def test_a_node_that_joins_late_is_waited_for(separate: bool, model: str, tmp_path: Path) -> None:
    with nodes(tmp_path, 3, separate=separate, start=[0, 1]) as made:
        run = Run(made, tmp_path, model, "steps=1", "placement.nodes=3", "placement.engine_nodes=[2]")
        wait_until(lambda: "waiting:" in run.said, START_S, f"{run.screen}", failed=run.ended)
        assert "waiting: 2 of 3 nodes are there (node0, node1); missing 1" in run.said
        assert not (run.folder / "logs").exists()  # nothing was started before all were there
        made.start(2)
        assert run.end(START_S) == 0
        assert run.steps == [1]
        assert "nodes: 0: node0" in run.said
        assert "2: node2" in run.said


def test_a_node_cut_off_in_mid_step_ends_the_run_and_the_same_command_continues_it(
    links: None, two: Nodes, model: str, tmp_path: Path
) -> None:
    words = ("steps=20", "placement.nodes=2", *BOTH, "placement.engine_nodes=[0]")
    run = Run(two, tmp_path, model, *words, "prompts_per_step=16")
    run.until_step(1)
    two.cut(1)
    begin = time.monotonic()
    assert run.end(90.0) not in (0, None)
    assert time.monotonic() - begin < 75.0
    assert re.search(r"node1 \(10\.99\.0\.2\)", run.said), run.said[-2000:]
    assert 1 <= len(run.steps) < 20
    # the raylet of node 1 notices by itself that it was dropped, and takes its workers along
    two.mend(1)
    wait_until(lambda: two.running[1].poll() is not None, 60.0, "the node that was cut off goes")
    wait_until(lambda: not (workers(two, 0) or workers(two, 1)), 30.0, "processes of the run go")
    before = run.steps
    two.running.pop(1)
    two.start(1)
    again = Run(two, tmp_path, model, *words, "prompts_per_step=16")
    assert again.end(START_S) == 0
    assert again.steps == list(range(1, 21))
    assert before == again.steps[: len(before)]


def test_an_engine_goes_with_its_node_and_comes_back_with_it(two: Nodes, model: str, tmp_path: Path) -> None:
    """The learners, all on the head, never stop: until the node is back they sample on the engine that is left."""
    words = ("steps=300", "placement.nodes=2", "placement.policy_nodes=[0]", "placement.prm_nodes=[0]")
    engines = ("placement.engines=2", "placement.engine_nodes=[0,1]", "recovery=elastic", "checkpoint.every=0")
    run = Run(two, tmp_path, model, *words, *engines, "prompts_per_step=16")
    run.until_step(1)
    two.kill(1)
    wait_until(lambda: "rollout engine 1" in run.said and "is gone" in run.said, 60.0, "the loss", failed=run.ended)
    two.start(1)
    assert run.end(2 * START_S) == 0
    assert run.steps == list(range(1, 301))
    rows = [row for row in json_lines(run.folder / "metrics.jsonl") if row["step"] > 0]
    assert sum(row["rollout/engines_lost"] for row in rows) == 1
    assert sum(row["rollout/engines_joined"] for row in rows) == 1
    assert min(row["rollout/engines"] for row in rows) == 1
    assert rows[-1]["rollout/engines"] == 2


def test_a_node_with_ranks_dies_and_comes_back(two: Nodes, model: str, tmp_path: Path) -> None:
    """With recovery=elastic the learners start again from the checkpoint, on both nodes."""
    words = ("steps=60", "placement.nodes=2", *BOTH, "placement.engine_nodes=[0]", "prompts_per_step=16")
    run = Run(two, tmp_path, model, *words, "recovery=elastic", "recovery.wait_s=90")
    run.until_step(1)
    two.kill(1)
    two.start(1)
    assert run.end(2 * START_S) == 0
    assert run.steps == list(range(1, 61))
    assert "node1" in run.said
    assert "restart 1 of" in run.said
    assert "with all ranks" in run.said


def workers(made: Nodes, node: int) -> list[str]:
    """Actors and tasks of a run that are left on a node; Ray's idle workers are its own."""
    found = []
    for process in made.on(node):
        try:
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if title.startswith("ray::") and not title.startswith(("ray::IDLE", "ray::Dashboard", "ray::RuntimeEnv")):
            found.append(title)
    return found
