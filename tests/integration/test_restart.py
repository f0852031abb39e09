"""A run that loses a learner in the middle of a step ends as if nothing had been; one that loses a node ends smaller."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlprm import driver
from tests.integration.namespaces import nodes
from tests.integration.restart_program import SETTINGS, process_ids, restarted
from tests.integration.support import json_lines, train
from tests.integration.test_resume import decided

pytestmark = pytest.mark.integration


@pytest.mark.long
def test_a_killed_rank_leaves_no_trace_in_the_numbers(ray_once: None, model: str, tmp_path: Path) -> None:
    pids: list[int] = []

    def kill(run: driver.Run) -> None:
        pids.extend(process_ids([*run.policy.group.workers, *run.reference.group.workers]))
        os.kill(pids[1], signal.SIGKILL)

    whole = train(tmp_path / "whole", model, *SETTINGS)
    again, starts = restarted(tmp_path / "again", model, kill, 4, "recovery.restarts=1")
    assert starts == 2
    assert "lost: policy" in again.screen
    assert "restart 1 of 1: on from the checkpoint of step 2, with all ranks" in again.screen
    assert not any(psutil.pid_exists(pid) for pid in pids)

    assert [row["step"] for row in again.metrics] == [1, 2, 3, 4]
    assert [row["run/restarts"] for row in again.metrics] == [0.0, 0.0, 1.0, 1.0]
    for expected, found in zip(whole.metrics, again.metrics, strict=True):
        assert decided(found) | {"run/restarts": 0.0} == decided(expected)
    assert again.rollouts == whole.rollouts
    for role in ("policy", "process"):
        files = [run.exported / role / "model.safetensors" for run in (whole, again)]
        assert files[0].read_bytes() == files[1].read_bytes()
    first, second = json.loads((again.folder / "run.json").read_text())["starts"]
    assert "restarted_after" not in first
    assert second["restarted_after"].startswith("policy")


@pytest.mark.long
def test_a_lost_node_leaves_one_rank(model: str, tmp_path: Path) -> None:
    """Two nodes with a policy rank each; one dies in the middle of step 3 and does not come back."""
    placed = ("placement.nodes=2", "placement.policy_nodes=[0,1]", "placement.prm_nodes=[0]", "placement.engine_nodes=[0]",
              "recovery.restarts=2", "recovery.wait_s=3", "recovery.min_policy_ranks=1")  # fmt: skip
    with nodes(tmp_path, 2, separate=False) as made:
        screen = tmp_path / "driver.log"
        program = [sys.executable, "-m", "tests.integration.restart_program"]
        run = made.spawn(0, [*program, made.address, model, str(tmp_path), *placed], screen)
        deadline = time.monotonic() + 90
        while not (tmp_path / "under_way").exists():
            assert run.poll() is None, screen.read_text()[-3000:]
            assert time.monotonic() < deadline, screen.read_text()[-3000:]
            time.sleep(0.1)
        made.kill(1)
        (tmp_path / "taken").touch()
        assert run.wait(timeout=150) == 0, screen.read_text()[-3000:]
    said = screen.read_text()
    assert "node1" in said.partition("lost: ")[2].partition("\n")[0]
    assert "1 of 2 nodes are there (node0" in said
    assert "placement.nodes=1 (of 2)" in said
    assert "placement.policy_ranks=1 (of 2)" in said
    assert "resuming with placement.policy_ranks = 1 (was 2)" in said
    folder = tmp_path / "train" / "seed0"
    metrics = json_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert metrics[-1]["run/restarts"] >= 1.0
    assert metrics[-1]["training/rollouts_total"] == 4 * 4 * 4
