"""This machine, before Ray is started on it: everything local, in processes of their own where it changes a process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlprm.actors import facts as node_facts
from rlprm.doctor import network, parity, reduction, services
from rlprm.doctor.finding import HERE, Finding, timed, warn
from rlprm.doctor.judging import judged
from rlprm.doctor.wanted import Wanted, device_of

REDUCE_LIMIT_S = 90.0  # two processes that import torch on a busy machine
SETTLE_S = 240.0  # for both engines to load, where the configuration says nothing


def examine(wanted: Wanted, *, quick: bool) -> list[Finding]:
    """The findings for this machine. ``quick``: no all-reduce and no engines."""
    begin = time.perf_counter()
    found = node_facts.gather(wanted.folder, None, tuple(wanted.models.values()), wanted.data, None)
    facts = {HERE: found}
    spent = time.perf_counter() - begin
    node = SimpleNamespace(
        index=0, name=HERE, address="127.0.0.1", cpus=float(found["cores"]["count"]), gpus=float(len(found["gpus"]))
    )
    findings = judged(facts, wanted, [node], {HERE: wanted.store_bytes}, False)
    findings += timed(
        network.ports, HERE, wanted, {p: node_facts.listening_on(p) for p in network.wanted_ports(wanted)}
    )
    findings += timed(network.clock_here, HERE, found["time"], newest())
    findings += alone(wanted)
    # the facts were gathered for all of these together
    findings = [replace(each, seconds=each.seconds + spent / len(findings)) for each in findings]
    with ThreadPoolExecutor(max_workers=2) as threads:
        asking = threads.submit(timed, services.wandb, HERE, wanted)
        judging = threads.submit(timed, services.verifier, HERE, wanted.verifier)
        if not quick:
            findings += timed(collective, wanted, facts)
            findings += timed(engines, wanted, found, findings)
        return [*findings, *judging.result(), *asking.result()]


def newest() -> float:
    """When rlprm's newest file was written."""
    import rlprm

    return max(file.stat().st_mtime for file in Path(rlprm.__file__).resolve().parent.rglob("*.py"))


def alone(wanted: Wanted) -> Iterator[Finding]:
    """Only one machine was looked at, and the configuration needs more."""
    if wanted.nodes > 1:
        yield warn("nodes", HERE, f"placement.nodes is {wanted.nodes} and only this machine was examined",
                   "give --address HOST:PORT of a running cluster; rlprm launch examines all nodes before the run")  # fmt: skip


def collective(wanted: Wanted, facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """An all-reduce between processes of this machine: one per GPU, two on CPU."""
    if device_of(wanted, facts) == "cpu":
        return reduction.here(2, "gloo", REDUCE_LIMIT_S, ())
    visible = [each["index"] for each in facts[HERE]["gpus"]]
    return reduction.here(len(visible), "nccl", REDUCE_LIMIT_S, visible) if len(visible) > 1 else []


def engines(wanted: Wanted, facts: Mapping[str, Any], before: list[Finding]) -> list[Finding]:
    """Log-probs of both engines, unless something that was found makes the try useless."""
    told = parity.asked(wanted, facts)
    if told is None:
        return []
    if any(each.level == "fail" and each.check in ("model", "versions", "GPUs", "programs") for each in before):
        return [parity.not_tried(HERE, "what failed above comes first")]
    if why := parity.too_large(told, facts):
        return [parity.not_tried(HERE, why)]
    return parity.here(HERE, told, environments(wanted), max(SETTLE_S, wanted.placement.start_timeout_s))


def environments(wanted: Wanted) -> dict[str, dict[str, str]]:
    """What each side's process starts with, as in a run."""
    from rlprm.actors.cluster import actor_environment
    from rlprm.actors.network import addresses, variables
    from rlprm.engine.generator_vllm import cpu_environment

    threads = wanted.placement.threads
    common = dict(actor_environment(device=wanted.device, threads=threads))
    local = variables("127.0.0.1", addresses())
    engine = common | cpu_environment(threads) if wanted.device == "cpu" else common
    return {"rollout engine": engine | local, "trainer": common | local}
