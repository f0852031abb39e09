"""One learner process: a rank of the policy, or of the PRM and the reference."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from rlprm.actors.group import settle
from rlprm.batch import flatten
from rlprm.core.metrics import Max
from rlprm.core.row_scores import row_scores
from rlprm.engine.checkpoints import random_state, restore_random_state, written
from rlprm.engine.combine import Measured
from rlprm.engine.distributed import join, leave, reserve
from rlprm.records import JaggedShard, cat
from rlprm.roles import RowScore
from rlprm.sources.base import Scorable
from rlprm.sources.measure import Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSummary:
    """What one rank's source measured while scoring, and what each of its outputs says of each row."""

    measurement: Measurement | None
    metrics: Measured
    seconds: float
    rows: Mapping[str, Mapping[int, RowScore]]


class Worker:
    """Hosts the roles that were built on it; each method unpacks shards, calls one role, and packs the answer."""

    def __init__(self, log_file: str) -> None:
        settle(log_file)
        self._policy: Any = None
        self._reference: Any = None
        self._sources: dict[str, Any] = {}
        self._supervised: Any = None
        self._random: Any = None

    def rendezvous(self) -> tuple[str, int]:
        """Where the others meet this rank: an address of its node, and a port that it holds until they have met."""
        host = ray.util.get_node_ip_address()  # loopback where the run has its own Ray
        return host, reserve(host)

    def join(self, rank: int, world_size: int, host: str, port: int, device: str, timeout_s: float) -> None:
        join(rank, world_size, host, port, device=device, timeout_s=timeout_s)
        self._random = random_state()

    def build_policy(self, factory: Callable[[], Any]) -> int:
        self._policy = factory()
        return self._policy.version

    def build_reference(self, factory: Callable[[], Any]) -> None:
        self._reference = factory()

    def build_source(self, name: str, factory: Callable[[Any], Any]) -> None:
        self._sources[name] = factory(self._policy)  # None where the policy is on other ranks

    def build_supervised(self, factory: Callable[[], Any]) -> None:
        self._supervised = factory()

    def advance_supervised(self, steps: int) -> Measured:
        return self._supervised.advance(steps)

    def export_supervised(self, folder: str) -> str:
        return self._supervised.export(folder)

    def policy_logprobs(self, shards: list[Any]) -> Any:
        return self._per_shard(shards, "old_log_prob", self._policy.logprobs)

    def reference_logprobs(self, shards: list[Any]) -> Any:
        return self._per_shard(shards, "ref", self._reference.logprobs)

    def score(self, shards: list[Any], old: list[Any], ref: list[Any], texts: list[Any], name: str, step: int) -> Any:
        """Each shard's streams by output, and this rank's measurements."""
        parts, given = scorable(shards, old, ref, texts, step)
        begin = time.perf_counter()
        scores = self._sources[name].score(given)
        summary = SourceSummary(
            measurement=scores.measurement,
            metrics=scores.metrics,
            seconds=time.perf_counter() - begin,
            rows={output: row_scores(stream, given.padded) for output, stream in scores.streams.items()},
        )
        flat = {
            output: {
                field: split(flatten(getattr(stream, field), given.shard.lengths), parts)
                for field in ("rewards", "present")
            }
            for output, stream in scores.streams.items()
        }
        values = [
            {output: {field: pieces[index] for field, pieces in fields.items()} for output, fields in flat.items()}
            for index in range(len(parts))
        ]
        return [*values, summary] if values else summary

    def learn_source(
        self, shards: list[Any], old: list[Any], ref: list[Any], texts: list[Any], name: str, step: int
    ) -> Measured:
        _, given = scorable(shards, old, ref, texts, step)
        begin = time.perf_counter()
        measured = self._sources[name].learn(given)
        return measured | slowest("update_prm", begin)

    def credit(
        self,
        shards: list[Any],
        selected: list[Tensor],
        old: list[Any],
        ref: list[Any],
        streams: dict[str, tuple[list[Any], str]],
        trust: dict[str, float],
        brake: dict[str, float],
    ) -> Any:
        """Each shard's advantages (with value targets where there is a critic), metrics, and rows for reading."""
        parts, joined = joined_shards(shards)
        fetched = {
            name: [part[output] for part in ray.get(references)] for name, (references, output) in streams.items()
        }
        joined_streams = {
            name: {field: torch.cat([part[field] for part in values]) for field in ("rewards", "present")}
            for name, values in fetched.items()
        }
        begin = time.perf_counter()
        credit, measured, readable = self._policy.credit(
            joined, torch.cat(selected), joined_tokens(old), joined_tokens(ref), joined_streams, trust, brake
        )
        measured |= slowest("adv", begin)
        per_field = {field: split(flat, parts) for field, flat in credit.items()}
        values = [{field: flats[index] for field, flats in per_field.items()} for index in range(len(parts))]
        return [*values, (measured, readable)] if values else (measured, readable)

    def learn_policy(
        self,
        shards: list[Any],
        selected: list[Tensor],
        old: list[Any],
        ref: list[Any],
        credit: list[Any],
        num_groups: int,
    ) -> Measured:
        _, joined = joined_shards(shards)
        values = ray.get(credit)
        fields = {field: torch.cat([value[field] for value in values]) for field in values[0]}
        begin = time.perf_counter()
        measured = self._policy.learn(
            joined, torch.cat(selected), joined_tokens(old), joined_tokens(ref), fields, num_groups
        )
        return measured | slowest("update_actor", begin) | device_memory()

    def version(self) -> int:
        return self._policy.version

    def manifest(self) -> Any:
        return self._policy.manifest()

    def put_weights(self, bucket_bytes: int) -> tuple[int, Any, list[Any], str]:
        """Version, manifest, buckets in the object store, digest; all ranks call (ZeRO-3), rank 0 has the data."""
        references, digest = self._policy.pack(bucket_bytes, lambda bucket: ray.put(bucket.numpy()))
        return self._policy.version, self._policy.manifest(), references, digest

    def join_transfer(self, host: str, port: int, rank: int, world_size: int, backend: str, timeout_s: float) -> None:
        self._policy.join_transfer(host, port, rank, world_size, backend, timeout_s)

    def send_weights(self, bucket_bytes: int) -> str:
        return self._policy.send(bucket_bytes)

    def save(self, folder: str) -> dict[str, int]:
        """Every role's state; the files of this rank, which are on disk now, with their sizes."""
        files: dict[str, int] = {}
        for role in self._savable():
            role.save(f"{folder}/{role.name}")
            for root in (Path(f"{folder}/{role.name}"), Path(f"{folder}/{role.name}_critic")):
                if root.is_dir():
                    files |= written(root)
        return files

    def load(self, folder: str) -> None:
        for role in self._savable():
            role.load(f"{folder}/{role.name}")

    def export(self, folder: str) -> list[str]:
        return [role.export(f"{folder}/{role.name}") for role in self._savable() if role.exportable]

    def clear(self) -> None:
        """Close all roles and be as new: what the next run builds here finds nothing of this one's. The group stays."""
        for role in self._roles():
            role.close()
        self._policy = self._reference = self._supervised = None
        self._sources = {}
        gc.collect()  # an engine and its hooks hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        restore_random_state(self._random)

    def close(self) -> None:
        for role in self._roles():
            role.close()
        leave()

    def _savable(self) -> list[Any]:
        return [role for role in self._roles() if role.stateful]

    def _roles(self) -> list[Any]:
        return ([self._policy] if self._policy is not None else []) + list(self._sources.values())

    def _per_shard(self, shards: list[Any], stage: str, compute: Callable[[JaggedShard], Tensor]) -> Any:
        parts, joined = joined_shards(shards)
        begin = time.perf_counter()
        flat = compute(joined)
        summary = slowest(stage, begin)
        values = split(flat, parts)
        return [*values, summary] if values else summary


def slowest(stage: str, begin: float) -> Measured:
    """Seconds since ``begin``; over ranks the slowest counts, for the others wait for it."""
    return Measured(partial={f"timing_s/{stage}": Max(time.perf_counter() - begin)}, agreed={})


def device_memory() -> Measured:
    """The most device memory this process has held; over ranks the largest counts. Nothing on a CPU."""
    if not torch.cuda.is_available():
        return Measured(partial={}, agreed={})
    return Measured(partial={"perf/max_memory_allocated_gb": Max(torch.cuda.max_memory_allocated() / 1e9)}, agreed={})


def joined_shards(references: list[Any]) -> tuple[list[JaggedShard], JaggedShard]:
    """The rank's shards, and all of them as one."""
    parts = ray.get(references)
    return parts, cat(parts)


def scorable(
    shards: list[Any], old: list[Any], ref: list[Any], texts: list[Any], step: int
) -> tuple[list[JaggedShard], Scorable]:
    """The rank's shards, and all that a source is given of them."""
    parts, joined = joined_shards(shards)
    policy = joined_tokens(old)
    assert policy is not None, "the policy always computes log pi_old"
    rows = None if all(each is None for each in texts) else tuple(text for part in ray.get(texts) for text in part)
    return parts, Scorable(shard=joined, old=policy, ref=joined_tokens(ref), texts=rows, step=step)


def joined_tokens(references: list[Any]) -> Tensor | None:
    """Flat per-token values of the rank's shards, end to end; None where nobody computed them."""
    if all(reference is None for reference in references):
        return None
    return torch.cat([torch.as_tensor(part) for part in ray.get(references)])


def split(flat: Tensor, parts: list[JaggedShard]) -> list[Tensor]:
    """Cut flat per-token values back into the rank's shards; clones, so that each travels alone."""
    return [piece.clone() for piece in torch.split(flat, [len(part.tokens) for part in parts])]
