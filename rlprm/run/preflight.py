"""What is examined on all nodes of a cluster before a run: :func:`preflight` for a launch, :func:`examine` for `rlprm doctor`.

Importing this module imports neither Ray nor torch.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlprm.doctor.finding import ALL, HERE, Finding, fail, ok, timed
from rlprm.errors import ConfigError

if TYPE_CHECKING:
    from rlprm.doctor.wanted import Wanted
    from rlprm.launch.task import Task

ANSWER_S = 60.0  # for a node to start a process and answer; a cold file system is slow
REDUCE_S = 60.0
PAIRS_LIMIT_S = 180.0  # for trying each two nodes by themselves, after all together have failed
SETTLE_S = 240.0  # for both engines to load, at least
ROOT = Path(__file__).resolve().parents[2]


def preflight(address: str, task: Task) -> list[Finding]:
    """The findings for the cluster at ``address`` and the command of ``task``; none where its preflight is off.

    Raises:
        ConfigError: the command's configuration is wrong, or no cluster answers at ``address``.
    """
    if task.preflight == "off":
        return []
    from rlprm.doctor.wanted import wanted

    asked = wanted(configuration(task.command))
    if task.object_store_bytes is not None:
        asked = replace(asked, store_bytes=task.object_store_bytes)
    return examine(address, asked, quick=task.preflight == "quick", expected=task.nodes)


def configuration(command: Sequence[str]) -> Any:
    """The validated configuration behind ``rlprm COMMAND ...``; None where the command has none of its own.

    Raises:
        ConfigError: as the command itself would say it.
    """
    from rlprm.cli.doctor import configured

    return configured(command[0], command[1:])


def examine(address: str, wanted: Wanted, *, quick: bool, expected: int = 1) -> list[Finding]:
    """The findings for all nodes of the cluster at ``address``; ``quick``: no all-reduce and no engines.

    Raises:
        ConfigError: no cluster answers at ``address``.
    """
    from rlprm.actors.cluster import cluster

    with cluster(address=address, num_actors=0, gpus=0.0, object_store_bytes=None, working_dir=str(ROOT)):
        return examined(wanted, quick=quick, expected=expected)


def examined(wanted: Wanted, *, quick: bool, expected: int = 1) -> list[Finding]:
    """As :func:`examine`, for the cluster that this process is connected to."""
    from rlprm.actors.nodes import nodes
    from rlprm.doctor import services
    from rlprm.doctor.judging import judged

    there = distinct(nodes())
    findings = timed(enough, [node.name for node in there], max(expected, wanted.nodes))
    with ThreadPoolExecutor(max_workers=2) as threads:
        asking = threads.submit(timed, services.wandb, HERE, wanted)
        judging = threads.submit(timed, services.verifier, HERE, wanted.verifier)
        begin = time.perf_counter()
        facts, silent = gathered(there, wanted)
        spent = time.perf_counter() - begin
        findings += [replace(each, seconds=spent) for each in silent]
        alive = [node for node in there if node.name in facts]
        if alive:
            about = judged(facts, wanted, alive, stores(alive), True)
            # one question to each node was about all of these
            findings += [replace(each, seconds=each.seconds + spent / len(about)) for each in about]
            findings += between(alive, wanted, facts, quick=quick)
            if not quick:
                findings += timed(engines, alive, wanted, facts, findings)
        return [*findings, *judging.result(), *asking.result()]


def distinct(there: Sequence[Any]) -> list[Any]:
    """Nodes under names that tell them apart: several of one address and without a name get their number.

    >>> from types import SimpleNamespace
    >>> one, two = (SimpleNamespace(name="10.0.0.1", index=index) for index in (0, 1))
    >>> distinct([one]) == [one]
    True
    """
    names = [node.name for node in there]
    return [node if names.count(node.name) == 1 else replace(node, name=f"{node.name}#{node.index}") for node in there]


def enough(there: Sequence[str], count: int) -> Iterator[Finding]:
    """Are all nodes of the run there?"""
    if len(there) < count:
        yield fail("nodes", ALL, f"{len(there)} of {count} are there ({', '.join(there)})",
                   "start the others, or lower placement.nodes")  # fmt: skip
    else:
        yield ok("nodes", ALL, f"{len(there)} are there ({', '.join(there)})")


def gathered(there: Sequence[Any], wanted: Wanted) -> tuple[dict[str, Mapping[str, Any]], list[Finding]]:
    """What each node has, by name; and those that do not say."""
    import ray

    from rlprm.actors import facts
    from rlprm.actors.nodes import Failed, on_each

    nonce = f".rlprm-{secrets.token_hex(8)}"
    head = there[:1]
    if wanted.folder is not None:
        on_each(head, facts.leave, wanted.folder, nonce, timeout_s=ANSWER_S, options={})
    gcs = ray.get_runtime_context().gcs_address
    asked = (wanted.folder, nonce if wanted.folder else None, tuple(wanted.models.values()), wanted.data, gcs)
    answers = on_each(there, facts.gather, *asked, timeout_s=ANSWER_S, options={})
    if wanted.folder is not None:
        on_each(head, facts.clear, wanted.folder, nonce, timeout_s=ANSWER_S, options={})
    found = {node.name: each for node, each in zip(there, answers, strict=True) if not isinstance(each, Failed)}
    silent = [
        fail("answer", node.name, each.reason, "is rlprm installed there, at the same path and for the same Python?")
        for node, each in zip(there, answers, strict=True)
        if isinstance(each, Failed)
    ]
    return found, silent


def stores(there: Sequence[Any]) -> dict[str, int | None]:
    """Bytes of each node's object store, as Ray has made it."""
    import ray

    sizes = {each["NodeID"]: each["Resources"].get("object_store_memory") for each in ray.nodes() if each["Alive"]}
    return {node.name: None if sizes.get(node.id) is None else int(sizes[node.id]) for node in there}


def between(
    there: Sequence[Any], wanted: Wanted, facts: Mapping[str, Mapping[str, Any]], *, quick: bool
) -> list[Finding]:
    """What nodes find on trying each other."""
    from rlprm.doctor.wanted import device_of

    found = met(there) if len(there) > 1 else []
    if quick or any(each.level == "fail" for each in found if each.check != "clock"):
        return found
    backend = "gloo" if device_of(wanted, facts) == "cpu" else "nccl"
    return [*found, *timed(reduced, there, {name: len(each["gpus"]) for name, each in facts.items()}, backend)]


def met(there: Sequence[Any]) -> list[Finding]:
    """Clocks and addresses."""
    from rlprm.actors.probes import Probes
    from rlprm.doctor import network

    probes = Probes(there, gpus=0.0, timeout_s=ANSWER_S)
    try:
        found = timed(lambda: network.clock(probes.offsets(ANSWER_S)))
        found += timed(lambda: network.connections(probes.mesh(ANSWER_S)))
        silent = dict(probes.silent)
    finally:
        probes.close()
    return [*found, *(fail("answer", name, why, "look at the Ray logs of this node") for name, why in silent.items())]


def ranks_of(there: Sequence[Any], gpus: Mapping[str, int], backend: str) -> list[Any]:
    """Who takes part in the all-reduce: every node, or every GPU of every node."""
    if backend == "gloo":
        return list(there)
    return [replace(node, name=f"{node.name}:{number}") for node in there for number in range(gpus[node.name])]


def reduced(nodes: Sequence[Any], count: Mapping[str, int], backend: str) -> list[Finding]:
    """An all-reduce between all of them, and between each two nodes (or GPUs of one) where all together do badly.

    ``count``: GPUs by node.
    """
    from rlprm.actors.probes import Probes
    from rlprm.doctor import reduction

    there, gpus = ranks_of(nodes, count, backend), 1.0 if backend == "nccl" else 0.0
    if len(there) < 2:
        return []
    probes = Probes(there, gpus=gpus, timeout_s=ANSWER_S)
    try:
        if probes.silent:
            return [fail("all-reduce", name, why, "look at the Ray logs of this node; is a GPU of it free?")
                    for name, why in probes.silent.items()]  # fmt: skip
        together = probes.reduced(probes.names, backend, REDUCE_S)
    finally:
        probes.close()
    apart: dict[tuple[str, str], Mapping[str, Any]] = {}
    if len(there) > 2 and reduction.suspicious(together, backend):
        apart = in_pairs(nodes if len(nodes) > 1 else there, backend, gpus)
    return list(reduction.findings(together, backend, apart))


def in_pairs(there: Sequence[Any], backend: str, gpus: float) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Each two nodes by themselves, as many pairs at a time as there can be, in fresh processes."""
    from rlprm.actors.probes import Probes
    from rlprm.doctor import reduction

    deadline = time.monotonic() + PAIRS_LIMIT_S
    by_name = {node.name: node for node in there}
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for at_once in reduction.pairs([node.name for node in there]):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        probes = Probes([by_name[name] for pair in at_once for name in pair], gpus=gpus, timeout_s=ANSWER_S)
        try:
            with ThreadPoolExecutor(max_workers=len(at_once)) as threads:
                tries = {
                    pair: threads.submit(probes.reduced, pair, backend, min(REDUCE_S / 2, left)) for pair in at_once
                }
                for pair, future in tries.items():
                    both = future.result()
                    found[pair] = next((each for each in both.values() if each["problem"]), next(iter(both.values())))
        finally:
            probes.close()
    return found


def engines(
    there: Sequence[Any], wanted: Wanted, facts: Mapping[str, Mapping[str, Any]], before: Sequence[Finding]
) -> list[Finding]:
    """Log-probs of both engines on fixed tokens, each on the first node where the run has such a process."""
    from rlprm.doctor import parity

    head = there[0].name
    told = parity.asked(wanted, facts[head])
    if told is None:
        return []
    if any(
        each.level == "fail" and each.check in ("model", "versions", "GPUs", "programs", "placement") for each in before
    ):
        return [parity.not_tried(ALL, "what failed above comes first")]
    seats = seats_of_sides(there, wanted)
    if why := next((why for node in seats.values() if (why := parity.too_large(told, facts[node.name]))), ""):
        return [parity.not_tried(ALL, why)]
    answers = sides(seats, told, wanted)
    for side, found in answers.items():
        if isinstance(found, str):
            return [parity.no_answer(seats[side].name, side, found)]
    where = " and ".join(dict.fromkeys(node.name for node in seats.values()))
    return list(parity.compared(where, answers["rollout engine"], answers["trainer"], told["dtype"]))


def seats_of_sides(there: Sequence[Any], wanted: Wanted) -> dict[str, Any]:
    """Nodes of the first engine and of the first policy rank."""
    from rlprm.placement import seats

    found = seats(wanted.placement, there, wanted.own_engines, prm=wanted.prm)
    by_index = {node.index: node for node in there}
    return {"rollout engine": by_index[found.engines[0]], "trainer": by_index[(found.policy or found.engines)[0]]}


def sides(seats: Mapping[str, Any], told: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
    """Each side's log-probs, or in words why there are none; on GPUs one after the other."""
    from rlprm.actors.cluster import actor_environment
    from rlprm.actors.nodes import Failed, on_each
    from rlprm.actors.parity import side_of
    from rlprm.engine.generator_vllm import cpu_environment

    threads = wanted.placement.threads
    common = dict(actor_environment(device=wanted.device, threads=threads))
    engine = {**common, **cpu_environment(threads)} if wanted.device == "cpu" else common
    environment = {"trainer": common, "rollout engine": engine}
    gpus = {"trainer": 1.0, "rollout engine": float(wanted.placement.tensor_parallel)}
    timeout = max(SETTLE_S, wanted.placement.start_timeout_s)

    def ask(side: str) -> Any:
        options = {
            "num_gpus": gpus[side] if wanted.device == "cuda" else 0,
            "runtime_env": {"env_vars": {"PYTHONPATH": _python_path(), **environment[side]}},
        }
        answer = on_each([seats[side]], side_of, side, dict(told), timeout_s=timeout, options=options)[0]
        return answer.reason if isinstance(answer, Failed) else answer

    with ThreadPoolExecutor(max_workers=2 if wanted.device == "cpu" else 1) as pool:
        futures = {side: pool.submit(ask, side) for side in ("rollout engine", "trainer")}
        return {side: future.result() for side, future in futures.items()}


def _python_path() -> str:
    before = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([str(ROOT), before]) if before else str(ROOT)


def connectable(address: str | None) -> str | None:
    """A cluster's address as the command line or the configuration gives it.

    Raises:
        ConfigError: it is none.
    """
    if address is None:
        return None
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"address {address!r}; expected HOST:PORT of Ray's head, for example 10.0.0.1:6379")
    return address
