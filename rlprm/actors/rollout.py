"""Rollout engines in Ray actors, and the driver's role that spreads requests over them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray

from rlprm.actors.engines import MAX_TRIES, Engines
from rlprm.actors.group import answer, settle
from rlprm.actors.nodes import nodes
from rlprm.actors.sampled import BEGUN, Sampled, Tally
from rlprm.errors import WorkerLost
from rlprm.roles import Generator, Prompt, Request, Rollout


def seed_of(run_seed: int, *parts: object) -> int:
    """A 48-bit seed that depends on every part: no two (step, prompt, sample) share one.

    >>> seed_of(0, 1, "a", 0) != seed_of(0, 1, "a", 1)
    True
    """
    text = repr((run_seed, *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big")


def parts_of(request: Request) -> list[Request]:
    """What an engine is asked for: the request itself, and the greedy response that it may want besides."""
    if not request.with_greedy:
        return [request]
    seed = seed_of(request.seeds[0], "greedy")  # draws nothing, but tells the answers apart
    return [request, replace(request, seeds=(seed,), temperature=0.0, with_greedy=False)]


def joined(first: list[Rollout], second: list[Rollout]) -> list[Rollout]:
    """Both parts of a request's answer, whichever came first: the greedy response last."""
    return sorted([*first, *second], key=lambda rollout: (rollout.greedy, rollout.sample))


Part = tuple[int, Request, Request]  # index of the request, the request, and what the engine is asked for


def told_apart(parts: Iterable[Part]) -> list[dict[int, Part]]:
    """Batches in which the first seed names the part, because an answer says no more of what it answers than its seeds.

    One batch, unless two parts begin with the same seed.
    """
    batches: list[dict[int, Part]] = []
    for each in parts:
        seed = each[-1].seeds[0]
        batch = next((batch for batch in batches if seed not in batch), None)
        if batch is None:
            batches.append({seed: each})
        else:
            batch[seed] = each
    return batches


class RolloutActor:
    """One engine in its own process."""

    def __init__(self, factory: Callable[[], Generator], log_file: str) -> None:
        settle(log_file)
        self._generator = factory()

    def ready(self) -> bool:
        return True

    def place(self) -> str:
        """The name of its node."""
        own = ray.get_runtime_context().get_node_id()
        return next((f"node {node.name}" for node in nodes() if node.id == own), "a node that has left")

    def sample(self, requests: list[tuple[int, Request]]) -> Iterator[str | tuple[int, int] | list[Rollout]]:
        """BEGUN, then groups as they finish: the rollouts, and (index of the request, samples that were aborted).

        The pair is small and goes to the driver; the rollouts stay in the object store. What the engine aborts is
        sampled again with the same seeds: a fragment must never look like a response. A greedy response that was asked
        for besides comes last in its group. Requests that share seeds are sampled one after the other.
        """
        yield BEGUN
        waiting, tries = requests, 0
        aborted = dict.fromkeys((index for index, _ in requests), 0)
        while waiting:
            if tries == MAX_TRIES:
                raise WorkerLost(f"the engine aborted {len(waiting)} groups {tries} times; see its log")
            tries += 1
            batches = told_apart((index, request, part) for index, request in waiting for part in parts_of(request))
            waiting, held = [], dict[int, list[Rollout]]()
            for (index, request, part), found in self._answers(batches):
                mine = found if part is request else [replace(each, greedy=True) for each in found]
                rollouts = joined(held.pop(index, []), mine)
                if len(rollouts) < len(request.seeds) + request.with_greedy:
                    held[index] = rollouts
                    continue
                if any(rollout.finish == "abort" for rollout in rollouts):
                    aborted[index] += len(rollouts)
                    waiting.append((index, request))
                    continue
                yield rollouts
                yield index, aborted[index]

    def _answers(self, batches: Iterable[dict[int, Part]]) -> Iterator[tuple[Part, list[Rollout]]]:
        """What was asked for with its rollouts, as the engine finishes them."""
        for batch in batches:
            for found in self._generator.generate([part for _, _, part in batch.values()]):
                yield batch[found[0].seed], found

    def sample_all(self, requests: list[Request]) -> list[list[Rollout]]:
        """The rollouts of each request at once, for callers that need all of them; aborted ones are sampled again."""
        found: dict[int, list[Rollout]] = {}
        _, *finished = self.sample(list(enumerate(requests)))
        for rollouts, (index, _) in zip(finished[::2], finished[1::2], strict=True):
            found[index] = rollouts
        return [found[index] for index in range(len(requests))]

    def load_buckets(self, version: int, manifest: Any, references: list[Any]) -> str:
        return self._generator.load_buckets(version, manifest, ray.get(references))

    def check(self, manifest: Any) -> None:
        self._generator.check(manifest)

    def group_ranks(self) -> int:
        return self._generator.group_ranks

    def join_group(self, host: str, port: int, rank: int, world_size: int, backend: str, timeout_s: float) -> None:
        self._generator.join_group(host, port, rank, world_size, backend, timeout_s)

    def load_group(self, version: int, manifest: Any, bucket_bytes: int) -> str:
        return self._generator.load_group(version, manifest, bucket_bytes, True)

    def mend(self) -> bool:
        return self._generator.mend()

    def logprobs(self, tokens: list[list[int]], temperature: float) -> list[list[float]]:
        return self._generator.logprobs(tokens, temperature)

    def close(self) -> None:
        self._generator.close()


class Rollouts:
    """Driver's side of the engines: what to ask of them, whichever are there.

    ``engines``: handles, of which the i-th is engine number i; or the :class:`Engines` of an earlier run. For
    ``restart``, ``min_engines``, ``logs`` and ``start_timeout_s`` see :class:`Engines`.
    """

    def __init__(
        self,
        engines: Sequence[Any] | Engines,
        *,
        seed: int,
        temperature: float,
        max_tokens: int,
        samples: int,
        greedy: bool,
        timeout_s: float,
        restart: Callable[[int], Any] | None = None,
        min_engines: int | None = None,
        logs: str = "",
        start_timeout_s: float = 600.0,
    ) -> None:
        self.engines = (
            engines
            if isinstance(engines, Engines)
            else Engines(
                engines,
                restart=restart,
                least=min_engines,
                logs=logs,
                start_timeout_s=start_timeout_s,
                timeout_s=timeout_s,
            )
        )
        self.engines.least = min_engines  # engines that are kept may have had another run's rule
        self._seed = seed
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._samples = samples
        self._greedy = greedy  # a greedy response to each training prompt besides, as a baseline
        self._timeout_s = timeout_s
        self._tally = Tally()

    def requests(self, prompts: Sequence[Prompt], *key: object) -> list[Request]:
        """Training requests; ``key`` (step, round) makes their seeds unlike those of every other step."""
        return [
            Request(
                prompt=prompt,
                seeds=tuple(seed_of(self._seed, *key, position, prompt.id, sample) for sample in range(self._samples)),
                temperature=self._temperature,
                max_tokens=self._max_tokens,
                with_greedy=self._greedy,
            )
            for position, prompt in enumerate(prompts)
        ]

    def sample(self, requests: Sequence[Request]) -> Sampled:
        """(index of the request, reference to its rollouts), as groups finish on any engine; see :class:`Sampled`."""
        return Sampled(requests, self.engines, tally=self._tally, timeout_s=self._timeout_s)

    def renew(self) -> None:
        """Take in engines that have become ready and replace those that are missing; when a publish begins."""
        self.engines.renew()

    def take_metrics(self) -> dict[str, float]:
        """Engines that are there, and since the last call: engines lost and joined, groups and responses sampled again."""
        aborted, resampled = self._tally.take()
        return {
            **self.engines.take_metrics(),
            "rollout/resampled_groups": float(resampled),
            "keep/aborted": float(aborted),
        }

    def logprobs(self, tokens: list[list[int]], temperature: float) -> list[list[list[float]]]:
        """log mu of fixed tokens on every engine."""
        asked = {
            number: engine.logprobs.remote(tokens, temperature) for number, engine in self.engines.present().items()
        }
        return list(self.engines.answers(asked, what="log-probs").values())

    def close(self) -> None:
        """Close the engines, and end what was still loading."""
        self.engines.drop_helpers()
        answer([engine.close.remote() for engine in self.engines], what="rollout engines (close)", timeout_s=30.0)
