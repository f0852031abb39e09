"""The plain nouns that cross process borders, and the protocols of the parts the driver joins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:  # what is only verified or judged starts without torch
    from jaxtyping import Bool, Float
    from torch import Tensor

    from rlprm.records import Shard

Finish = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question, ready to be sampled from. ``gold`` is what the verifier compares with."""

    id: str  # unique and stable: "<source>/<row>"
    text: str  # the rendered prompt, as the verifier may read it
    question: str  # as the data source has it, before the template
    tokens: tuple[int, ...]
    gold: str
    source: str  # name of the data source, used in metric names


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Sample ``len(seeds)`` responses to ``prompt``; greedy when ``temperature`` is 0.

    ``with_greedy``: and one greedy response besides, the last of the answer (the engines themselves never see this: who
    drives them asks twice).
    """

    prompt: Prompt
    seeds: tuple[int, ...]
    temperature: float
    max_tokens: int
    with_greedy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response with its log-probs (nats, at the sampling temperature) and the policy version."""

    prompt: Prompt
    sample: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    version: int
    seed: int
    greedy: bool = False  # the baseline of the others (ReMax): judged with them, and no part of any batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A verifier's answer. ``outcome`` None: it failed or timed out, and no reward may be invented.

    ``steps`` holds exact labels per reasoning step (1 right, 0 wrong, -1 unknown) where the task can give them.
    """

    outcome: float | None
    reason: str
    seconds: float
    steps: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A rollout with its text and verdict."""

    rollout: Rollout
    text: str
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRollout:
    """A response that a run has written down, token by token: nothing of it is ever tokenised again."""

    where: str  # file:line
    step: int  # of the run
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    logprobs: tuple[float, ...]  # of the response's tokens when they were sampled, nats
    outcome: float | None  # None: the verifier gave no verdict
    truncated: bool
    version: int
    spans: tuple[tuple[int, int], ...]  # of each step: its first response token, and the one after its last
    labels: tuple[int, ...]  # of each step: 1 right, 0 wrong, -1 unknown
    rewards: Mapping[str, tuple[float | None, ...]]  # per stream, of each step: the sum that it earned, if anything


@runtime_checkable
class Generator(Protocol):
    """A rollout engine: token ids in, token ids and log-probs out."""

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Rollout]]:
        """Yield the rollouts of one request as soon as all of them have finished, in any order of requests."""
        ...

    def load(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> str:
        """Replace all weights in place; refuse an incomplete set of names; return the digest of what was received."""
        ...

    def logprobs(self, tokens: Sequence[Sequence[int]], temperature: float) -> list[list[float]]:
        """log mu of each given token after its prefix, at ``temperature``; the first entry of each is 0."""
        ...

    def close(self) -> None:
        """Release the engine and its processes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RowText:
    """A response as a reader of text sees it; the texts of its steps joined are the response."""

    prompt: Prompt
    response: str
    steps: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScore:
    """A response's rewards, summed within each step that has any: their mean, smallest, sum and last, and how many."""

    mean: float
    lowest: float
    sum: float
    last: float
    steps: int


# A verifier is a plain function (gold, response text, prompt text) -> (outcome in [0, 1], reason) or a Verdict;
# it runs inside a killable process, so it may raise, hang or eat memory without harm to the run.
Verifier = Callable[..., Any]


@runtime_checkable
class Reduce(Protocol):
    """Global sums and maxima over ranks; the identity on one rank. Pure functions never know how many ranks there are."""

    def sum(self, value: Tensor) -> Tensor: ...

    def max(self, value: Tensor) -> Tensor: ...


class Normalizer(Protocol):
    """Centre, scale and bound a stream's rewards over present entries; absent entries stay 0."""

    def __call__(
        self, rewards: Float[Tensor, "B T"], present: Bool[Tensor, "B T"], shard: Shard, reduce: Reduce
    ) -> Float[Tensor, "B T"]: ...


class Estimator(Protocol):
    """Accumulate normalized rewards into per-token advantages; no centring and no scaling."""

    def __call__(
        self, rewards: Float[Tensor, "B T"], present: Bool[Tensor, "B T"], shard: Shard
    ) -> Float[Tensor, "B T"]: ...


class Keep(Protocol):
    """Does this group of verified rollouts count towards the step?"""

    def __call__(self, group: Sequence[Verified]) -> bool: ...


Metrics = Mapping[str, float]
