"""A group of ranks as one callable thing: scatter shards, gather answers, name who failed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from rlprm.errors import RlprmError, WorkerLost


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
            f"still working{hint}"
        ) from error
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RlprmError):
            raise cause from None
        if isinstance(cause, (ActorDiedError, ActorUnavailableError)):
            raise WorkerLost(f"{what}: a process it depends on is gone ({cause}){hint}") from error
        raise WorkerLost(f"{what} failed: {type(cause).__name__}: {cause}{hint}") from error
    except RayActorError as error:
        raise WorkerLost(f"{what}: {_death(error)}{hint}") from error


def _death(error: RayActorError) -> str:
    """Why an actor is gone, without Ray's traceback: the last line says it."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    started = any("creation task" in line for line in lines)
    return f"{'it could not start' if started else 'its process died or cannot be reached'}: {lines[-1].strip()}"


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
