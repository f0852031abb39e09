"""The rollout engines that are there: some may be lost during a run, and others take their numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlprm.actors.group import answer
from rlprm.errors import RlprmError, WorkerLost

MAX_TRIES = 3  # of a request: on engines that died with it, or that gave it up; and of a publish

# The process, its node, or what it had left there is gone. Not what the process raised itself.
LOST = (
    RayActorError,
    NodeDiedError,
    WorkerCrashedError,
    OutOfMemoryError,  # Ray's memory monitor has killed it
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    ObjectLostError,
)


def gone(error: RayError) -> bool:
    """Does ``error`` say that an engine, or what it answered, is gone, and not that it failed at its work?"""
    return isinstance(error.cause if isinstance(error, RayTaskError) else error, LOST)


def reason(error: BaseException) -> str:
    """The last line of Ray's message, which says why; its report of an actor is long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = (lines or [type(error).__name__])[-1]
    return words.partition(" Some common causes include")[0]


def raised(error: RayError, what: str) -> Exception:
    """What to raise where ``error`` is no loss: the engine's own error, or a sentence that names it."""
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, RlprmError):
            return error.cause
        return WorkerLost(f"{what} failed: {type(error.cause).__name__}: {error.cause}")
    return WorkerLost(f"{what}: {reason(error)}")


class Roster:
    """An actor that knows which engines are there, for processes that use them while they score.

    The driver tells it of every change before it goes on, so nobody is handed an engine that was dropped or that has
    not got its weights. It has to live on the driver's node, with which alone it is lost.
    """

    def __init__(self) -> None:
        self._engines: dict[int, Any] = {}
        self._resampled = 0

    def put(self, engines: dict[int, Any]) -> None:
        self._engines = dict(engines)

    def current(self) -> dict[int, Any]:
        return dict(self._engines)

    def lost(self, number: int, requests: int) -> None:
        """Somebody found engine ``number`` gone, with so many requests; nobody else need try it."""
        self._engines.pop(number, None)
        self._resampled += requests

    def take_resampled(self) -> int:
        count, self._resampled = self._resampled, 0
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """A replacement that has been started and does not answer yet."""

    handle: Any
    ready: Any
    since: float


class Engines:
    """The live set, on the driver's side: number -> handle. Iterating gives the handles that are there.

    ``restart`` starts engine number i anew where there is room and returns its handle at once, or None: no room now.
    ``least``: fewest to go on with; None: all.
    """

    def __init__(
        self,
        handles: Sequence[Any],
        *,
        restart: Callable[[int], Any] | None,
        least: int | None,
        logs: str,
        start_timeout_s: float,
        timeout_s: float,
    ) -> None:
        self._present = dict(enumerate(handles))
        self._size = len(handles)
        self._restart = restart
        self.least = least
        self._logs = logs
        self._start_timeout_s = start_timeout_s
        self._timeout_s = timeout_s
        self._loading: dict[int, Loading] = {}
        self._places = {number: handle.place.remote() for number, handle in self._present.items()}
        self._roster: Any = None
        self._counts = {"lost": 0, "joined": 0, "failed": 0}
        self.say: Callable[[str], None] = lambda words: None  # a line for the screen

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self.present().values()))

    def __len__(self) -> int:
        return len(self._present)

    def present(self) -> dict[int, Any]:
        """The engines that are there, by number."""
        return dict(sorted(self._present.items()))

    def name(self, number: int) -> str:
        """The engine, its node and its log, for a reader who looks for it."""
        try:
            place = f" on {ray.get(self._places[number], timeout=0.0)}"
        except (RayError, KeyError):  # it was gone before it could tell
            place = ""
        return f"rollout engine {number}{place} (log: {self.log(number)})"

    def log(self, number: int) -> str:
        return f"{self._logs}/rollout{number}.log" if self._logs else f"rollout{number}.log"

    def lose(self, number: int, error: BaseException | str) -> None:
        """Engine ``number`` is gone: go on without it.

        Raises:
            WorkerLost: too few are left.
        """
        handle = self._present.pop(number)
        self._counts["lost"] += 1
        _end(handle)  # if it lives and only could not be reached, it must not come back with old weights
        self._tell_roster()
        what = f"{self.name(number)} is gone: {error if isinstance(error, str) else reason(error)}"
        needed = self._size if self.least is None else self.least
        left = len(self._present)
        if left < max(needed, 1):
            rule = (
                f"all {self._size} of placement.engines are needed"
                if self.least is None
                else f"recovery.min_engines asks for {self.least}"
            )
            raise WorkerLost(
                f"{what}. {left} of {self._size} rollout engines are left, and {rule}. The same command continues a "
                "training run from its last checkpoint (resume=auto); recovery=elastic lets it go on with fewer"
            )
        self.say(f"{what}; going on with {left} of {self._size} rollout engines")

    def renew(self) -> None:
        """Take in replacements that have become ready, and start one for each engine that is missing.

        To be called when a publish begins, so that whoever joins gets the weights before it samples. Waits for nobody.
        """
        for number, loading in sorted(self._loading.items()):
            self._look_at(number, loading)
        if self._restart is not None:
            for number in range(self._size):
                if number not in self._present and number not in self._loading:
                    self._start(number)
        self._tell_roster()

    def _look_at(self, number: int, loading: Loading) -> None:
        waited = time.monotonic() - loading.since
        try:
            ray.get(loading.ready, timeout=0.0)
        except GetTimeoutError:
            if waited < self._start_timeout_s:
                return
            self._give_up(number, f"not ready after {waited:.0f} s (placement.start_timeout_s)")
        except RayError as error:
            self._give_up(number, reason(error))
        else:
            self._present[number] = self._loading.pop(number).handle
            self._counts["joined"] += 1
            self.say(f"{self.name(number)} joined: {len(self)} of {self._size} rollout engines")

    def _give_up(self, number: int, why: str) -> None:
        _end(self._loading.pop(number).handle)
        self._counts["failed"] += 1
        self.say(f"a replacement did not start: {self.name(number)}: {why}")

    def _start(self, number: int) -> None:
        assert self._restart is not None
        handle = self._restart(number)
        if handle is not None:
            self._loading[number] = Loading(handle=handle, ready=handle.ready.remote(), since=time.monotonic())
            self._places[number] = handle.place.remote()

    def answers(self, references: Mapping[int, Any], *, what: str) -> dict[int, Any]:
        """What the engines that were asked answer, by number; who is gone meanwhile is dropped.

        Raises:
            WorkerLost: an engine failed or did not answer in time, or too few are left.
            RlprmError: whatever an engine raised on purpose.
        """
        found: dict[int, Any] = {}
        deadline = time.monotonic() + self._timeout_s
        for number, reference in references.items():
            try:
                found[number] = ray.get(reference, timeout=max(deadline - time.monotonic(), 0.0))
            except GetTimeoutError:
                raise WorkerLost(
                    f"{self.name(number)} did not answer within {self._timeout_s:.0f} s ({what}); raise "
                    "placement.stage_timeout_s if it was still working"
                ) from None
            except RayError as error:
                # an engine that could not get its arguments lives: what is gone is the sender's
                if isinstance(error, RayTaskError) or not gone(error):
                    raise raised(error, f"{self.name(number)} ({what})") from error
                self.lose(number, error)
        return found

    def roster(self) -> Any:
        """The actor that tells other processes which engines are there; started when it is first asked for."""
        if self._roster is None:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            self._roster = ray.remote(Roster).options(num_cpus=0, scheduling_strategy=here).remote()
            self._tell_roster()
        return self._roster

    def _tell_roster(self) -> None:
        if self._roster is not None:
            self._ask_roster(self._roster.put.remote(self.present()))

    def _ask_roster(self, reference: Any) -> Any:
        return answer(reference, what="the roster of rollout engines", timeout_s=self._timeout_s)

    def take_metrics(self) -> dict[str, float]:
        """Engines there now, and what has happened since the last call."""
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        asked = 0 if self._roster is None else self._ask_roster(self._roster.take_resampled.remote())
        return {
            "rollout/engines": float(len(self)),
            "rollout/engines_lost": float(counts["lost"]),
            "rollout/engines_joined": float(counts["joined"]),
            "rollout/engines_failed": float(counts["failed"]),
            "rollout/resampled_for_sources": float(asked),
        }

    def drop_helpers(self) -> None:
        """End the roster, and replacements that are not ready: nobody waits for them. The engines stay."""
        for loading in self._loading.values():
            _end(loading.handle)
        self._loading = {}
        if self._roster is not None:
            _end(self._roster)
            self._roster = None


def _end(handle: Any) -> None:
    ray.kill(handle)
