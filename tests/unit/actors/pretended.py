"""Ray without processes: handles, references and streams that are answered at once, and engines that die on cue."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from rlprm.actors.sampled import BEGUN
from rlprm.roles import Request, Rollout


class Ref:
    """A reference whose value, or error, is known; LATE: not yet."""

    def __init__(self, value: Any) -> None:
        self.value = value


LATE = object()


class Method:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def options(self, **options: Any) -> Method:
        return self

    def remote(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def died(words: str = "its node is gone") -> RayActorError:
    return RayActorError(error_msg=words)


class Engine:
    """An engine that answers in the order of its requests.

    ``after``: groups that it finishes before it dies (of all calls together); None: it lives. ``begins`` False: it is
    dead before it sees a request. ``error``: what its streams end with instead of a death.
    """

    def __init__(
        self, name: str, *, after: int | None = None, begins: bool = True, error: Exception | None = None
    ) -> None:
        self.name = name
        self.after = after
        self.begins = begins
        self.error = error
        self.asked: list[list[int]] = []
        self.killed = False
        self.is_ready: Any = True
        self.answers: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Method:
        if name.startswith(("_", "do_")):
            raise AttributeError(name)
        return Method(getattr(self, f"do_{name}", None) or (lambda *arguments: Ref(self._answer(name))))

    def _answer(self, name: str) -> Any:
        return self.error or self.answers.get(name, LATE)

    def do_place(self) -> Ref:
        return Ref(f"node of {self.name}")

    def do_ready(self) -> Ref:
        return Ref(self.is_ready)

    def do_sample(self, requests: list[tuple[int, Request]]) -> Stream:
        self.asked.append([index for index, _ in requests])
        return Stream(self._items(requests))

    def do_sample_all(self, requests: list[Request]) -> Ref:
        self.asked.append([int(request.prompt.id.split("/")[1]) for request in requests])
        if self.after is not None:
            return Ref(self.error or died())
        return Ref([rollouts_of(request) for request in requests])

    def _items(self, requests: list[tuple[int, Request]]) -> Iterator[Ref]:
        if not self.begins:
            yield Ref(self.error or died())
            return
        yield Ref(BEGUN)
        for index, request in requests:
            if self.after == 0:
                yield Ref(self.error or died())
                return
            if self.after is not None:
                self.after -= 1
            yield Ref(rollouts_of(request))
            yield Ref((index, 0))


class Stream:
    def __init__(self, items: Iterator[Ref]) -> None:
        self._items = items

    def __next__(self) -> Ref:
        return next(self._items)


def rollouts_of(request: Request) -> list[Rollout]:
    """What any engine answers: it depends on the request alone."""
    return [
        Rollout(
            prompt=request.prompt, sample=sample, tokens=(seed % 97,), logprobs=(-0.1,), version=0, seed=seed,
            finish="stop",
        )
        for sample, seed in enumerate(request.seeds)
    ]  # fmt: skip


def get(reference: Any, timeout: float | None = None) -> Any:
    if isinstance(reference, list):
        return [get(each, timeout) for each in reference]
    if reference.value is LATE:
        raise GetTimeoutError("not yet")
    if isinstance(reference.value, Exception):
        raise reference.value
    return reference.value


def wait(waiting: Sequence[Any], num_returns: int = 1, timeout: float | None = None, **options: Any) -> Any:
    """Whatever was asked first is ready first; a reference that is late never is."""
    ready = [each for each in waiting if getattr(each, "value", None) is not LATE][:num_returns]
    return ready, [each for each in waiting if not any(each is one for one in ready)]


def kill(handle: Any) -> None:
    handle.killed = True


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in (("get", get), ("wait", wait), ("kill", kill)):
        monkeypatch.setattr(ray, name, function)
