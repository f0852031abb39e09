"""``cluster=existing``: a job in a Ray cluster that runs already, through the jobs API of its dashboard.

The job is the launch's head, without a Ray of its own. What it writes stays on the cluster; this machine keeps a folder
of the same name, so that ``rlprm status``, ``logs`` and ``stop`` find the job again. Secrets are not handed on: the jobs
API shows a job's variables to whoever may look at the cluster.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import rlprm
from rlprm.config_cluster import ExistingCluster
from rlprm.errors import ConfigError, WorkerLost
from rlprm.launch import joined, launcher
from rlprm.launch.backends import Say, Status
from rlprm.launch.processes import GRACE_S, INTERRUPTED, Wishes
from rlprm.launch.task import EXIT, STOP, Task, exit_code, put

if TYPE_CHECKING:
    from rlprm.actors.jobs import Jobs, JobState

CHECKOUT = Path(rlprm.__file__).resolve().parents[1]
# Environments, results and history stay here; Ray leaves out what .gitignore names as well.
EXCLUDES = (".git", ".venv", "runs", "outputs", "**/__pycache__", "tests")
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STOPPING_S = GRACE_S + 120.0  # a run that was asked to end has saved and ended within this, or its job is stopped
SILENT_S = 300.0  # longest silence of the dashboard while the job is watched
LOOK_S = 0.3


def dry_run(task: Task, cluster: ExistingCluster) -> str:
    """The job as it would be submitted."""
    refuse(task, cluster)
    lines = [f"address: {cluster.address}", f"submission id: {_name(task)}", f"entrypoint: {entrypoint(task, cluster)}"]
    if cluster.upload:
        lines.append(f"working_dir: {CHECKOUT} without {', '.join(EXCLUDES)}")
    lines += [f"env_vars: {name}={shlex.quote(value)}" for name, value in variables(task, cluster).items()]
    return "\n".join([*lines, f"the job then runs: {shlex.join(['rlprm', *task.command])}"])


def submit(task: Task, cluster: ExistingCluster, say: Say) -> None:
    """Submit the job and return.

    Raises:
        ConfigError: nothing answers at the address, it refuses the job, or the job would show a secret.
        WorkerLost: no answer any more; the job may have been accepted.
    """
    from rlprm.actors.jobs import Unreachable

    refuse(task, cluster)
    jobs = _jobs(cluster)
    put(task.path, launcher.SUBMITTED, "")  # from here on the job may exist, whatever is answered
    try:
        jobs.submit(
            _name(task),
            entrypoint(task, cluster),
            environment=variables(task, cluster),
            directory=str(CHECKOUT) if cluster.upload else None,
            excludes=EXCLUDES,
        )
    except ConfigError:
        (task.path / launcher.SUBMITTED).unlink()
        raise
    except Unreachable as error:
        raise WorkerLost(
            f"{error}, so it is not known whether the job was accepted; rlprm status {task.id} asks again"
        ) from error
    say(f"Ray job {_name(task)} is submitted to {cluster.address}")


def launch(task: Task, cluster: ExistingCluster, say: Say) -> int:
    """Submit, print what the job prints; the run's exit code.

    The first Ctrl-C lets the run finish its step, save and end, the second stops its job.

    Raises:
        ConfigError: as :func:`submit`.
        WorkerLost: the job is gone, or the dashboard gives no answer any more.
    """
    submit(task, cluster, say)
    wishes = Wishes()
    wishes.on_signals()
    watched = Watched(task, cluster, say, wishes)
    for text in watched.pieces():
        sys.stdout.write(text)
        sys.stdout.flush()
    return watched.code()


def status(task: Task, cluster: ExistingCluster) -> Status:
    """What the cluster says."""
    from rlprm.actors.jobs import Unreachable

    written = exit_code(task.folder)
    if written is not None:
        return Status(state="ended", detail=f"Ray job {_name(task)}", exit_code=written)
    try:
        found = _jobs(cluster).look(_name(task))
    except (ConfigError, Unreachable) as error:
        return Status(state="unknown", detail=str(error), exit_code=None)
    if not found.state:
        return Status(state="lost", detail=f"{cluster.address} knows no job {_name(task)}", exit_code=None)
    detail = f"Ray job {_name(task)}: {found.state}"
    if found.state in ENDED:
        return Status(state="ended", detail=detail, exit_code=_keep(task, found))
    return Status(state="waiting" if found.state == "PENDING" else "running", detail=detail, exit_code=None)


def logs(task: Task, follow: bool) -> Iterator[str]:
    """What the job has printed; with ``follow`` until it has ended."""
    cluster = launcher.read_cluster(task.path)
    if not follow:
        return iter([_jobs(cluster).text(_name(task))])
    return Watched(task, cluster, lambda sentence: None, Wishes()).pieces()


def stop(task: Task) -> None:
    """Let the run finish its step, save and end, and wait for it; a job that does not end is stopped.

    Raises:
        WorkerLost: the dashboard gives no answer, so the job may still run.
    """
    wishes = Wishes()
    wishes.ask(signal.SIGINT, "rlprm stop")
    for _ in Watched(task, launcher.read_cluster(task.path), lambda sentence: None, wishes).pieces():
        pass


class Watched:
    """A job on its way: what it prints, how its state changes, and the wish to end it handed on."""

    def __init__(self, task: Task, cluster: ExistingCluster, say: Say, wishes: Wishes) -> None:
        self._task = task
        self._cluster = cluster
        self._say = say
        self._wishes = wishes
        self._jobs = _jobs(cluster)
        self._found: JobState | None = None
        self._asked: float | None = None
        self._told = ""
        self._printed = 0

    def pieces(self) -> Iterator[str]:
        """What the job prints, until it has ended.

        Raises:
            WorkerLost: the job is gone, or there is no answer any more.
        """
        from rlprm.actors.jobs import Unreachable

        answered = time.monotonic()
        while True:
            try:
                self._found = self._jobs.look(
                    _name(self._task)
                )  # before its text, so that the last of it is not missed
                text = self._jobs.text(_name(self._task))
                answered = time.monotonic()
            except Unreachable as error:
                self._tell(f"{self._cluster.address} does not answer ({error}); it is asked again")
                if time.monotonic() - answered > SILENT_S:
                    raise WorkerLost(
                        f"{self._cluster.address} gives no answer about job {_name(self._task)} for {SILENT_S:.0f} s; it "
                        "may go on: rlprm status"
                    ) from error
            else:
                self._tell(f"Ray job {_name(self._task)}: {self._found.state or 'unknown'}")
                if len(text) > self._printed:
                    yield text[self._printed :]
                    self._printed = len(text)
                if self._found.state in (*ENDED, ""):
                    return
            self._pause()

    def code(self) -> int:
        """The run's exit code.

        Raises:
            WorkerLost: the cluster does not know the job any more.
        """
        if self._found is None or not self._found.state:
            raise WorkerLost(
                f"{self._cluster.address} knows no job {_name(self._task)} any more; was Ray started anew? The same command "
                "continues from the last checkpoint"
            )
        return _keep(self._task, self._found)

    def _tell(self, sentence: str) -> None:
        if sentence != self._told:
            self._say(sentence)
            self._told = sentence

    def _pause(self) -> None:
        """Until the next look, which comes at once when somebody wants the run to end."""
        until = time.monotonic() + self._cluster.poll_s
        while (now := time.monotonic()) < until:
            if self._wishes.asked is not None and self._asked is None:
                self._tell("the run is asked to finish its step and save; Ctrl-C again stops its job")
                self._asked = now
                _ask_to_end(self._jobs, self._task, self._cluster)
            elif self._asked is not None and (self._wishes.hard or now - self._asked > STOPPING_S):
                self._tell(f"Ray job {_name(self._task)} is stopped")
                _end(self._jobs, self._task)
                self._asked = now  # Ray needs some seconds
                self._wishes.hard = False
            time.sleep(LOOK_S)


def refuse(task: Task, cluster: ExistingCluster) -> None:
    """Refuse what cannot work or would be seen.

    Raises:
        ConfigError: a secret, or no checkout to send.
    """
    if task.secrets:
        raise ConfigError(
            f"cluster.secrets={list(task.secrets)}: a Ray cluster shows a job's variables to whoever may look at it, so secrets "
            "cannot be handed on to one; set them in the environment of the cluster's nodes, and cluster.secrets=[]"
        )
    if not cluster.upload:
        return
    if not (CHECKOUT / "pyproject.toml").is_file():
        raise ConfigError(
            f"cluster.upload=true sends this checkout, and {CHECKOUT} is none; install rlprm on the cluster and set "
            "cluster.upload=false"
        )
    if Path(task.run).is_relative_to(task.directory) and task.command[0] != "evaluate":
        raise ConfigError(
            f"{os.path.relpath(task.run, task.directory)} would be written where Ray unpacks the checkout, and be gone with "
            "it; give an absolute path on the cluster's storage (output_dir, for sft, dpo and prm output)"
        )


def entrypoint(task: Task, cluster: ExistingCluster) -> str:
    """The shell line that Ray runs on its head."""
    return shlex.join([cluster.python or "python", "-m", "rlprm.launch.joined", task.folder])


def variables(task: Task, cluster: ExistingCluster) -> dict[str, str]:
    """The job's environment."""
    # sent along, the command runs where Ray unpacks it, which only Ray knows, as it does its interpreter
    directory = cluster.directory or ("" if cluster.upload else task.directory)
    there = replace(task, directory=directory, python=cluster.python or "")
    return {**task.environment, joined.VARIABLE: joined.carried(there)}


def _jobs(cluster: ExistingCluster) -> Jobs:
    from rlprm.actors.jobs import Jobs as Client  # late: brings Ray along

    return Client(cluster.address)


def _name(task: Task) -> str:
    return f"rlprm-{task.id}"


def _ask_to_end(jobs: Jobs, task: Task, cluster: ExistingCluster) -> None:
    """Make the stop file where the head looks for it: on the cluster, by a job of its own.

    Ray's own way to stop a job gives it three seconds, which is too short to finish a step and save.
    """
    program = f"open({os.path.join(task.folder, STOP)!r}, 'w')"
    try:
        jobs.submit(
            f"{_name(task)}-stop-{os.getpid()}", shlex.join([cluster.python or "python", "-c", program]), environment={}
        )
    except ConfigError as error:
        raise WorkerLost(f"job {_name(task)} was not asked to end: {error}") from error


def _end(jobs: Jobs, task: Task) -> None:
    from rlprm.actors.jobs import Unreachable

    try:
        jobs.stop(_name(task))
    except Unreachable as error:
        raise WorkerLost(f"job {_name(task)} was not stopped ({error}); it may still run") from error


def _keep(task: Task, found: JobState) -> int:
    """The exit code, written down here: the cluster forgets its jobs when it ends."""
    code = {"SUCCEEDED": 0, "STOPPED": INTERRUPTED}.get(found.state, found.code or 1)
    put(task.path, EXIT, f"{code}\n")
    return code
