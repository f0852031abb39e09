"""Weights from the policy's ranks to the engines, without the driver and without disk; one call per engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlprm.actors.group import answer
from rlprm.actors.learners import Policy
from rlprm.actors.rollout import Rollouts
from rlprm.errors import StaleWeights


class ObjectStoreTransfer:
    """Rank 0 puts buckets into Ray's object store, engines read them there: the way for one machine without GPUs."""

    def __init__(self, *, bucket_bytes: int, timeout_s: float) -> None:
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self.metrics: Mapping[str, float] = {}

    def publish(self, policy: Policy, rollouts: Rollouts) -> None:
        """Replace every engine's weights by the policy's.

        Raises:
            StaleWeights: an engine received other bytes than were sent.
        """
        packed = policy.group.get(policy.group.all(lambda worker: worker.put_weights, self._bucket_bytes), "weights")
        version, manifest, references, digest = packed[0]
        received = answer(
            [engine.load_buckets.remote(version, manifest, references) for engine in rollouts.engines],
            what="rollout engines (new weights)",
            timeout_s=self._timeout_s,
        )
        check_digests(version, digest, received)
        self.metrics = {"weights/version": float(version), "weights/bytes": float(manifest.nbytes)}


class GroupTransfer:
    """Rank 0 broadcasts buckets to all engine processes over gloo or NCCL: the way between GPUs and between nodes."""

    def __init__(self, *, backend: str, bucket_bytes: int, timeout_s: float) -> None:
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._joined = False
        self.metrics: Mapping[str, float] = {}

    def publish(self, policy: Policy, rollouts: Rollouts) -> None:
        """Replace every engine's weights by the policy's.

        Raises:
            StaleWeights: an engine received other bytes than were sent.
            WorkerLost: the sender or an engine failed; whoever fails first ends the wait for the others.
        """
        if not self._joined:
            self._join(policy, rollouts)
        manifest = policy.group.get(policy.group.all(lambda worker: worker.manifest), "manifest")[0]
        version = policy.version()
        # a manifest that an engine refuses must be refused before anybody sends, or the sender waits for nobody
        self._ask([engine.check.remote(manifest) for engine in rollouts.engines])
        sending = policy.group.all(lambda worker: worker.send_weights, self._bucket_bytes)
        receiving = [engine.load_group.remote(version, manifest, self._bucket_bytes) for engine in rollouts.engines]
        # together, sender first: waiting for the receivers alone would hide why nothing reaches them
        digests = answer(
            [*sending, *receiving], what="policy and rollout engines (new weights)", timeout_s=self._timeout_s
        )
        check_digests(version, digests[0], digests[len(sending) :])
        self.metrics = {"weights/version": float(version), "weights/bytes": float(manifest.nbytes)}

    def _join(self, policy: Policy, rollouts: Rollouts) -> None:
        first = policy.group.workers[0]
        host, port = policy.group.get(first.rendezvous.remote(), "rendezvous")
        sizes = self._ask([engine.group_ranks.remote() for engine in rollouts.engines])
        world = 1 + sum(sizes)
        joining = [first.join_transfer.remote(host, port, 0, world, self._backend, self._timeout_s)]
        for number, engine in enumerate(rollouts.engines):
            rank = 1 + sum(sizes[:number])
            joining.append(engine.join_group.remote(host, port, rank, world, self._backend, self._timeout_s))
        self._ask(joining)
        self._joined = True

    def _ask(self, references: list[Any]) -> list[Any]:
        return answer(references, what="rollout engines (new weights)", timeout_s=self._timeout_s)


def check_digests(version: int, sent: str, received: list[str]) -> None:
    """Every engine must have received the very bytes that were sent."""
    wrong = [index for index, digest in enumerate(received) if digest != sent]
    if wrong:
        raise StaleWeights(
            f"engines {wrong} received other bytes than the policy sent for version {version} "
            f"(digest {received[wrong[0]][:12]} instead of {sent[:12]}); the run cannot go on with stale weights"
        )
