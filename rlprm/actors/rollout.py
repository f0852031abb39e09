"""Rollout engines in Ray actors, and the driver's role that spreads requests over them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from rlprm.actors.group import answer, redirect_output
from rlprm.errors import RlprmError, WorkerLost
from rlprm.roles import Generator, Prompt, Request, Rollout


def seed_of(run_seed: int, *parts: object) -> int:
    """A 48-bit seed that depends on every part: no two (step, prompt, sample) share one.

    >>> seed_of(0, 1, "a", 0) != seed_of(0, 1, "a", 1)
    True
    """
    text = repr((run_seed, *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big")


@ray.remote
class RolloutActor:
    """One engine in its own process."""

    def __init__(self, factory: Callable[[], Generator], log_file: str) -> None:
        redirect_output(log_file)
        self._generator = factory()

    def ready(self) -> bool:
        return True

    def sample(self, requests: list[tuple[int, Request]]) -> Iterator[tuple[int, list[Rollout]] | int]:
        """Groups as they finish: first the index of the request (small), then its rollouts (stay in the store)."""
        index_of = {request.seeds[0]: index for index, request in requests}
        for rollouts in self._generator.generate([request for _, request in requests]):
            yield index_of[rollouts[0].seed]
            yield rollouts

    def load_buckets(self, version: int, manifest: Any, references: list[Any]) -> str:
        return self._generator.load_buckets(version, manifest, ray.get(references))

    def join_transfer(self, *arguments: Any) -> None:
        self._generator.join_transfer(*arguments)

    def receive(self, version: int, manifest: Any, bucket_bytes: int) -> str:
        return self._generator.receive(version, manifest, bucket_bytes)

    def logprobs(self, tokens: list[list[int]], temperature: float) -> list[list[float]]:
        return self._generator.logprobs(tokens, temperature)

    def close(self) -> None:
        self._generator.close()


class Rollouts:
    """Driver's side of the engines."""

    def __init__(
        self, engines: Sequence[Any], *, seed: int, temperature: float, max_tokens: int, samples: int, timeout_s: float
    ) -> None:
        self.engines = tuple(engines)
        self._seed = seed
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._samples = samples
        self._timeout_s = timeout_s

    def requests(self, prompts: Sequence[Prompt], *key: object) -> list[Request]:
        """Training requests; ``key`` (step, round) makes their seeds unlike those of every other step."""
        return [
            Request(
                prompt=prompt,
                seeds=tuple(
                    seed_of(self._seed, *key, position, prompt.id, sample) for sample in range(self._samples)
                ),
                temperature=self._temperature,
                max_tokens=self._max_tokens,
            )
            for position, prompt in enumerate(prompts)
        ]

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, Any]]:
        """(index of the request, reference to its rollouts), as groups finish on any engine.

        Raises:
            WorkerLost: an engine died or was silent for ``timeout_s`` seconds.
        """
        size = len(self.engines)
        streams = []
        for number, engine in enumerate(self.engines):
            mine = [(index, requests[index]) for index in range(number, len(requests), size)]
            if mine:
                streams.append(engine.sample.options(num_returns="streaming").remote(mine))
        while streams:
            ready, _ = ray.wait(streams, num_returns=1, timeout=self._timeout_s, fetch_local=False)
            if not ready:
                raise WorkerLost(f"no rollout engine finished a group within {self._timeout_s:.0f} s; see their logs")
            stream = ready[0]
            try:
                index = ray.get(next(stream), timeout=self._timeout_s)
                yield index, next(stream)
            except StopIteration:
                streams.remove(stream)
            except RayTaskError as error:
                if isinstance(error.cause, RlprmError):
                    raise error.cause from None
                raise WorkerLost(f"a rollout engine failed: {error.cause}; see logs/rollout*.log") from error
            except RayActorError as error:
                raise WorkerLost(f"a rollout engine died: {error}") from error

    def logprobs(self, tokens: list[list[int]], temperature: float) -> list[list[list[float]]]:
        """log mu of fixed tokens on every engine."""
        references = [engine.logprobs.remote(tokens, temperature) for engine in self.engines]
        return answer(references, what="rollout engines (logprobs)", timeout_s=self._timeout_s)

    def close(self) -> None:
        answer([engine.close.remote() for engine in self.engines], what="rollout engines (close)", timeout_s=30.0)
