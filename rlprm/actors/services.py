"""What a process source may ask of other actors while it scores: engines that continue text, and the run's verifier.

Plain objects with actor handles inside, so that sources themselves know nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlprm.actors.group import answer
from rlprm.roles import Request, Rollout


class EngineService:
    """Generation engines; see :class:`rlprm.sources.base.Engines`."""

    def __init__(self, engines: Sequence[Any], *, timeout_s: float, what: str) -> None:
        self._engines = tuple(engines)
        self._timeout_s = timeout_s
        self._what = what

    def sample(self, requests: Sequence[Request]) -> list[list[Rollout]]:
        """The rollouts of each request, in the order of the requests.

        Raises:
            WorkerLost: an engine died or did not answer in time.
        """
        size = len(self._engines)
        shares = [list(requests[number::size]) for number in range(size)]
        asked = [engine.sample_all.remote(mine) for engine, mine in zip(self._engines, shares, strict=True)]
        answers = answer(asked, what=self._what, timeout_s=self._timeout_s)
        return [answers[index % size][index // size] for index in range(len(requests))]

    def logprobs(self, tokens: Sequence[Sequence[int]], temperature: float) -> list[list[float]]:
        """log mu of each given token after its prefix; the first engine answers."""
        asked = self._engines[0].logprobs.remote([list(each) for each in tokens], temperature)
        return answer(asked, what=self._what, timeout_s=self._timeout_s)


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
