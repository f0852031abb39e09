"""What a process source may ask of other actors while it scores: engines that continue text, and the run's verifier.

Plain objects with actor handles inside, so that sources themselves know nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from rlprm.actors.engines import MAX_TRIES, Engines, gone, raised, reason
from rlprm.actors.group import answer
from rlprm.errors import WorkerLost
from rlprm.roles import Request, Rollout


class EngineService:
    """Generation engines; see :class:`rlprm.sources.base.Engines`.

    Of a run's :class:`Engines` it asks their roster at every call, so it knows of engines that were lost or joined;
    other handles are used as they are. What an engine owes that is lost meanwhile the others are asked for.
    """

    def __init__(self, engines: Sequence[Any] | Engines, *, timeout_s: float, what: str) -> None:
        self._roster = engines.roster() if isinstance(engines, Engines) else None
        self._fixed = {} if isinstance(engines, Engines) else dict(enumerate(engines))
        self._timeout_s = timeout_s
        self._what = what

    def sample(self, requests: Sequence[Request]) -> list[list[Rollout]]:
        """The rollouts of each request, in the order of the requests.

        Raises:
            WorkerLost: no engine is left, one did not answer in time, or ``MAX_TRIES`` died one after the other.
        """
        found: dict[int, list[Rollout]] = {}
        engines = self._engines()
        waiting = list(range(len(requests)))
        for _ in range(MAX_TRIES):
            shares = {
                number: waiting[place :: len(engines)]
                for place, number in enumerate(engines)
                if waiting[place :: len(engines)]
            }
            asked = {
                number: engines[number].sample_all.remote([requests[index] for index in mine])
                for number, mine in shares.items()
            }
            for number, reference in asked.items():
                answered = self._answer(engines, number, reference, len(shares[number]))
                if answered is not None:
                    found.update(zip(shares[number], answered, strict=True))
            waiting = [index for index in waiting if index not in found]
            if not waiting:
                return [found[index] for index in range(len(requests))]
        raise WorkerLost(
            f"{self._what}: {MAX_TRIES} of them died one after the other with the same requests; if their logs show no "
            "lost node, one of these requests kills the engine"
        )

    def logprobs(self, tokens: Sequence[Sequence[int]], temperature: float) -> list[list[float]]:
        """log mu of each given token after its prefix; the first engine answers."""
        given = [list(each) for each in tokens]
        engines = self._engines()
        while True:
            number = next(iter(engines))
            found = self._answer(engines, number, engines[number].logprobs.remote(given, temperature), 1)
            if found is not None:
                return found

    def _engines(self) -> dict[int, Any]:
        """Those that are there now."""
        if self._roster is None:
            return dict(self._fixed)
        return answer(self._roster.current.remote(), what="the roster of rollout engines", timeout_s=self._timeout_s)

    def _answer(self, engines: dict[int, Any], number: int, reference: Any, requests: int) -> Any:
        """What the engine answers; None: it is gone, and no longer among ``engines``.

        Raises:
            WorkerLost: it failed, did not answer in time, or was the last one.
        """
        try:
            return ray.get(reference, timeout=self._timeout_s)
        except RayError as error:
            if not gone(error):
                raise raised(error, f"{self._what}, number {number}") from error
            del engines[number]
            if self._roster is not None:
                told = self._roster.lost.remote(number, requests)
                answer(told, what="the roster of rollout engines", timeout_s=self._timeout_s)
            if not engines:
                raise WorkerLost(f"{self._what}: the last one, number {number}, is gone: {reason(error)}") from error
            return None


class GraderService:
    """The run's verifier; see :class:`rlprm.sources.base.Grader`."""

    def __init__(self, judges: Sequence[Any], *, timeout_s: float) -> None:
        self._judges = tuple(judges)
        self._timeout_s = timeout_s

    def outcomes(self, groups: Sequence[Sequence[Rollout]]) -> list[list[float | None]]:
        """The outcome of each rollout; None where there is no verdict.

        Raises:
            WorkerLost: a judge died or did not answer in time.
        """
        asked = [
            self._judges[number % len(self._judges)].outcomes.remote(list(group)) for number, group in enumerate(groups)
        ]
        return answer(asked, what="judge", timeout_s=self._timeout_s)
