"""`rlprm doctor` and the preflight for real: this machine with both engines, and two Ray nodes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.raylets import Raylets, raylets

pytestmark = pytest.mark.integration

RECIPE = "recipe=chain_arithmetic_cpu"
PROGRAM = Path(__file__).with_name("doctor_program.py")
ROOT = PROGRAM.parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raylets]:
    with raylets(tmp_path_factory.mktemp("raylets"), 2) as nodes:
        yield nodes


def doctor(*words: str, nodes: Raylets | None = None) -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "rlprm.cli.main", "doctor", *words, "--json"]
    environment = None if nodes is None else dict(nodes.environment)
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment, cwd=ROOT, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def program(nodes: Raylets, folder: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.integration.doctor_program", nodes.address, str(folder), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=150, env=dict(nodes.environment), cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_this_machine_is_fit_for_the_quick_start(tmp_path: Path) -> None:
    code, found = doctor(RECIPE, f"output_dir={tmp_path}")
    assert code == 0
    assert [each for each in found if each["level"] != "ok"] == []
    checks = {each["check"]: each for each in found}
    assert "float32" in checks["log-probs"]["found"]
    assert "2 ranks (gloo)" in checks["all-reduce"]["found"]
    assert checks["log-probs"]["seconds"] > 1.0


def test_two_nodes_are_fit(two: Raylets, tmp_path: Path) -> None:
    words = [
        RECIPE,
        f"output_dir={tmp_path}",
        "placement.nodes=2",
        "placement=cpu_two_ranks",
        "placement.policy_nodes=[0,1]",
    ]
    code, found = doctor(*words, "--address", two.address, nodes=two)
    assert [each for each in found if each["level"] != "ok"] == []
    assert code == 0
    checks = {each["check"]: each for each in found}
    assert {"same versions", "same rlprm", "connections", "clock", "all-reduce", "log-probs"} <= set(checks)
    assert checks["nodes"]["found"] == "2 are there (node0, node1)"
    assert checks["run folder"]["found"].endswith("shared by 2 nodes")
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_the_preflight_of_a_launch_is_quick_and_pairs_can_be_tried(two: Raylets, tmp_path: Path) -> None:
    said = program(two, tmp_path, "quick", "quick", "pairs")
    assert [each for each in said["quick"] if each["level"] != "ok"] == []
    assert said["quick_s"] < 5.0  # the second one: the first also waits for imports
    ((one, other, answer),) = said["pairs"]
    assert (one, other) == ("node0", "node1")
    assert answer["right"]
    assert not answer["problem"]


def test_fewer_nodes_than_the_run_needs(two: Raylets, tmp_path: Path) -> None:
    code, found = doctor(
        RECIPE, "--quick", f"output_dir={tmp_path}", "placement.nodes=3", "--address", two.address, nodes=two
    )
    (bad,) = [each for each in found if each["level"] != "ok"]
    assert code == 1
    assert bad["check"] == "nodes"
    assert bad["found"] == "2 of 3 are there (node0, node1)"


def test_a_node_that_does_not_answer_is_named(two: Raylets, tmp_path: Path) -> None:
    raylet = next(
        each for each in psutil.Process(two.processes[1].pid).children(recursive=True) if each.name() == "raylet"
    )
    raylet.send_signal(signal.SIGSTOP)
    try:
        said = program(two, tmp_path, "answer")
    finally:
        raylet.send_signal(signal.SIGCONT)
    bad = [each for each in said["answer"] if each["level"] == "fail"]
    assert [(each["check"], each["node"]) for each in bad] == [("answer", "node1")]
    assert "no answer within 3 s" in bad[0]["found"]


def test_an_address_where_nobody_is() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlprm.cli.main", "doctor", RECIPE, "--quick", "--address", "127.0.0.1:1"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr
