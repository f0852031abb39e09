"""The driver's side of policy, reference and process sources: names for work, references for answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlprm.actors.group import WorkerGroup
from rlprm.batch import Batch
from rlprm.core.trust import TrustState, trusted
from rlprm.sources.measure import quality


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenValues:
    """One flat tensor per shard, by reference, and each rank's timing."""

    shards: tuple[Any, ...]
    summaries: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Streams by name (a reference per shard), the trust in each, and PRM quality before any update."""

    streams: Mapping[str, tuple[Any, ...]]
    trust: Mapping[str, float]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """Work that was named and not waited for; `result` gives its metrics (ranks agree, so rank 0 speaks)."""

    group: WorkerGroup | None
    summaries: tuple[Any, ...]
    what: str
    values: tuple[Any, ...] = ()

    def result(self) -> Any:
        if self.group is None:
            return {}
        return self.group.get(list(self.summaries), self.what)[0]


class Policy:
    """pi_theta."""

    def __init__(self, group: WorkerGroup) -> None:
        self.group = group

    def logprobs(self, batch: Batch) -> TokenValues:
        shards, summaries = self.group.shards(lambda worker: worker.policy_logprobs, [batch.shards])
        return TokenValues(shards=shards, summaries=summaries)

    def credit(self, kept: Batch, scored: Scored, old: TokenValues, ref: TokenValues) -> Pending:
        size = len(self.group.workers)
        values: list[Any] = [None] * len(kept.shards)
        summaries = []
        for rank, worker in enumerate(self.group.workers):
            mine = range(rank, len(kept.shards), size)
            streams = {name: [references[i] for i in mine] for name, references in scored.streams.items()}
            *parts, summary = worker.credit.options(num_returns=len(mine) + 1).remote(
                [kept.shards[i] for i in mine],
                [selection(kept)[i] for i in mine],
                [old.shards[i] for i in mine],
                [ref.shards[i] for i in mine],
                streams,
                dict(scored.trust),
            )
            for index, part in zip(mine, parts, strict=True):
                values[index] = part
            summaries.append(summary)
        return Pending(group=self.group, summaries=tuple(summaries), what="credit", values=tuple(values))

    def learn(self, kept: Batch, old: TokenValues, ref: TokenValues, credit: Pending) -> Pending:
        columns = [kept.shards, selection(kept), old.shards, ref.shards, credit.values]
        references = []
        size = len(self.group.workers)
        for rank, worker in enumerate(self.group.workers):
            parts = [[column[index] for index in range(rank, len(kept.shards), size)] for column in columns]
            references.append(worker.learn_policy.remote(*parts, kept.num_groups))
        return Pending(group=self.group, summaries=tuple(references), what="policy update")


class Reference:
    """pi_ref: the frozen initial model."""

    def __init__(self, group: WorkerGroup) -> None:
        self.group = group

    def logprobs(self, batch: Batch) -> TokenValues:
        shards, summaries = self.group.shards(lambda worker: worker.reference_logprobs, [batch.shards])
        return TokenValues(shards=shards, summaries=summaries)


class NoReference:
    """Nothing in this run measures from the initial model: log pi_old stands in, so every difference is exactly 0."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._last: tuple[Batch, TokenValues] | None = None

    def logprobs(self, batch: Batch) -> TokenValues:
        zeros = tuple(_zeros_like(shard) for shard in batch.shards)
        return TokenValues(shards=zeros, summaries=())


class Sources:
    """All process sources of the run; empty for outcome-only methods."""

    def __init__(self, sources: Mapping[str, WorkerGroup], trust: Mapping[str, TrustState], *, last: int) -> None:
        self._sources = dict(sources)
        self.trust = dict(trust)
        self._last = last

    def score(self, batch: Batch, old: TokenValues, ref: TokenValues) -> Scored:
        asked = {
            name: group.shards(lambda worker: worker.score, [batch.shards, old.shards, ref.shards], name)
            for name, group in self._sources.items()
        }
        metrics: dict[str, float] = {}
        for name, (_, summaries) in asked.items():
            measured = self._sources[name].get(list(summaries), f"score of {name}")
            found = quality(measured)
            self.trust[name] = self.trust[name].updated(found["prm/pair_acc_fresh"], found["prm/mixed_groups"])
            metrics |= {**found, "prm/trust": trusted(self.trust[name])}
        return Scored(
            streams={name: shards for name, (shards, _) in asked.items()},
            trust={name: trusted(state) for name, state in self.trust.items()},
            metrics=metrics,
        )

    def learn(self, batch: Batch, old: TokenValues, ref: TokenValues) -> Pending:
        for name, group in self._sources.items():
            size = len(group.workers)
            columns = [batch.shards, old.shards, ref.shards]
            references = []
            for rank, worker in enumerate(group.workers):
                parts = [[column[index] for index in range(rank, len(batch.shards), size)] for column in columns]
                references.append(worker.learn_source.remote(*parts, name))
            return Pending(group=group, summaries=tuple(references), what=f"update of {name}")
        return Pending(group=None, summaries=(), what="no process source")


def selection(batch: Batch) -> list[torch.Tensor]:
    """For each shard, which of its rows train the policy."""
    return [torch.tensor([batch.selected[row] for row in members], dtype=torch.bool) for members in batch.members]


def rank_results(groups: Sequence[Any]) -> Any:
    """Ranks reduce their metrics before they answer, so the first one's are everybody's."""
    return groups[0]
