"""This machine. A task of several nodes gets as many Ray nodes, all on the loopback address."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack

from rlprm.config_cluster import LocalCluster
from rlprm.errors import ConfigError
from rlprm.launch import launcher, task
from rlprm.launch.backends import Say, Status
from rlprm.launch.node import LOOPBACK
from rlprm.launch.processes import GRACE_S, KILL_S, Wishes, adopt_orphans, asked, bound, end, start, sweep, wait
from rlprm.launch.task import Task

LEAVE_S = 30.0  # for the other nodes once the run has ended
# The head ends its own programs in time; this is for one that hangs.
HEAD_GRACE_S, HEAD_KILL_S = GRACE_S + 60.0, KILL_S + 60.0


def dry_run(found: Task, cluster: LocalCluster) -> str:
    """The programs that would run, and their variables."""
    lines = [f"folder: {found.folder}", f"directory: {found.directory}", *variables(found), ""]
    lines += [shlex.join(program) for program in [_head(found), *_workers(found)]]
    lines += ["", f"the head then runs: {shlex.join(['rlprm', *found.command])}"]
    return "\n".join(lines)


def check(found: Task, cluster: LocalCluster) -> None:
    """Can the programs be started?

    Raises:
        ConfigError: there is no such folder or interpreter.
    """
    if not os.path.isdir(found.directory):
        raise ConfigError(
            f"cluster.directory is {found.directory}, which is no folder; expected where the run shall start"
        )
    if shutil.which(os.path.join(found.directory, found.python) if os.sep in found.python else found.python) is None:
        raise ConfigError(f"cluster.python is {found.python}, which cannot be run; expected the Python that has rlprm")


def launch(found: Task, cluster: LocalCluster, say: Say) -> int:
    """Head and workers as children of this process; the run's exit code.

    The first Ctrl-C lets the run finish its step and save, the second ends it at once.

    Raises:
        ConfigError: they cannot be started.
    """
    wishes = Wishes(folder=None)  # the head looks at the stop file itself
    wishes.on_signals()
    adopt_orphans()
    environment = bound({**os.environ, "RAY_AUTH_TOKEN": task.token(found.path)})
    try:
        with ExitStack() as stack:
            say(f"{found.id}, {found.nodes} node{'s' if found.nodes > 1 else ''} on this machine")
            head = start(_head(found), environment=environment, directory=found.directory, output=None)
            stack.callback(end, head, LEAVE_S)
            workers = {}
            for name, program in zip(found.names[1:], _workers(found), strict=True):
                with (found.path / f"worker-{name}.log").open("ab") as log:
                    workers[name] = start(program, environment=environment, directory=found.directory, output=log)
            gone: set[str] = set()

            def look() -> None:
                for name, worker in workers.items():
                    if worker.poll() is not None and name not in gone:
                        gone.add(name)
                        say(f"node {name} has ended; see {found.path / f'worker-{name}.log'}")

            code = wait(
                head,
                wishes,
                say=say,
                name="the launch",
                asking=asked(found.command[0]),
                by=None,
                grace_s=HEAD_GRACE_S,
                kill_s=HEAD_KILL_S,
                also=look,
            )
            leave(list(workers.values()))
    except OSError as error:
        raise ConfigError(
            f"{found.python} cannot be started in {found.directory} ({error}); see cluster.python and cluster.directory"
        ) from error
    finally:
        sweep()
    written = task.exit_code(found.path)
    if written is None:  # killed before it could write one
        task.put(found.path, task.EXIT, f"{code}\n")
    return code


def status(found: Task, cluster: LocalCluster) -> Status:
    """How it stands."""
    return launcher.status(found)


def logs(found: Task, follow: bool) -> Iterator[str]:
    """What the run has printed."""
    return launcher.logs(found, follow)


def stop(found: Task) -> None:
    """End the run."""
    launcher.stop(found)


def variables(found: Task) -> list[str]:
    """What every node's environment has besides, secrets by name only."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in found.environment.items()]
    lines += [
        f"export {name}  # secret, handed on from here" + ("" if name in os.environ else " (not set here)")
        for name in found.secrets
    ]
    return [*lines, "export RAY_AUTH_TOKEN  # secret, drawn for this launch"]


def leave(workers: list[subprocess.Popen[bytes]]) -> None:
    """Wait for the other nodes, which leave when the run has ended; what does not is ended."""
    deadline = time.monotonic() + LEAVE_S
    for worker in workers:
        try:
            worker.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            end(worker, 5.0)


def _head(found: Task) -> list[str]:
    return [
        found.python, "-m", "rlprm.launch.head", found.folder, "--name", found.names[0], "--ip", LOOPBACK,
    ]  # fmt: skip


def _workers(found: Task) -> list[list[str]]:
    return [
        [found.python, "-m", "rlprm.launch.worker", found.folder, "--name", name, "--ip", LOOPBACK]
        for name in found.names[1:]
    ]
