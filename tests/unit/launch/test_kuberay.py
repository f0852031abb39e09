"""What is asked of kubectl, and what its answers mean. A script stands where kubectl would be: there is no cluster here."""

from __future__ import annotations

import json
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlprm.errors import ConfigError, WorkerLost
from rlprm.launch import kuberay, task
from rlprm.launch.background import attached
from rlprm.launch.kubectl import Log
from rlprm.launch.launcher import read_cluster, write_cluster
from rlprm.launch.launches import Launch
from rlprm.launch.manifest import job_name
from tests.unit.launch.test_manifest import TASK, cluster

PROGRAM = """\
#!{python}
import json, pathlib, sys, time
here = pathlib.Path({folder!r})
with (here / "calls").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
words = [word for word in sys.argv[1:] if not word.startswith("-")]
verb = next(word for word in words if word in ("apply", "get", "logs", "exec", "delete"))
if verb == "apply" and "--dry-run=server" not in sys.argv:
    (here / "applied").write_text(sys.stdin.read())
elif verb == "get" and "rayjob" in words:
    answers = json.loads((here / "jobs").read_text())
    (here / "jobs").write_text(json.dumps(answers[1:] or answers))
    if answers[0] == "silent":
        sys.exit("Unable to connect to the server: i/o timeout")
    if answers[0] is not None:
        print(json.dumps({{"status": answers[0]}}))
elif verb == "get":
    print((here / "pods").read_text(), end="")
elif verb == "logs" and "--timestamps" in sys.argv:
    # what a pod has printed, cut off after so many characters the first time
    text, cut = (here / "log").read_text(), int((here / "cut").read_text())
    (here / "cut").write_text("-1")
    since = [word[13:-1] for word in sys.argv if word.startswith("--since-time=")]
    text = "".join(line for line in text.splitlines(True) if not since or line[:19] >= since[0])
    print(text if cut < 0 else text[:cut], end="", flush=True)
elif verb == "logs":
    print("step 1\\nstep 2")
sys.exit(int((here / "code").read_text()) if verb in ("apply", "logs") else 0)
"""
LOG = """\
2026-01-02T03:04:05.100000000Z step 1
2026-01-02T03:04:05.900000000Z step 2
2026-01-02T03:04:07.000000001Z step 3
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that scripts what kubectl answers, and keeps what it was asked."""
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").write_text("0")
    (tmp_path / "pods").write_text(json.dumps({"items": []}))
    (tmp_path / "log").write_text(LOG)
    (tmp_path / "cut").write_text("-1")
    return tmp_path


def answers(folder: Path, *statuses: dict[str, Any] | str | None) -> None:
    """What kubectl says of the job, one after the other, the last one for ever; "silent": it cannot reach the cluster."""
    (folder / "jobs").write_text(json.dumps(statuses))


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def launched(folder: Path, *overrides: str):
    section = cluster("cluster.poll_s=0.05", *overrides)
    found = replace(TASK, folder=str(folder / "mnt" / "launches" / "x"))
    section = section.model_copy(update={"mount": str(folder / "mnt")})
    task.write(found)
    write_cluster(found, section)
    return found, section


def test_a_run_from_apply_to_exit_code(kubectl, capfd):
    found, section = launched(kubectl)
    waiting = {"jobDeploymentStatus": "Initializing"}
    failed = {
        "jobDeploymentStatus": "Failed",
        "jobStatus": "FAILED",
        "message": "Job entrypoint command failed with exit code 3, last available logs",
    }
    answers(kubectl, waiting, {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, failed)
    said: list[str] = []
    assert kuberay.launch(found, section, said.append) == 3
    assert [each["kind"] for each in yaml.safe_load_all((kubectl / "applied").read_text())] == ["ConfigMap", "RayJob"]
    assert "".join(capfd.readouterr().out) == "step 1\nstep 2\nstep 3\n"
    assert any("Initializing" in line for line in said)
    assert task.exit_code(found.path) == 3


def test_a_success_is_0(kubectl):
    found, section = launched(kubectl)
    answers(kubectl, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})
    assert kuberay.launch(found, section, print) == 0


def test_pods_that_do_not_come_are_named_with_their_reason(kubectl):
    found, section = launched(kubectl, "cluster.wait_s=0.2")
    answers(kubectl, {"jobDeploymentStatus": "Initializing"})
    pending = {
        "metadata": {"name": "worker-0"},
        "status": {
            "phase": "Pending",
            "conditions": [{"status": "False", "message": "0/3 nodes: Insufficient nvidia.com/gpu"}],
        },
    }
    (kubectl / "pods").write_text(json.dumps({"items": [pending]}))
    told = r"worker-0 Pending \(0/3 nodes: Insufficient nvidia.com/gpu\).*starts when it can; rlprm stop prime_.* deletes it"
    with pytest.raises(WorkerLost, match=told):
        kuberay.launch(found, section, print)
    assert task.exit_code(found.path) is None  # it may still come


@pytest.mark.parametrize(
    ("status", "state", "code"),
    [
        (None, "lost", None),
        ("silent", "unknown", None),
        ({}, "waiting", None),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, "running", None),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "ended", 0),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}, "ended", 1),
    ],
)
def test_status(kubectl, status, state, code):
    found, section = launched(kubectl)
    answers(kubectl, status)
    now = kuberay.status(found, section)
    assert (now.state, now.exit_code) == (state, code)
    assert task.exit_code(found.path) == code  # the cluster forgets its jobs


def test_stop_asks_the_head_and_then_deletes(kubectl):
    found, _ = launched(kubectl)
    ended = {"jobDeploymentStatus": "Failed", "message": "failed with exit code 7"}
    answers(kubectl, {"jobDeploymentStatus": "Running"}, ended)
    (kubectl / "pods").write_text("head-pod")
    kuberay.stop(found)
    made = calls(kubectl)
    touched = next(call for call in made if "exec" in call)
    assert touched[-2:] == ["touch", f"{found.folder}/stop"]
    assert "head-pod" in touched
    assert "delete" in made[-1]
    assert task.exit_code(found.path) == 7


def test_stop_without_a_head_deletes_at_once(kubectl):
    found, _ = launched(kubectl)
    answers(kubectl, {"jobDeploymentStatus": "Initializing"})
    (kubectl / "pods").write_text("")
    kuberay.stop(found)
    assert not any("exec" in call for call in calls(kubectl))
    assert "delete" in calls(kubectl)[-1]
    assert task.exit_code(found.path) == 130


def test_logs_are_kubectls(kubectl):
    found, _ = launched(kubectl)
    assert "".join(kuberay.logs(found, False)) == "step 1\nstep 2\n"


def test_a_stop_without_an_answer_deletes_nothing(kubectl, monkeypatch):
    found, _ = launched(kubectl)
    (kubectl / "pods").unlink()  # so that the script fails
    with pytest.raises(WorkerLost, match=r"was not asked to end .* it goes on: rlprm stop"):
        kuberay.stop(found)
    assert not any("delete" in call for call in calls(kubectl))
    assert task.exit_code(found.path) is None


def test_a_silence_is_waited_out(kubectl, capfd):
    found, section = launched(kubectl)
    running, succeeded = (
        {"jobDeploymentStatus": "Running"},
        {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"},
    )
    answers(kubectl, "silent", "silent", running, "silent", succeeded)
    said: list[str] = []
    assert kuberay.launch(found, section, said.append) == 0
    assert [line for line in said if "i/o timeout" in line] == [
        "kubectl get failed: Unable to connect to the server: i/o timeout; it is asked again for 300 s, and the job goes on"
    ] * 2
    assert capfd.readouterr().out == "step 1\nstep 2\nstep 3\n"


def test_a_long_silence_ends_the_launcher_and_not_the_job(kubectl, monkeypatch):
    monkeypatch.setattr(kuberay, "SILENT_S", 0.1)
    found, _ = launched(kubectl)
    answers(kubectl, "silent")
    with pytest.raises(WorkerLost, match=r"no answer about RayJob default/prime.* It may go on: rlprm status prime_"):
        attached(found, read_cluster(found.path))
    assert task.exit_code(found.path) is None
    assert Launch(task=found, since=0.0).status().state == "unknown"
    answers(kubectl, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})
    assert Launch(task=found, since=0.0).status().exit_code == 0
    assert calls(kubectl)[-1][2:5] == ["delete", "configmap", job_name(found.id)]
    count = len(calls(kubectl))
    assert Launch(task=found, since=0.0).status().exit_code == 0  # whatever the cluster still knows
    assert len(calls(kubectl)) == count


@pytest.mark.parametrize("cut", [0, 45, 60])
def test_a_log_that_breaks_goes_on_where_it_broke(kubectl, cut):
    found, section = launched(kubectl)
    (kubectl / "cut").write_text(str(cut))
    log = Log(section, job_name(found.id), print)
    (kubectl / "calls").touch()
    assert "".join(log.pieces(lambda: len(calls(kubectl)) > 2)) == "step 1\nstep 2\nstep 3\n"
    assert ["-f" in call for call in calls(kubectl)] == [True, True, True, False]
    assert "--since-time=2026-01-02T03:04:07Z" in calls(kubectl)[-1]


def test_a_log_that_cannot_be_read_says_so_once(kubectl):
    found, section = launched(kubectl)
    (kubectl / "code").write_text("1")
    said: list[str] = []
    (kubectl / "calls").touch()
    list(Log(section, job_name(found.id), said.append).pieces(lambda: len(calls(kubectl)) > 2))
    assert said == ["kubectl logs failed (exit code 1); it is tried again while the job runs"]


def test_a_deleted_job_is_lost_unless_it_was_stopped(kubectl):
    found, section = launched(kubectl)
    answers(kubectl, None)
    with pytest.raises(WorkerLost, match="was deleted before it ended"):
        kuberay.launch(found, section, print)
    task.put(found.path, task.EXIT, "130\n")
    assert kuberay.launch(found, section, print) == 130


def test_a_refused_manifest_says_so_and_leaves_nothing(kubectl):
    found, section = launched(kubectl)
    (kubectl / "code").write_text("1")
    answers(kubectl, None)
    with pytest.raises(ConfigError, match="kubectl apply failed"):
        kuberay.check(found, section)
    with pytest.raises(ConfigError, match="kubectl apply failed"):
        attached(found, read_cluster(found.path))
    assert calls(kubectl)[-1][2:4] == ["delete", "configmap"]
    assert task.exit_code(found.path) == 1


def test_a_manifest_that_may_have_arrived_is_not_called_refused(kubectl):
    found, _ = launched(kubectl)
    (kubectl / "code").write_text("1")
    answers(kubectl, "silent")
    with pytest.raises(WorkerLost, match=r"it is not known whether RayJob .* was made .* rlprm stop"):
        attached(found, read_cluster(found.path))
    assert task.exit_code(found.path) is None
    answers(kubectl, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})
    assert attached(found, read_cluster(found.path)) == 0


def test_without_kubectl_the_way_out_is_named(kubectl, monkeypatch):
    found, section = launched(kubectl)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="--dry-run"):
        kuberay.submit(found, section, print)
    with pytest.raises(ConfigError, match="--dry-run"):
        kuberay.check(found, section)
    assert kuberay.status(found, section).state == "unknown"
    with pytest.raises(ConfigError, match="kubectl is not on PATH"):
        list(kuberay.logs(found, False))


def test_what_is_wrong_with_a_manifest_is_known_before_anything_is_written(kubectl):
    with pytest.raises(ConfigError, match=r"cluster.claim is null"):
        kuberay.check(TASK, cluster("cluster.claim=null"))
    assert not (kubectl / "calls").exists()
    kuberay.check(TASK, cluster())
    (call,) = calls(kubectl)
    assert "--dry-run=server" in call
