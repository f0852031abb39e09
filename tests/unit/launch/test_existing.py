"""A job for a Ray cluster that runs already: what is submitted, what is refused, and how it is followed."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from rlprm.actors import jobs
from rlprm.actors.jobs import JobState, Unreachable
from rlprm.cli.compose import composed
from rlprm.config import validated
from rlprm.config_cluster import ExistingCluster, LaunchConfig
from rlprm.errors import ConfigError, WorkerLost
from rlprm.launch import existing, head, joined, task
from rlprm.launch.processes import Wishes, this_python
from rlprm.launch.task import Task
from tests.unit.launch.launching import a_task, written


def cluster(*words: str) -> ExistingCluster:
    made: Any = validated(LaunchConfig, composed("launch", ["cluster=existing", "cluster.poll_s=0.01", *words]).values)
    return made.cluster


def a_job(where: Path, **changed: Any) -> Task:
    given = {"kind": "existing", "secrets": (), "run": "/shared/runs/small/seed0", "names": (), **changed}
    return a_task(where, **given)


class Standing:
    """A cluster of one job, whose states come one after the other."""

    def __init__(self, *states: JobState | None) -> None:
        self.states = list(states)
        self.submitted: list[tuple[str, str]] = []
        self.stopped: list[str] = []

    def look(self, name: str) -> JobState:
        found = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if found is None:
            raise Unreachable("gone for now")
        return found

    def text(self, name: str) -> str:
        return "".join(f"step {index}\n" for index in range(4 - len(self.states)))

    def submit(self, name: str, entrypoint: str, **options: Any) -> None:
        self.submitted.append((name, entrypoint))

    def stop(self, name: str) -> None:
        self.stopped.append(name)


PENDING, RUNNING = (JobState(state=state, message="", code=None) for state in ("PENDING", "RUNNING"))
FAILED = JobState(state="FAILED", message="", code=3)


def test_what_would_be_submitted(tmp_path: Path) -> None:
    made = a_job(tmp_path, environment={"NCCL_DEBUG": "INFO"})
    text = existing.dry_run(made, cluster("cluster.python=/there/python"))
    assert f"entrypoint: /there/python -m rlprm.launch.joined {made.folder}" in text
    assert "working_dir: " in text
    assert "env_vars: NCCL_DEBUG=INFO" in text
    assert "rlprm train recipe=small resume=auto" in text
    carried = json.loads(existing.variables(made, cluster())["RLPRM_TASK"])
    assert (carried["directory"], carried["python"]) == ("", "")  # where Ray unpacks, and Ray's own
    stays = cluster("cluster.upload=false")
    assert json.loads(existing.variables(made, stays)["RLPRM_TASK"])["directory"] == made.directory
    assert "working_dir" not in existing.dry_run(made, stays)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shows a job's variables"):
        existing.dry_run(a_job(tmp_path, secrets=("HF_TOKEN",)), cluster())
    inside = a_job(tmp_path, run=str(tmp_path / "runs" / "small"))
    with pytest.raises(ConfigError, match=r"runs/small would be written where Ray unpacks.*absolute path"):
        existing.dry_run(inside, cluster())
    existing.dry_run(inside, cluster("cluster.upload=false"))


def test_an_address_where_nothing_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(ConfigError, match=r"no Ray cluster answers at cluster.address.*ssh -L"):
            jobs.Jobs(f"http://127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(ConfigError, match="expected the dashboard's, for example"):
        jobs.Jobs("ray://127.0.0.1:10001")


def test_a_job_is_followed_through_a_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standing = Standing(PENDING, None, RUNNING, FAILED)
    monkeypatch.setattr(existing, "_jobs", lambda given: standing)
    monkeypatch.setattr(existing, "LOOK_S", 0.001)
    made, said = written(a_job(tmp_path), cluster()), []
    watched = existing.Watched(made, cluster(), said.append, Wishes())
    assert "".join(watched.pieces()) == "step 0\nstep 1\nstep 2\n"
    assert watched.code() == 3
    assert [each.split(": ")[-1].split(" (")[0] for each in said] == [
        "PENDING", "http://127.0.0.1:8265 does not answer", "RUNNING", "FAILED",
    ]  # fmt: skip
    assert task.exit_code(made.path) == 3
    assert existing.status(made, cluster()).exit_code == 3


def test_a_wish_is_a_small_job_and_a_second_one_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standing, wishes = Standing(RUNNING), Wishes()
    monkeypatch.setattr(existing, "_jobs", lambda given: standing)
    monkeypatch.setattr(existing, "LOOK_S", 0.001)
    made = written(a_job(tmp_path), cluster())
    watched = existing.Watched(made, cluster(), lambda sentence: None, wishes)
    wishes.ask(signal.SIGINT, "")
    watched._pause()
    ((name, entrypoint),) = standing.submitted
    assert name.startswith(f"rlprm-{made.id}-stop")
    assert f"{made.folder}/stop" in entrypoint
    assert standing.stopped == []
    wishes.ask(signal.SIGINT, "")
    watched._pause()
    assert standing.stopped == [f"rlprm-{made.id}"]


def test_a_cluster_that_cannot_be_asked_has_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(given: ExistingCluster) -> Any:
        raise ConfigError("no answer")

    monkeypatch.setattr(existing, "_jobs", silent)
    assert existing.status(written(a_job(tmp_path), cluster()), cluster()).state == "unknown"


def test_a_cluster_that_has_forgotten_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standing = Standing(JobState(state="", message="", code=None))
    monkeypatch.setattr(existing, "_jobs", lambda given: standing)
    made = written(a_job(tmp_path), cluster())
    assert existing.status(made, cluster()).state == "lost"
    watched = existing.Watched(made, cluster(), lambda sentence: None, Wishes())
    list(watched.pieces())
    with pytest.raises(WorkerLost, match=r"knows no job rlprm-.* any more"):
        watched.code()


def test_the_entrypoint_makes_the_folder_on_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = a_job(tmp_path / "there", directory="", python="")
    monkeypatch.setenv("RLPRM_TASK", joined.carried(made))
    monkeypatch.chdir(tmp_path)
    given: list[list[str]] = []
    monkeypatch.setattr(head, "main", lambda arguments: given.append(arguments) or 5)
    assert joined.main([made.folder]) == 5
    assert given == [[made.folder, "--joined"]]
    assert task.read(made.folder).directory == str(tmp_path)
    assert task.read(made.folder).python == this_python()
    assert not (made.path / task.TOKEN).exists()
