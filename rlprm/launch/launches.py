"""The launches below a folder of runs: which there are, how they stand, and which one is meant."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rlprm.errors import ConfigError
from rlprm.launch import launcher, task
from rlprm.launch.backends import OCCUPIED, Status, backend, forgets
from rlprm.launch.task import Task

PUT_BACK = ("slurm",)  # jobs that may start again after they have left an exit code: the cluster is asked first


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch and the time it was made."""

    task: Task
    since: float

    def status(self) -> Status:
        """How it stands; one that has ended is tidied up."""
        now = self._status()
        if now.state == "ended":
            forgets(backend(self.task.kind))(self.task)
        return now

    def logs(self, follow: bool) -> Iterator[str]:
        """What the run has printed, in pieces; with ``follow`` until it has ended."""
        yield from backend(self.task.kind).logs(self.task, follow)
        if follow:
            self.status()

    def _status(self) -> Status:
        code = None if self.task.kind in PUT_BACK else task.exit_code(self.task.path)
        if code is not None:  # whatever the cluster still knows of it
            return Status(state="ended", detail="succeeded" if code == 0 else f"exit code {code}", exit_code=code)
        return backend(self.task.kind).status(self.task, launcher.read_cluster(self.task.path))


def launches(folder: Path) -> list[Launch]:
    """All launches in ``<output_dir>/launches``, the latest first; what cannot be read is left out."""
    found = []
    for path in folder.glob(f"*/{task.TASK}"):
        with suppress(ConfigError):
            found.append(Launch(task=task.read(path.parent), since=path.stat().st_mtime))
    return sorted(found, key=lambda each: (each.since, each.task.id), reverse=True)


def chosen(folder: Path, wanted: str | None) -> Launch:
    """The launch of this id or unique beginning of one; None: the latest.

    Raises:
        ConfigError: there is none, or there are several.
    """
    every = launches(folder)
    if not every:
        raise ConfigError(f"there is no launch in {folder}; give the output_dir it was launched with (output_dir=...)")
    if wanted is None:
        return every[0]
    ids = [each.task.id for each in every]
    fitting = [each for each in every if each.task.id == wanted] or [
        each for each in every if each.task.id.startswith(wanted)
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ConfigError(f"{wanted!r} begins {len(fitting)} launches: {', '.join(each.task.id for each in fitting)}")
    near = difflib.get_close_matches(wanted, ids, n=1, cutoff=0.3) or ids[:1]
    raise ConfigError(f"there is no launch {wanted!r} in {folder}; nearest is {near[0]!r}")


def running_in(folder: Path, run: str) -> tuple[str, Status] | None:
    """A launch that waits, runs or may run in this run's folder ("": it has none), one above it or one below it."""
    for each in launches(folder):
        if run and each.task.run and _overlap(each.task.run, run):
            now = each.status()
            if now.state in OCCUPIED:
                return each.task.id, now
    return None


def _overlap(one: str, other: str) -> bool:
    shared = os.path.commonpath([os.path.normpath(one), os.path.normpath(other)])
    return shared in (os.path.normpath(one), os.path.normpath(other))


def rows(found: list[Launch]) -> Iterator[dict[str, object]]:
    """What `rlprm status` shows of each."""
    for each in found:
        try:
            now = each.status()
        except ConfigError as error:
            now = Status(state="unknown", detail=str(error), exit_code=None)
        yield {
            "id": each.task.id,
            "kind": each.task.kind,
            "state": now.state,
            "since": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.since)),
            "nodes": each.task.nodes,
            "exit_code": now.exit_code,
            "detail": now.detail,
            "run": each.task.run,
        }
