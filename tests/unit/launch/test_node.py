"""Ray on one node: command line and environment, head and worker that cannot start."""

from __future__ import annotations

import argparse
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from rlprm.errors import ConfigError
from rlprm.launch import node, task, worker
from rlprm.launch.head import Head, Output
from rlprm.launch.processes import Wishes
from rlprm.launch.worker import Worker
from tests.unit.launch.launching import a_task


def test_what_is_set_wins_over_good_defaults_and_the_cluster_over_both(tmp_path: Path) -> None:
    made = a_task(tmp_path, environment={"NCCL_DEBUG": "INFO", "OMP_WAIT_POLICY": "ACTIVE"})
    found = node.environment(made, "secret", {"OMP_NUM_THREADS": "4", "RAY_health_check_period_ms": "9", "X": "y"})
    assert (found["OMP_NUM_THREADS"], found["OMP_WAIT_POLICY"], found["X"]) == ("4", "ACTIVE", "y")
    assert (found["NCCL_DEBUG"], found["RAY_health_check_period_ms"]) == ("INFO", "9")
    assert (found["RAY_AUTH_MODE"], found["RAY_AUTH_TOKEN"]) == ("token", "secret")
    assert found["RAY_health_check_failure_threshold"] == "3"
    assert "RAY_AUTH_TOKEN" not in node.environment(made, None, {})  # a cluster that is joined has its own


def test_no_token_on_a_command_line_and_the_dashboard_on_loopback_only(tmp_path: Path) -> None:
    made = a_task(tmp_path, dashboard=True, object_store_bytes=1000, cpus=500)
    head = node.head_options(made, name="a", ip="127.0.0.1", port=6399, metrics=8090)
    assert "--metrics-export-port=8090" in head
    without = node.head_options(made, name="a", ip="127.0.0.1", port=6399, metrics=None)
    assert not [word for word in without if word.startswith("--metrics")]
    assert {"--head", "--port=6399", "--include-dashboard=true", "--dashboard-host=127.0.0.1"} <= set(head)
    assert {"--num-cpus=500", "--object-store-memory=1000", "--node-name=a", "--min-worker-port=0"} <= set(head)
    worker = node.worker_options(made, name=None, ip=None, address="10.0.0.1:6399")
    assert "--address=10.0.0.1:6399" in worker
    assert not [word for word in worker if word.startswith(("--node-name", "--node-ip", "--min-worker", "--port"))]
    assert not [word for word in [*head, *worker] if "token" in word.lower()]


def test_a_port_in_use_and_a_foreign_address_are_found_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} \(Address already in use\).*cluster.port"):
            node.refuse_taken("127.0.0.1", port)
        assert node.answers(f"127.0.0.1:{port}")
    assert not node.answers(f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="Cannot assign requested address"):
        node.refuse_taken("192.0.2.77", 0)


def test_only_the_head_exports_rays_metrics(tmp_path: Path) -> None:
    made = a_task(tmp_path, dashboard=True)
    options = argparse.Namespace(name="node1", ip=None, folder=made.path)
    joined = Worker(made, options, {"RAY_AUTH_TOKEN": "t"}, Wishes(folder=made.path))
    assert joined._environment["RAY_enable_metrics_collection"] == "0"
    assert "RAY_enable_metrics_collection" not in node.environment(made, "t", {})


def head(made: task.Task, **options: Any) -> tuple[Head, Output]:
    output = Output(made.path / task.LOG)
    given = argparse.Namespace(**{"name": "node0", "ip": "127.0.0.1", "joined": None, "folder": made.path, **options})
    return Head(made, given, {"PATH": "/usr/bin:/bin"}, Wishes(folder=made.path), output), output


def test_a_head_whose_ray_does_not_start_says_why_and_leaves_an_exit_code(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    broken.chmod(0o755)
    made = a_task(tmp_path, python=str(broken))
    task.write(made)
    program, output = head(made)
    with output:
        assert program.run() == 1
    assert task.exit_code(made.path) == 1
    log = (made.path / task.LOG).read_text()
    assert "error: Ray ended with code 3 instead of starting" in log
    assert "no such module" in log
    assert task.token(made.path) not in log


def test_a_head_without_its_python(tmp_path: Path) -> None:
    made = a_task(tmp_path, python=str(tmp_path / "none"))
    task.write(made)
    program, output = head(made)
    with output:
        assert program.run() == 1
    assert task.exit_code(made.path) == 1
    assert "error: [Errno 2] No such file" in (made.path / task.LOG).read_text()


def test_a_head_that_is_asked_to_stop_before_it_runs(tmp_path: Path) -> None:
    """In a cluster that runs already; what an earlier try has left does not count."""
    made = a_task(tmp_path)
    task.write(made)
    task.put(made.path, task.EXIT, "0\n")
    task.put(made.path, task.STOP, "")
    program, output = head(made, joined="10.0.0.1:6379")
    with output:
        assert program.run() == 130
    assert task.exit_code(made.path) == 130


def test_the_run_gets_its_address_and_its_code_is_the_launches(tmp_path: Path) -> None:
    standing = tmp_path / "python"
    standing.write_text('#!/bin/sh\necho "$@"; case "$2" in rlprm.cli.main) exit 7;; esac\n')
    standing.chmod(0o755)
    made = a_task(tmp_path, python=str(standing))
    task.write(made)
    program, output = head(made, joined="10.0.0.1:6379")
    with output:
        assert program.run() == 7
    log = (made.path / task.LOG).read_text()
    assert f"-m rlprm.launch.ready {made.folder} 10.0.0.1:6379" in log
    assert "-m rlprm.cli.main train placement.ray_address=10.0.0.1:6379 recipe=small resume=auto" in log
    assert json.loads((made.path / task.HEAD).read_text())["address"] == "10.0.0.1:6379"


def a_worker(made: task.Task, **options: Any) -> Worker:
    given = argparse.Namespace(**{"name": "b", "ip": None, "address": None, **options})
    return Worker(made, given, {"RAY_AUTH_TOKEN": "t"}, Wishes(folder=made.path))


def test_a_worker_gives_up_when_ray_fails_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "AGAIN_S", 0.0)
    made = a_task(tmp_path, python="/bin/false")
    task.write(made)
    with socket.socket() as gcs:
        gcs.bind(("127.0.0.1", 0))
        gcs.listen()
        task.put(made.path, task.HEAD, json.dumps({"address": f"127.0.0.1:{gcs.getsockname()[1]}"}))
        with pytest.raises(ConfigError, match="Ray has ended 5 times in a row"):
            a_worker(made).run()
    assert capsys.readouterr().out.count("joins again") == 4


def test_a_worker_leaves_when_the_run_has_ended_and_gives_up_on_a_head_that_never_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = a_task(tmp_path)
    task.write(made)
    task.put(made.path, task.EXIT, "0\n")
    a_worker(made).run()
    (made.path / task.EXIT).unlink()
    monkeypatch.setattr(worker, "AWAY_S", 0.0)
    with pytest.raises(ConfigError, match=r"head.json, which the head writes"):
        a_worker(made).run()
    with pytest.raises(ConfigError, match=r"Ray's head at 127.0.0.1:1;"):
        a_worker(made, address="127.0.0.1:1").run()
