"""What the launcher itself leaves in the launch folder, and how launches that need a launcher are looked at and ended.

The head and the others run as long as their launcher (`local`, `hosts`), so a launcher that is gone without an exit
code means that the launch is lost.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from pydantic import TypeAdapter

from rlprm.config_cluster import AnyCluster
from rlprm.errors import ConfigError
from rlprm.launch import task
from rlprm.launch.backends import Status
from rlprm.launch.processes import GRACE_S, this_python
from rlprm.launch.streams import follow
from rlprm.launch.task import Task
from rlprm.run.redact import redact

CLUSTER = "cluster.json"  # the section that the launch was made with
LAUNCHER = "launcher.json"  # {"host", "pid", "created"}
SUBMITTED = "submitted"  # by backends whose jobs go on by themselves: from now on there may be one
OWN_LOG = "launcher.log"  # what a launcher in the background says
STOP_S = GRACE_S + 120.0  # for a run that was asked to end
LET_GO_S = 2.0  # between the exit code and the end of the launcher


def write_cluster(found: Task, cluster: Any) -> None:
    """Keep the cluster's section, for `status`, `logs` and `stop` from another shell."""
    task.put(found.path, CLUSTER, json.dumps(redact(cluster.model_dump()), indent=1) + "\n")


def read_cluster(folder: Path) -> Any:
    """The cluster's section of a launch.

    Raises:
        ConfigError: there is none, or another version has written it.
    """
    try:
        values = json.loads((folder / CLUSTER).read_text(encoding="utf-8"))
        return TypeAdapter(AnyCluster).validate_python(values)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / CLUSTER} cannot be read ({error}); it was written by another version") from error


def sign(found: Task) -> None:
    """Write down that this process is the launcher."""
    me = psutil.Process()
    content = {"host": socket.gethostname(), "pid": me.pid, "created": me.create_time()}
    task.put(found.path, LAUNCHER, json.dumps(content) + "\n")


def status(found: Task) -> Status:
    """How a launch stands whose head and workers live with its launcher."""
    code = task.exit_code(found.path)
    if code is not None:
        return Status(state="ended", detail="succeeded" if code == 0 else f"exit code {code}", exit_code=code)
    launcher = _launcher(found)
    if launcher is None:
        return Status(state="lost", detail="it never began", exit_code=None)
    if launcher["host"] == socket.gethostname() and not _alive(launcher):
        return Status(state="lost", detail=f"its launcher (process {launcher['pid']}) is gone", exit_code=None)
    where = f"process {launcher['pid']} on {launcher['host']}"
    if (found.path / task.HEAD).exists():
        return Status(state="running", detail=where, exit_code=None)
    return Status(state="waiting", detail=f"Ray starts; {where}", exit_code=None)


def logs(found: Task, following: bool) -> Iterator[str]:
    """What the run has printed; what its launcher has said, where there was no run."""
    log = found.path / task.LOG
    ended = lambda: not following or status(found).state in ("ended", "lost")  # noqa: E731
    path = log if log.exists() or not (found.path / OWN_LOG).exists() or not ended() else found.path / OWN_LOG
    return follow(path, ended)


def stop(found: Task, say: Callable[[str], None] = print) -> None:
    """Ask the head to end the run, and wait until it has.

    Raises:
        ConfigError: it has not ended in time.
    """
    task.put(found.path, task.STOP, "")
    deadline = time.monotonic() + STOP_S
    while (now := status(found)).state in ("waiting", "running"):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"launch {found.id} has not ended within {STOP_S:.0f} s ({now.detail}); look at "
                f"{found.path / task.LOG}, or end that process"
            )
        time.sleep(0.3)
    # the launcher still puts away what it has started
    deadline = time.monotonic() + LET_GO_S * 10
    while (launcher := _launcher(found)) is not None and launcher["host"] == socket.gethostname():
        if not _alive(launcher) or time.monotonic() > deadline:
            break
        time.sleep(0.2)


def in_background(found: Task, environment: dict[str, str]) -> int:
    """Start a launcher that outlives this shell; its process id.

    Raises:
        ConfigError: it ended at once.
    """
    log = found.path / OWN_LOG
    with log.open("ab") as output:
        process = subprocess.Popen(
            [this_python(), "-m", "rlprm.launch.background", found.folder],
            env=environment,
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + 30.0
    while _launcher(found) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise ConfigError(f"the launcher did not start; see {log}")
        time.sleep(0.1)
    return process.pid


def _launcher(found: Task) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        return dict(json.loads((found.path / LAUNCHER).read_text(encoding="utf-8")))
    return None


def _alive(launcher: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(int(launcher["pid"]))
        # numbers are given again to other processes
        return abs(process.create_time() - float(launcher["created"])) < 1.0 and process.status() != "zombie"
    except psutil.NoSuchProcess:
        return False
