"""Several ranks as threads of one process, with a real exchange at every reduction: a missing one hangs or differs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


class Exchange:
    """What the ranks share. Each reduction is two meetings: all have written, all have read."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=20)
        self.slots: list[Any] = [None] * ranks


@dataclass(frozen=True)
class ThreadReduce:
    """One rank's view of the exchange."""

    exchange: Exchange
    rank: int

    def sum(self, value: Tensor) -> Tensor:
        return self._all(value).sum(0)

    def max(self, value: Tensor) -> Tensor:
        return self._all(value).amax(0)

    def _all(self, value: Tensor) -> Tensor:
        self.exchange.slots[self.rank] = value
        self.exchange.barrier.wait()
        gathered = torch.stack(list(self.exchange.slots))
        self.exchange.barrier.wait()
        return gathered


def on_ranks(work: Callable[[Any, ThreadReduce], R], shards: Sequence[Any]) -> list[R]:
    """``work(shard, reduce)`` for each shard, all at the same time."""
    exchange = Exchange(len(shards))

    def guarded(shard: Any, rank: int) -> R:
        try:
            return work(shard, ThreadReduce(exchange, rank))
        except BaseException:
            exchange.barrier.abort()  # the other ranks would wait for this one until the timeout
            raise

    with ThreadPoolExecutor(len(shards)) as pool:
        futures = [pool.submit(guarded, shard, rank) for rank, shard in enumerate(shards)]
        return [future.result() for future in futures]
