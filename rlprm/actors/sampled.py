"""Groups of rollouts as they finish on the engines that are there; what a lost engine owes is asked of the others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from rlprm.actors.engines import MAX_TRIES, Engines, gone, raised
from rlprm.errors import WorkerLost
from rlprm.roles import Request

BEGUN = "begun"  # the first item of an engine's answer: it works on these requests


@dataclass(slots=True)
class Tally:
    """Counted over several calls."""

    aborted: int = 0  # responses that an engine gave up
    resampled: int = 0  # groups that were asked for again because of a loss

    def take(self) -> tuple[int, int]:
        """Both counts, which begin again at 0."""
        found = self.aborted, self.resampled
        self.aborted = self.resampled = 0
        return found


@dataclass(slots=True)
class Asked:
    """An engine at work: a stream of BEGUN, and then for each group its rollouts and a pair that says whose they are."""

    number: int
    stream: Any
    owed: set[int]
    begun: bool = False
    rollouts: list[Any] = field(default_factory=list)  # a reference whose pair has not come


class Sampled(Iterator[tuple[int, Any]]):
    """(index of the request, reference to its rollouts), each index once, in the order in which groups finish.

    A request keeps its seeds whoever answers it, so a loss changes no sample. Rollouts lie where they were made until
    somebody fetches them; who finds them gone says so with :meth:`again`, and goes on iterating.

    Raises (while iterating):
        WorkerLost: too few engines are left, none finished a group in time, or a request was with every one of
            ``MAX_TRIES`` engines that died.
        RlprmError: whatever an engine raised on purpose.
    """

    def __init__(self, requests: Sequence[Request], engines: Engines, *, tally: Tally, timeout_s: float) -> None:
        self._requests = tuple(requests)
        self._engines = engines
        self._tally = tally
        self._timeout_s = timeout_s
        self._waiting = list(range(len(requests)))
        self._asked: dict[int, Asked] = {}
        self._deaths: Counter[int] = Counter()
        self._lost: Counter[int] = Counter()

    def __next__(self) -> tuple[int, Any]:
        while True:
            self._give()
            if not self._asked:
                raise StopIteration
            found = self._taken(self._ready())
            if found is not None:
                return found

    def again(self, indices: Sequence[int]) -> None:
        """These groups were handed out and are lost: sample them again.

        Raises:
            WorkerLost: one of them was lost ``MAX_TRIES`` times.
        """
        self._lost.update(indices)
        often = [index for index in indices if self._lost[index] >= MAX_TRIES]
        if often:
            raise WorkerLost(
                f"the rollouts of prompt {self._requests[often[0]].prompt.id} were lost {MAX_TRIES} times before they "
                "could be judged; look at the nodes of the rollout engines and at Ray's own logs"
            )
        self._wait_again(indices)

    def _wait_again(self, indices: Sequence[int]) -> None:
        self._tally.resampled += len(indices)
        self._waiting = sorted([*self._waiting, *indices])

    def _give(self) -> None:
        """Deal what waits to engines that rest; those at work get their share of it when they have finished."""
        present = self._engines.present()
        resting = [number for number in present if number not in self._asked]
        if not self._waiting or not resting:
            return
        size = math.ceil(len(self._waiting) * len(resting) / len(present))
        dealt, self._waiting = self._waiting[:size], self._waiting[size:]
        for place, number in enumerate(resting):
            mine = dealt[place :: len(resting)]
            if mine:
                asked = [(index, self._requests[index]) for index in mine]
                stream = present[number].sample.options(num_returns="streaming").remote(asked)
                self._asked[number] = Asked(number=number, stream=stream, owed=set(mine))

    def _ready(self) -> Asked:
        streams = [each.stream for each in self._asked.values()]
        ready, _ = ray.wait(streams, num_returns=1, timeout=self._timeout_s, fetch_local=False)
        if not ready:
            names = ", ".join(self._engines.name(number) for number in self._asked)
            raise WorkerLost(f"none of these finished a group within {self._timeout_s:.0f} s: {names}")
        return next(each for each in self._asked.values() if each.stream is ready[0])

    def _taken(self, asked: Asked) -> tuple[int, Any] | None:
        """The group that the stream's next item completes, if it completes one."""
        try:
            item = next(asked.stream)
            if asked.begun and not asked.rollouts:
                asked.rollouts.append(item)  # not fetched: it may be large
                return None
            small = ray.get(item, timeout=self._timeout_s)
        except StopIteration:
            self._ended(asked)
            return None
        except RayError as error:
            self._failed(asked, error)
            return None
        if not asked.begun:
            asked.begun = True
            return None
        # the pair comes after the rollouts: having it, they have been made
        index, aborted = small
        asked.owed.remove(index)
        self._tally.aborted += aborted
        return index, asked.rollouts.pop()

    def _ended(self, asked: Asked) -> None:
        """The stream is over: everything was answered, or its last item is the error."""
        try:
            for reference in asked.rollouts:
                ray.get(reference, timeout=self._timeout_s)
        except RayError as error:
            self._failed(asked, error)
            return
        if asked.owed:
            name = self._engines.name(asked.number)
            raise WorkerLost(f"{name} left {len(asked.owed)} requests without an answer; see its log")
        del self._asked[asked.number]

    def _failed(self, asked: Asked, error: RayError) -> None:
        if not gone(error):
            raise raised(error, self._engines.name(asked.number)) from error
        del self._asked[asked.number]
        owed = sorted(asked.owed)
        # Else it died before it saw them, and they are not to blame. A death so soon that BEGUN was not sent any more
        # is not counted either; then the number of engines is what bounds the tries.
        if asked.begun:
            self._deaths.update(owed)
        deadly = [index for index in owed if self._deaths[index] >= MAX_TRIES]
        if deadly:
            prompts = ", ".join(self._requests[index].prompt.id for index in deadly[:3])
            raise WorkerLost(
                f"{MAX_TRIES} rollout engines died one after the other while they had the same {len(deadly)} requests "
                f"(prompts {prompts}{', ...' if len(deadly) > 3 else ''}); the last was "
                f"{self._engines.name(asked.number)}. If its log shows no lost node, one of these requests kills the "
                "engine: leave the prompt out, or give the engine more memory"
            ) from error
        self._engines.lose(asked.number, error)
        self._wait_again(owed)
