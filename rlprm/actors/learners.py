"""The driver's side of policy, reference and process sources: names for work, references for answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlprm.actors.group import WorkerGroup
from rlprm.batch import Batch
from rlprm.core.gates import TrustState
from rlprm.engine.combine import global_numbers
from rlprm.roles import RowScore
from rlprm.sources.base import OWN
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
    """Streams by name (a reference per shard, and which of its outputs), what each says of each row, the trust in each
    stream and the brake on it, and PRM quality before any update."""

    streams: Mapping[str, tuple[tuple[Any, ...], str]]
    rows: Mapping[str, Mapping[int, RowScore]]
    trust: Mapping[str, float]
    brake: Mapping[str, float]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """Work that was named and not waited for."""

    group: WorkerGroup
    summaries: tuple[Any, ...]
    what: str
    rename: Callable[[Mapping[str, float]], dict[str, float]] = dict

    def result(self) -> dict[str, float]:
        """Wait, and merge what the ranks measured."""
        return self.rename(global_numbers(self.group.get(list(self.summaries), self.what)))


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
        """Wait; metrics over all ranks, and their readable rollouts in the order of the groups."""
        answers = self.group.get(list(self.summaries), "credit")
        rows = sorted((row for _, rows in answers for row in rows), key=lambda row: row["group"])
        return global_numbers([measured for measured, _ in answers]), rows


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlace:
    """The ranks that hold a source, and whether it wants texts."""

    group: WorkerGroup
    reads_text: bool


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
            streams = {
                name: ([references[i] for i in mine], output) for name, (references, output) in scored.streams.items()
            }
            *parts, summary = worker.credit.options(num_returns=len(mine) + 1).remote(
                [kept.shards[i] for i in mine],
                [selection(kept)[i] for i in mine],
                [old.shards[i] for i in mine],
                [ref.shards[i] for i in mine],
                streams,
                dict(scored.trust),
                dict(scored.brake),
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
    """All process sources of the run; empty for outcome-only methods.

    ``outputs`` are streams that another stream's source fills besides its own: name -> (that stream, output).
    """

    def __init__(
        self,
        sources: Mapping[str, SourcePlace],
        trust: Mapping[str, TrustState],
        *,
        outputs: Mapping[str, tuple[str, str]],
    ) -> None:
        self._sources = dict(sources)
        self._outputs = dict(outputs)
        self.trust = dict(trust)
        self.brake = 1.0  # factor on the weight of every process stream; an alarm lowers it

    def score(self, batch: Batch, old: TokenValues, ref: TokenValues) -> Scored:
        """Ask every source at once, and wait for what they measured."""
        asked = {}
        for name, place in self._sources.items():
            texts = batch.texts if place.reads_text else [None] * len(batch.shards)
            columns = [batch.shards, old.shards, ref.shards, texts]
            asked[name] = place.group.shards(lambda worker: worker.score, columns, name, batch.step)
        metrics = {**old.timing(), **ref.timing()}
        rows: dict[str, Mapping[int, RowScore]] = {}
        for name, (_, summaries) in asked.items():
            answers = self._sources[name].group.get(list(summaries), f"score of {name}")
            seconds = "timing_s/prm_score"
            metrics[seconds] = metrics.get(seconds, 0.0) + max(each.seconds for each in answers)
            metrics |= self._named(name, global_numbers([each.metrics for each in answers]))
            measured = [each.measurement for each in answers if each.measurement is not None]
            if measured:
                found = quality(measured)
                accuracy, groups = found.get("prm/pair_acc_fresh", 0.0), int(found["prm/mixed_groups"])
                self.trust[name] = self.trust[name].update(accuracy, groups)
                metrics |= self._named(name, {**found, "prm/trust": self.trust[name].value})
            for output in answers[0].rows:
                rows[name if output == OWN else f"{name}/{output}"] = {
                    row: one for each in answers for row, one in each.rows[output].items()
                }
        return Scored(
            streams={name: (asked[name][0], OWN) for name in asked}
            | {name: (asked[of][0], output) for name, (of, output) in self._outputs.items()},
            rows=rows | {name: rows[f"{of}/{output}"] for name, (of, output) in self._outputs.items()},
            trust={name: state.value for name, state in self.trust.items()},
            brake=dict.fromkeys([*asked, *self._outputs], self.brake),
            metrics=metrics,
        )

    def learn(self, batch: Batch, old: TokenValues, ref: TokenValues) -> PendingAll:
        return PendingAll(
            parts=tuple(
                Pending(
                    group=place.group,
                    summaries=tuple(self._learning(name, place, batch, old, ref)),
                    what=f"update of {name}",
                    rename=functools.partial(self._named, name),
                )
                for name, place in self._sources.items()
            )
        )

    def _learning(
        self, name: str, place: SourcePlace, batch: Batch, old: TokenValues, ref: TokenValues
    ) -> Iterator[Any]:
        size = len(place.group.workers)
        texts = batch.texts if place.reads_text else [None] * len(batch.shards)
        for rank, worker in enumerate(place.group.workers):
            # lists: the worker hands them to ray.get, which takes no tuple
            columns = (list(column[rank::size]) for column in (batch.shards, old.shards, ref.shards, texts))
            yield worker.learn_source.remote(*columns, name, batch.step)

    def _named(self, name: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """One source has ``prm/`` and ``prover/`` to itself; several share them by stream name, so that none is lost."""
        if len(self._sources) == 1:
            return dict(metrics)
        parts = {key: key.partition("/") for key in metrics}
        return {
            f"{family}/{name}/{rest}" if family in ("prm", "prover") else key: metrics[key]
            for key, (family, _, rest) in parts.items()
        }


def selection(batch: Batch) -> list[torch.Tensor]:
    """For each shard, which of its rows train the policy."""
    return [torch.tensor([batch.selected[row] for row in members], dtype=torch.bool) for members in batch.members]
