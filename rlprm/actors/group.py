"""A group of ranks as one callable thing: scatter shards, gather answers, name who failed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rlprm.actors import places
from rlprm.actors.network import use_own_interface
from rlprm.errors import RlprmError, WorkerLost

FOLDER = "RLPRM_FOLDER"  # where relative paths begin, for processes that Ray starts somewhere else


def settle(log_file: str) -> None:
    """First thing in every actor: its output goes to its log, relative paths begin where they do for the driver, and
    its sockets open on the address that the other nodes know."""
    redirect_output(log_file)
    folder = os.environ.get(FOLDER)
    if folder and os.path.isdir(folder):
        os.chdir(folder)
    use_own_interface()


def redirect_output(log_file: str) -> None:
    """Send this process's stdout and stderr, also those of native libraries, to ``log_file``."""
    Path(log_file).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def answer(references: Any, *, what: str, timeout_s: float, logs: str = "") -> Any:
    """``ray.get`` with a deadline; every failure says what was asked, of whom, and where its log is.

    Raises:
        WorkerLost: the actor died, became unreachable or did not answer within ``timeout_s`` seconds.
        RlprmError: whatever the actor itself raised on purpose.
    """
    hint = f"; its output is in {logs}" if logs else ""
    try:
        return ray.get(references, timeout=timeout_s)
    except GetTimeoutError as error:
        raise WorkerLost(
            f"{what} did not answer within {timeout_s:.0f} s; raise placement.stage_timeout_s if it was "
            f"still working{places.who_is_lost(references, wait_s=0.0)}{hint}"
        ) from error
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RlprmError):
            raise cause from None
        if isinstance(cause, RayActorError):
            raise WorkerLost(f"{what}: a process it depends on is gone ({_gone(cause)}){hint}") from error
        wait_s = places.NOTICE_S if places.looks_broken(cause) else 0.0
        lost = places.who_is_lost(references, wait_s=wait_s)
        raise WorkerLost(f"{what} failed: {type(cause).__name__}: {cause}{lost}{hint}") from error
    except RayActorError as error:
        raise WorkerLost(f"{what}: {_gone(error)}{hint}") from error
    except RayError as error:  # a value that was lost with its node, an actor whose node is gone before it started
        lost = places.who_is_lost(references, wait_s=places.NOTICE_S)
        raise WorkerLost(f"{what}: {_last_line(error)}{lost}{hint}") from error


def _gone(error: RayActorError) -> str:
    who = places.described(error)
    return f"{who}: {_death(error)}" if who else _death(error)


def _death(error: RayActorError) -> str:
    """Why an actor is gone, without Ray's traceback: the last line says it."""
    started = "creation task" in str(error)
    return f"{'it could not start' if started else 'its process died or cannot be reached'}: {_last_line(error)}"


def _last_line(error: RayError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class WorkerGroup:
    """Ranks of one learner. Shard ``i`` belongs to rank ``i % world_size``."""

    def __init__(self, name: str, workers: Sequence[Any], *, timeout_s: float, logs: str) -> None:
        self.name = name
        self.workers = tuple(workers)
        self._timeout_s = timeout_s
        self._logs = logs

    def all(self, method: Callable[[Any], Any], *arguments: Any) -> list[Any]:
        """Call every rank with the same arguments; references, in rank order."""
        return [method(worker).remote(*arguments) for worker in self.workers]

    def shards(
        self, method: Callable[[Any], Any], columns: Sequence[Sequence[Any]], *common: Any
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Call every rank with its shards' entries of each column.

        A rank's method returns one value per shard and then one summary. Returns references (per shard, per rank);
        nothing is waited for.
        """
        size = len(self.workers)
        count = len(columns[0])
        per_shard: list[Any] = [None] * count
        summaries = []
        for rank, worker in enumerate(self.workers):
            mine = range(rank, count, size)
            parts = [[column[index] for index in mine] for column in columns]
            references = method(worker).options(num_returns=len(mine) + 1).remote(*parts, *common)
            *values, summary = references if len(mine) else [references]
            for index, value in zip(mine, values, strict=True):
                per_shard[index] = value
            summaries.append(summary)
        return tuple(per_shard), tuple(summaries)

    def get(self, references: Any, what: str) -> Any:
        """Wait for answers of this group; see :func:`answer`."""
        return answer(references, what=f"{self.name} ({what})", timeout_s=self._timeout_s, logs=self._logs)


def resources(*, cpus: float, gpus: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """Ray options of an actor: what it reserves and the environment it starts with."""
    return {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "max_restarts": 0,  # a restarted rank would hold fresh weights; recovery is the checkpoint
        "runtime_env": {"env_vars": dict(environment)},
    }
