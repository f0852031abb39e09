"""What every way to launch offers. The backend of a kind of cluster is the module ``rlprm.launch.<kind>``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, runtime_checkable

from rlprm.launch.task import Task

Say = Callable[[str], None]
OCCUPIED = ("waiting", "running", "unknown")  # states in which the run's folder may be written to


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How a launch stands."""

    # lost: gone without an exit code; unknown: its cluster cannot be asked now
    state: Literal["waiting", "running", "ended", "lost", "unknown"]
    detail: str
    exit_code: int | None


@runtime_checkable
class Backend(Protocol):
    """One way to launch. ``cluster`` is its section of ``config_cluster``.

    A backend whose jobs go on without the launcher (a queue, a cluster that runs already) also has
    ``submit(task, cluster, say) -> None``, which returns when the job is accepted; ``--detach`` calls that. The launcher
    of the others goes on in the background. Before it hands anything on, it writes ``launcher.SUBMITTED``: from then on
    a ConfigError means no longer that nothing runs.

    A backend may also have ``check(task, cluster) -> None``, which raises ConfigError for what can be known before
    anything is written, and ``forget(task) -> None``, which removes what only a run needs that has not ended (secrets,
    objects in a cluster); it is called whenever a launch is seen to have ended, so it may find nothing left to do.
    """

    def dry_run(self, task: Task, cluster: Any) -> str:
        """Exactly what would be run or applied, without secrets; nothing is written or started."""

    def launch(self, task: Task, cluster: Any, say: Say) -> int:
        """Start, print what the run prints, and return the run's exit code.

        The first Ctrl-C lets the run finish its step, save and end; the second ends it at once.
        """

    def status(self, task: Task, cluster: Any) -> Status:
        """How it stands, seen from any shell."""

    def logs(self, task: Task, follow: bool) -> Iterator[str]:
        """What the run has printed, in pieces; with ``follow`` until it has ended."""

    def stop(self, task: Task) -> None:
        """Ask the run to end, and wait for it."""


def backend(kind: str) -> Backend:
    """The backend of a kind of cluster.

    >>> backend("local").__name__
    'rlprm.launch.local'
    """
    return cast(Backend, importlib.import_module(f"rlprm.launch.{kind}"))


def submits(chosen: Backend) -> Callable[[Task, Any, Say], None] | None:
    """``submit`` of a backend that has it."""
    return getattr(chosen, "submit", None)


def checks(chosen: Backend) -> Callable[[Task, Any], None]:
    """``check`` of a backend, or nothing to check."""
    return getattr(chosen, "check", lambda task, cluster: None)


def forgets(chosen: Backend) -> Callable[[Task], None]:
    """``forget`` of a backend, or nothing to forget."""
    return getattr(chosen, "forget", lambda task: None)
