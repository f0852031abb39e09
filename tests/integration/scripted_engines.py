"""Rollout engines without a model, in a module that starts fast: what they answer follows from the seeds alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from rlprm.roles import Request, Rollout


class Scripted:
    """Answers one request after the other; the question "die" ends its process."""

    def generate(self, requests: list[Request]) -> Iterator[list[Rollout]]:
        for request in requests:
            if request.prompt.question == "die":
                time.sleep(0.5)  # at work, as a forward pass is
                os.kill(os.getpid(), signal.SIGKILL)
            yield [
                Rollout(
                    prompt=request.prompt, sample=sample, tokens=(seed % 97, seed % 89), logprobs=(-0.1, -0.2),
                    version=0, seed=seed, finish="stop",
                )
                for sample, seed in enumerate(request.seeds)
            ]  # fmt: skip

    def logprobs(self, tokens: list[list[int]], temperature: float) -> list[list[float]]:
        return [[float(len(row))] for row in tokens]


class Source:
    """A process that uses the engines, as a rank with a process source does."""

    def __init__(self, service: Any) -> None:
        self._service = service

    def sample(self, requests: list[Request]) -> list[list[Rollout]]:
        return self._service.sample(requests)

    def logprobs(self) -> list[list[float]]:
        return self._service.logprobs([[1, 2, 3]], 1.0)
