"""Weights from the policy's ranks to the engines, without the driver and without disk; one call per engine.

A publish begins with a look at the engines: replacements that have become ready get the weights with the others, and
missing ones are started. An engine that is lost meanwhile is dropped; all that are left prove what they received.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rlprm.actors.engines import MAX_TRIES, raised
from rlprm.actors.learners import Policy
from rlprm.actors.rollout import Rollouts
from rlprm.engine.weights import GroupBroken
from rlprm.errors import StaleWeights, WorkerLost

WHAT = "new weights"


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
            WorkerLost: too few engines are left, or one did not answer.
        """
        rollouts.renew()
        packed = policy.group.get(policy.group.all(lambda worker: worker.put_weights, self._bucket_bytes), "weights")
        version, manifest, references, digest = packed[0]
        loading = {
            number: engine.load_buckets.remote(version, manifest, references)
            for number, engine in rollouts.engines.present().items()
        }
        check_digests(version, digest, rollouts.engines.answers(loading, what=WHAT))
        self.metrics = {"weights/version": float(version), "weights/bytes": float(manifest.nbytes)}


class GroupTransfer:
    """Rank 0 broadcasts buckets to all engine processes over gloo or NCCL: the way between GPUs and between nodes.

    The group's members are those who joined it: where other engines are there than the last time, or a broadcast broke,
    it is left and made anew. ``group_timeout_s``: longest wait of a member for the others; None: ``timeout_s``.
    """

    def __init__(
        self, *, backend: str, bucket_bytes: int, timeout_s: float, group_timeout_s: float | None = None
    ) -> None:
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._group_timeout_s = timeout_s if group_timeout_s is None else group_timeout_s
        self._members: dict[int, Any] = {}
        self.metrics: Mapping[str, float] = {}

    def publish(self, policy: Policy, rollouts: Rollouts) -> None:
        """Replace every engine's weights by the policy's.

        Raises:
            StaleWeights: an engine received other bytes than were sent.
            WorkerLost: the sender or an engine failed (whoever fails first ends the wait for the others), too few
                engines are left, or the group broke ``MAX_TRIES`` times.
        """
        rollouts.renew()
        manifest = policy.group.get(policy.group.all(lambda worker: worker.manifest), "manifest")[0]
        version = policy.version()
        for _ in range(MAX_TRIES):
            digests = self._sent(policy, rollouts, version, manifest)
            if digests is not None:
                break
            self._members = {}
        else:
            raise WorkerLost(
                f"the group of policy and rollout engines broke {MAX_TRIES} times while weights were sent; look at the "
                "network between their nodes and at the engines' logs"
            )
        sent, received = digests
        check_digests(version, sent, received)
        self.metrics = {"weights/version": float(version), "weights/bytes": float(manifest.nbytes)}

    def _sent(
        self, policy: Policy, rollouts: Rollouts, version: int, manifest: Any
    ) -> tuple[str, dict[int, str]] | None:
        """The sender's digest and each engine's; None: the group broke, or an engine was lost."""
        if self._members != rollouts.engines.present() and not self._join(policy, rollouts):
            return None
        # a manifest that an engine refuses must be refused before anybody sends, or the sender waits for nobody
        checking = {number: engine.check.remote(manifest) for number, engine in self._members.items()}
        if len(rollouts.engines.answers(checking, what=WHAT)) < len(self._members):
            return None
        receiving = {
            number: engine.load_group.remote(version, manifest, self._bucket_bytes)
            for number, engine in self._members.items()
        }
        sending = policy.group.all(lambda worker: worker.send_weights, self._bucket_bytes)
        found = self._together(policy, rollouts, sending, receiving)
        return None if found is None else (found[0][0], found[1])

    def _join(self, policy: Policy, rollouts: Rollouts) -> bool:
        """A new group of the engines that are there; False: one was lost before all had come."""
        self._mend(rollouts)
        members = rollouts.engines.present()
        first = policy.group.workers[0]
        host, port = policy.group.get(first.rendezvous.remote(), "rendezvous")
        asked = {number: engine.group_ranks.remote() for number, engine in members.items()}
        sizes = rollouts.engines.answers(asked, what=WHAT)
        if len(sizes) < len(members):
            return False
        timeout = self._group_timeout_s
        world, rank = 1 + sum(sizes.values()), 1
        meeting = [first.join_transfer.remote(host, port, 0, world, self._backend, timeout)]
        joining = {}
        for number, engine in members.items():
            joining[number] = engine.join_group.remote(host, port, rank, world, self._backend, timeout)
            rank += sizes[number]
        if self._together(policy, rollouts, meeting, joining) is None:
            return False
        self._members = members
        return True

    def _mend(self, rollouts: Rollouts) -> None:
        """Make engines whose load broke off (here, or with a policy that was lost) ready for another, or drop them."""
        asked = {number: engine.mend.remote() for number, engine in rollouts.engines.present().items()}
        for number, mended in rollouts.engines.answers(asked, what=WHAT).items():
            if not mended:
                rollouts.engines.lose(number, "a broadcast broke off, and its model cannot be loaded again")

    def _together(
        self, policy: Policy, rollouts: Rollouts, sending: list[Any], receiving: dict[int, Any]
    ) -> tuple[list[Any], dict[int, Any]] | None:
        """Answers of both sides; None: an engine was lost or the group broke, and everybody has noticed.

        Who fails for a reason of its own is told at once: waiting for the others would hide it. A group that broke is
        no such reason, it says that another is lost, whom Ray may take a while to miss.
        """
        who: dict[Any, int | None] = {reference: None for reference in sending}
        who |= {reference: number for number, reference in receiving.items()}
        found: dict[Any, Any] = {}
        lost: dict[int, RayError] = {}
        waiting, deadline, broken = list(who), time.monotonic() + self._timeout_s, False
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                raise WorkerLost(
                    f"{self._named(rollouts, [who[reference] for reference in waiting])} did not answer within "
                    f"{self._timeout_s:.0f} s ({WHAT}); raise placement.stage_timeout_s if it was still working"
                )
            (reference,) = ready
            number = who[reference]
            try:
                found[reference] = ray.get(reference, timeout=self._timeout_s)
            except GetTimeoutError as error:
                raise raised(error, self._named(rollouts, [number])) from error
            except RayTaskError as error:
                if not is_broken(error):
                    raise raised(error, f"{self._named(rollouts, [number])} ({WHAT})") from error
                broken = True
            except RayActorError as error:
                if number is None:
                    policy.group.get(reference, WHAT)  # raises, in the words that learners have for it
                else:
                    lost[number] = error
        for number, error in sorted(lost.items()):
            rollouts.engines.lose(number, error)
        if broken or lost:
            return None
        return [found[reference] for reference in sending], {
            number: found[reference] for number, reference in receiving.items()
        }

    def _named(self, rollouts: Rollouts, numbers: list[int | None]) -> str:
        return ", ".join("the policy" if number is None else rollouts.engines.name(number) for number in numbers)


def is_broken(error: RayTaskError) -> bool:
    """Did this member leave because the group broke? An engine with workers of its own passes on their words only."""
    return isinstance(error.cause, GroupBroken) or "the weights' group" in str(error.cause)


def check_digests(version: int, sent: str, received: Mapping[int, str]) -> None:
    """Every engine must have received the very bytes that were sent."""
    wrong = [number for number, digest in received.items() if digest != sent]
    if wrong:
        raise StaleWeights(
            f"engines {wrong} received other bytes than the policy sent for version {version} "
            f"(digest {received[wrong[0]][:12]} instead of {sent[:12]}); the run cannot go on with stale weights"
        )
