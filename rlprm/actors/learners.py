"""The driver's side of policy, reference and process sources: names for work, references for answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlprm.actors.group import WorkerGroup
from rlprm.batch import Batch
from rlprm.core.gates import TrustState
from rlprm.engine.combine import global_numbers
from rlprm.sources.measure import quality


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenValues:
    """One flat tensor per shard, by reference, and each rank's timing."""

    shards: tuple[Any, ...]
    summaries: tuple[Any, ...]
    group: WorkerGroup | None = None

    def timing(self) -> dict[str, float]:
        """Wait until they are computed; seconds of the slowest rank."""
        return {} if self.group is None else global_numbers(self.group.get(list(self.summaries), "log-probs"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Streams by name (a reference per shard), the trust in each, and PRM quality before any update."""

    streams: Mapping[str, tuple[Any, ...]]
    trust: Mapping[str, float]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """Work that was named and not waited for."""

    group: WorkerGroup
    summaries: tuple[Any, ...]
    what: str

    def result(self) -> dict[str, float]:
        """Wait, and merge what the ranks measured."""
        return global_numbers(self.group.get(list(self.summaries), self.what))


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingAll:
    """Several pieces of work, none for a run without process sources."""

    parts: tuple[Pending, ...]

    def result(self) -> dict[str, float]:
        """Wait for all of them."""
        return {name: value for part in self.parts for name, value in part.result().items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingCredit:
    """Advantages by reference (a dictionary of flat fields per shard), with metrics and rows for reading to come."""

    group: WorkerGroup
    shards: tuple[Any, ...]
    summaries: tuple[Any, ...]

    def result(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Wait; metrics over all ranks, and the first rank's readable rollouts."""
        answers = self.group.get(list(self.summaries), "credit")
        return global_numbers([measured for measured, _ in answers]), answers[0][1]


class Policy:
    """pi_theta."""

    def __init__(self, group: WorkerGroup) -> None:
        self.group = group

    def version(self) -> int:
        """Optimizer steps the policy has taken."""
        return self.group.get(self.group.all(lambda worker: worker.version), "version")[0]

    def logprobs(self, batch: Batch) -> TokenValues:
        shards, summaries = self.group.shards(lambda worker: worker.policy_logprobs, [batch.shards])
        return TokenValues(shards=shards, summaries=summaries, group=self.group)

    def credit(self, kept: Batch, scored: Scored, old: TokenValues, ref: TokenValues) -> PendingCredit:
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
        return PendingCredit(group=self.group, shards=tuple(values), summaries=tuple(summaries))

    def learn(self, kept: Batch, old: TokenValues, ref: TokenValues, credit: PendingCredit) -> Pending:
        columns = [kept.shards, selection(kept), old.shards, ref.shards, credit.shards]
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
        return TokenValues(shards=shards, summaries=summaries, group=self.group)


class NoReference:
    """Nothing in this run measures from the initial model; the configuration check has made sure of it."""

    def logprobs(self, batch: Batch) -> TokenValues:
        return TokenValues(shards=(None,) * len(batch.shards), summaries=())


class Sources:
    """All process sources of the run; empty for outcome-only methods."""

    def __init__(self, sources: Mapping[str, WorkerGroup], trust: Mapping[str, TrustState]) -> None:
        self._sources = dict(sources)
        self.trust = dict(trust)

    def score(self, batch: Batch, old: TokenValues, ref: TokenValues) -> Scored:
        asked = {
            name: group.shards(lambda worker: worker.score, [batch.shards, old.shards, ref.shards], name)
            for name, group in self._sources.items()
        }
        metrics = {**old.timing(), **ref.timing()}
        for name, (_, summaries) in asked.items():
            answers = self._sources[name].get(list(summaries), f"score of {name}")
            slowest = max(seconds for _, seconds in answers)
            metrics["timing_s/prm_score"] = metrics.get("timing_s/prm_score", 0.0) + slowest
            measured = [one for one, _ in answers if one is not None]
            if measured:
                found = quality(measured)
                accuracy, groups = found.get("prm/pair_acc_fresh", 0.0), int(found["prm/mixed_groups"])
                self.trust[name] = self.trust[name].update(accuracy, groups)
                metrics |= {**found, "prm/trust": self.trust[name].value}
        return Scored(
            streams={name: shards for name, (shards, _) in asked.items()},
            trust={name: state.value for name, state in self.trust.items()},
            metrics=metrics,
        )

    def learn(self, batch: Batch, old: TokenValues, ref: TokenValues) -> PendingAll:
        columns = [batch.shards, old.shards, ref.shards]
        return PendingAll(
            parts=tuple(
                Pending(
                    group=group,
                    summaries=tuple(
                        # lists: the worker hands them to ray.get, which takes no tuple
                        worker.learn_source.remote(
                            *(list(column[rank :: len(group.workers)]) for column in columns), name
                        )
                        for rank, worker in enumerate(group.workers)
                    ),
                    what=f"update of {name}",
                )
                for name, group in self._sources.items()
            )
        )


def selection(batch: Batch) -> list[torch.Tensor]:
    """For each shard, which of its rows train the policy."""
    return [torch.tensor([batch.selected[row] for row in members], dtype=torch.bool) for members in batch.members]
