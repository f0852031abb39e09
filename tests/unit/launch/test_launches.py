"""Which launches there are, how they stand, and which one is meant."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlprm.errors import ConfigError
from rlprm.launch import launcher, task
from rlprm.launch.backends import Status
from rlprm.launch.launches import Launch, chosen, launches, rows, running_in
from rlprm.launch.streams import follow
from tests.unit.launch.launching import a_task, hosts_cluster, written


def made(folder: Path, launch_id: str, age: float = 0.0) -> task.Task:
    found = written(a_task(folder, launch_id), hosts_cluster())
    file = found.path / task.TASK
    os.utime(file, (file.stat().st_atime, file.stat().st_mtime - age))
    return found


def test_an_id_a_unique_beginning_or_the_latest(tmp_path: Path) -> None:
    folder = tmp_path / "launches"
    with pytest.raises(ConfigError, match=r"there is no launch in .*output_dir=\.\.\."):
        chosen(folder, None)
    made(tmp_path, "pure-1", age=30)
    made(tmp_path, "prime-2", age=20)
    made(tmp_path, "prime-3", age=10)
    (folder / "broken").mkdir()
    (folder / "broken" / task.TASK).write_text("{")
    assert [each.task.id for each in launches(folder)] == ["prime-3", "prime-2", "pure-1"]
    assert chosen(folder, None).task.id == "prime-3"
    assert chosen(folder, "pu").task.id == "pure-1"
    assert chosen(folder, "prime-2").task.id == "prime-2"
    with pytest.raises(ConfigError, match="'prime' begins 2 launches: prime-3, prime-2"):
        chosen(folder, "prime")
    with pytest.raises(ConfigError, match=r"there is no launch 'prine-2' in .*; nearest is 'prime-2'"):
        chosen(folder, "prine-2")


def sign(found: task.Task, **changed: object) -> None:
    """As if this process were the launcher."""
    launcher.sign(found)
    content = json.loads((found.path / launcher.LAUNCHER).read_text())
    task.put(found.path, launcher.LAUNCHER, json.dumps({**content, **changed}))


def test_how_it_stands(tmp_path: Path) -> None:
    found = made(tmp_path, "a")
    assert launcher.status(found).state == "lost"
    sign(found)
    assert launcher.status(found).state == "waiting"
    task.put(found.path, task.HEAD, "{}")
    running = launcher.status(found)
    assert (running.state, running.exit_code) == ("running", None)
    assert running.detail == f"process {os.getpid()} on {socket.gethostname()}"
    sign(found, created=psutil.Process().create_time() - 100)  # the number was given to another process
    assert launcher.status(found).state == "lost"
    sign(found, host="elsewhere", pid=1)  # nothing to be seen from here
    assert launcher.status(found).state == "running"
    task.put(found.path, task.EXIT, "7\n")
    ended = launcher.status(found)
    assert (ended.state, ended.exit_code, ended.detail) == ("ended", 7, "exit code 7")
    (row,) = rows(launches(tmp_path / "launches"))
    assert (row["state"], row["exit_code"], row["nodes"], row["kind"]) == ("ended", 7, 1, "hosts")


def test_two_launches_in_one_run_folder(tmp_path: Path) -> None:
    found = made(tmp_path, "a")
    sign(found)
    folder = tmp_path / "launches"
    running = running_in(folder, found.run)
    assert running is not None
    assert running[0] == "a"
    assert running_in(folder, str(Path(found.run).parent)) is not None  # several seeds of that run
    assert running_in(folder, str(Path(found.run).with_name("seed1"))) is None
    assert running_in(folder, found.run + "0") is None
    task.put(found.path, task.EXIT, "1\n")
    assert running_in(folder, found.run) is None


def test_a_log_is_read_to_its_end_and_characters_are_not_cut(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pieces = [b"step 1 \xc3", b"\xa9\n", b"step 2\n"]

    def ended() -> bool:
        with log.open("ab") as file:
            file.write(pieces.pop(0))
        return not pieces

    assert "".join(follow(log, ended)) == "step 1 é\nstep 2\n"


def test_the_logs_of_a_launch_that_never_ran_are_its_launchers(tmp_path: Path) -> None:
    found = made(tmp_path, "a")
    (found.path / launcher.OWN_LOG).write_text("rlprm launch: b cannot be reached\n")
    assert "".join(launcher.logs(found, True)) == "rlprm launch: b cannot be reached\n"
    (found.path / task.LOG).write_text("launch: starts\n")
    assert "".join(launcher.logs(found, False)) == "launch: starts\n"


def test_stop_leaves_the_file_and_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made(tmp_path, "a")
    task.put(found.path, task.EXIT, "130\n")
    launcher.stop(found)
    assert task.stop_is_asked(found.path)
    (found.path / task.EXIT).unlink()
    sign(found)
    monkeypatch.setattr(launcher, "STOP_S", 0.0)
    with pytest.raises(ConfigError, match="launch a has not ended within 0 s"):
        launcher.stop(found)


def test_the_clusters_section_comes_back(tmp_path: Path) -> None:
    found = made(tmp_path, "a")
    assert launcher.read_cluster(found.path) == hosts_cluster()
    (found.path / launcher.CLUSTER).write_text('{"kind": "hosts"}')
    with pytest.raises(ConfigError, match="written by another version"):
        launcher.read_cluster(found.path)


class Answering:
    """A backend that can be asked, and that has something to forget."""

    def __init__(self, state: str) -> None:
        self.state = state
        self.forgotten: list[str] = []

    def status(self, found: task.Task, cluster: object) -> Status:
        return Status(state=self.state, detail="", exit_code=0 if self.state == "ended" else None)

    def logs(self, found: task.Task, follow: bool) -> Iterator[str]:
        yield "step 1\n"

    def dry_run(self, found: task.Task, cluster: object) -> str:
        pytest.fail("who looks at a launch neither starts nor stops it")

    def launch(self, found: task.Task, cluster: object, say: object) -> int:
        pytest.fail("who looks at a launch neither starts nor stops it")

    def stop(self, found: task.Task) -> None:
        pytest.fail("who looks at a launch neither starts nor stops it")

    def forget(self, found: task.Task) -> None:
        self.forgotten.append(found.id)


@pytest.mark.parametrize("state", ["running", "lost", "unknown", "ended"])
def test_whoever_sees_the_end_tidies_up(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made(tmp_path, "a")
    answering = Answering(state)
    monkeypatch.setattr("rlprm.launch.launches.backend", lambda kind: answering)
    (one,) = launches(tmp_path / "launches")
    expected = ["a"] if state == "ended" else []
    assert one.status().state == state
    assert answering.forgotten == expected
    assert "".join(one.logs(True)) == "step 1\n"
    assert answering.forgotten == expected * 2
    assert (running_in(tmp_path / "launches", found.run) is not None) == (state in ("running", "unknown"))
    answering.forgotten.clear()
    task.put(found.path, task.EXIT, "0\n")  # the cluster is not asked any more
    assert one.status().state == "ended"
    assert answering.forgotten == ["a"]


def test_commands_that_only_print_are_never_in_each_others_way(tmp_path: Path) -> None:
    printing = written(a_task(tmp_path, "evaluate-1", run=""), hosts_cluster())
    sign(printing)
    sign(made(tmp_path, "train-1"))
    assert running_in(tmp_path / "launches", "") is None
    assert running_in(tmp_path / "launches", printing.folder) is None


def test_a_launch_that_cannot_be_asked_about_is_not_called_lost(tmp_path: Path) -> None:
    found = made(tmp_path, "a")
    (found.path / launcher.CLUSTER).write_text("{}")
    (row,) = rows([Launch(task=a_task(tmp_path, "a", kind="kuberay"), since=0.0)])
    assert row["state"] == "unknown"
