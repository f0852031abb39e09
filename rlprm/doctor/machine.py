"""What a node is made of: GPUs, cores, memory, shared memory, open files; and whether the placement fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlprm.doctor.finding import ALL, Finding, fail, gigabytes, ok, warn
from rlprm.doctor.wanted import Wanted
from rlprm.errors import ConfigError
from rlprm.placement import Seats, seats
from rlprm.planning.memory import offloaded

MIN_OPEN_FILES = 1024
FEW_OPEN_FILES = 8192  # Ray holds a few sockets per process and per node, vLLM more
STORE_SHARE = 0.9  # of the object store for weights
RAY_SHARE = 0.3  # of memory for the object store, where nothing else is said
RAY_BYTES = 700 << 20  # Ray itself
LEARNER_BYTES = 600 << 20  # torch, DeepSpeed and transformers in one process
ENGINE_BYTES = 950 << 20  # vLLM in one process
CPU_STATE = 16  # bytes per trained number: weights, gradient and two moments in float32
IN_USE = 0.05  # of a GPU's memory before a run begins


def placed(wanted: Wanted, nodes: Sequence[Any]) -> tuple[Seats | None, list[Finding]]:
    """Who would sit where, and whether it fits."""
    if wanted.placement is None:
        return None, []
    try:
        found = seats(wanted.placement, nodes, wanted.own_engines, prm=wanted.prm)
    except ConfigError as error:
        return None, [fail("placement", ALL, str(error), "")]
    words = ", ".join(
        f"{node.name}: {_roles(found, node.index)}" for node in nodes if found.on(node.index) or len(nodes) == 1
    )
    return found, [ok("placement", ALL, words)]


def _roles(found: Seats, index: int) -> str:
    counts = {
        "policy": found.policy.count(index),
        "PRM": found.prm.count(index),
        "engines": found.engines.count(index),
        "own engines": found.own_engines.count(index),
    }
    return " + ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing"


def gpus(node: str, facts: Mapping[str, Any], wanted: Wanted, here: int | None) -> Iterator[Finding]:
    """``here``: GPUs that the placement takes of this node; None: it is not known where what sits."""
    found = facts["gpus"]
    if wanted.placement is None:
        yield ok("GPUs", node, _kinds(found) or "none")
        return
    if wanted.device != "cuda":
        names = f" ({len(found)} are there)" if found else ""
        yield ok("GPUs", node, f"none needed{names}")
        return
    if not found:
        why = "nvidia-smi names none" if facts["programs"]["nvidia-smi"] else "there is no nvidia-smi"
        yield fail("GPUs", node, f"{why} and placement.device is cuda",
                   "load the NVIDIA driver (container: --gpus all, or the nvidia runtime), or use placement=cpu")  # fmt: skip
        return
    kinds = _kinds(found)
    if here is not None and len(found) < here:
        yield fail("GPUs", node, f"{kinds}; the placement takes {here} of this node",
                   "use fewer ranks or engines, or nodes with more GPUs")  # fmt: skip
        return
    busy = [each for each in found if each["memory"] and each["used"] > IN_USE * each["memory"]]
    if busy:
        words = ", ".join(f"GPU {each['index']}: {gigabytes(each['used'])}" for each in busy)
        yield warn("GPUs", node, f"{kinds}; in use before the run begins: {words}",
                   "end the processes that nvidia-smi lists, or leave these GPUs out (CUDA_VISIBLE_DEVICES)")  # fmt: skip
        return
    yield ok("GPUs", node, kinds)


def _kinds(found: Sequence[Mapping[str, Any]]) -> str:
    names = [f"{each['name']} {gigabytes(each['memory'])}" for each in found]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def gpus_on(found: Seats | None, index: int, placement: Any) -> int | None:
    """GPUs that the placement takes of node ``index``."""
    if found is None:
        return None
    ranks = found.policy.count(index) + found.prm.count(index)
    engines = found.engines.count(index) + found.own_engines.count(index)
    share = ranks * placement.gpus_per_rank + engines * placement.gpus_per_engine * placement.tensor_parallel
    return int(-(-share // 1))


def cores(node: str, facts: Mapping[str, Any], wanted: Wanted, processes: int | None) -> Iterator[Finding]:
    """Computing threads against the cores there are; ``processes`` of the run on this node."""
    count, quota = facts["cores"]["count"], facts["cores"]["quota"]
    have = count if quota is None else min(count, quota)
    said = (
        f"{count} cores" if quota is None or quota >= count else f"{count} cores, of which the container gets {quota:g}"
    )
    omp = facts["environment"]["OMP_NUM_THREADS"]
    shown = f"{said}, OMP_NUM_THREADS {omp or 'not set'}"
    threads = 1 if wanted.placement is None else wanted.placement.threads
    if threads > have:
        yield fail("threads", node, f"{said}, and each process computes with {threads} threads (placement.threads)",
                   f"set placement.threads={max(1, int(have) // max(1, processes or 1))}")  # fmt: skip
    elif processes and threads > 1 and threads * processes > have:
        yield warn("threads", node, f"{said} for {processes} processes of {threads} threads: they will wait for each other",
                   f"set placement.threads={max(1, int(have) // processes)}")  # fmt: skip
    elif omp and omp.isdecimal() and int(omp) > have:
        yield warn("threads", node, shown, f"export OMP_NUM_THREADS={threads}: more threads than cores each only fight")
    else:
        yield ok("threads", node, shown)


def memory(node: str, facts: Mapping[str, Any], wanted: Wanted, needed: float | None) -> Iterator[Finding]:
    """Free memory of the host against a rough need; ``rlprm plan`` is exact."""
    free, total = facts["memory"]["available"], facts["memory"]["total"]
    have = f"{gigabytes(free)} free of {gigabytes(total)}"
    if needed is None:
        yield ok("host memory", node, have)
    elif free < 0.5 * needed:
        yield fail("host memory", node, f"{have}, the run takes about {gigabytes(needed)} here",
                   "end other processes, use fewer ranks or engines, or a node with more memory (see rlprm plan)")  # fmt: skip
    elif free < needed:
        yield warn("host memory", node, f"{have}, the run takes about {gigabytes(needed)} here",
                   "end other processes; rlprm plan says what takes how much")  # fmt: skip
    else:
        yield ok("host memory", node, f"{have}, about {gigabytes(needed)} needed")


def memory_needed(found: Seats | None, index: int, wanted: Wanted, facts: Mapping[str, Any]) -> float | None:
    """Bytes of host memory that the run takes on node ``index``; None where it is not known."""
    if found is None:
        return None
    ranks = found.policy.count(index) + found.prm.count(index)
    engines = found.engines.count(index) + found.own_engines.count(index)
    sizes = [facts["models"][path]["parameters"] for path in wanted.models.values()]
    largest = max(sizes, default=0)
    store = wanted.store_bytes or 0
    width = 4 if wanted.dtype == "float32" else 2
    base = RAY_BYTES + store + ranks * LEARNER_BYTES + engines * ENGINE_BYTES
    if wanted.device == "cuda":
        # every process reads a whole model before it goes to the GPU
        return float(base + (ranks + engines) * width * largest + _offloaded(found, index, wanted, facts))
    cache = (wanted.rollout or {}).get("kv_cache_bytes") or 0
    return float(base + ranks * CPU_STATE * largest + engines * (width * largest + cache))


def _offloaded(found: Seats, index: int, wanted: Wanted, facts: Mapping[str, Any]) -> int:
    """Bytes of optimizer states (and of what else offload=cpu leaves on the host) of the ranks on node ``index``."""
    ranks = {"policy": found.policy, "prm": found.prm}
    total = 0
    for each in wanted.offloaded:
        seated = ranks[each.role]
        known = facts["models"].get(each.folder)
        if seated and known is not None:
            one = offloaded(known["parameters"], ranks=len(seated), zero=each.zero_stage, dtype=wanted.dtype)
            total += seated.count(index) * sum(one.values())
    return total


def shared_memory(
    node: str, facts: Mapping[str, Any], wanted: Wanted, store_bytes: int | None, running: bool
) -> Iterator[Finding]:
    """``store_bytes``: of this node's object store, None: Ray will decide; ``running``: Ray has it already."""
    shared = facts["shared_memory"]
    if shared is None:
        yield warn("shared memory", node, "there is no /dev/shm", "mount one; without it Ray copies through the disk")
        return
    weights = max((facts["models"][path]["bytes"] for path in wanted.models.values()), default=0)
    sends = wanted.placement is not None and getattr(wanted.placement, "weight_transport", None) == "object_store"
    through = int(weights / STORE_SHARE) if sends else 0
    # a running store has taken its part of what is free already, all at once or page by page
    room = shared["total"] if running else shared["free"]
    word = "" if running else "free"
    have = f"{gigabytes(room)} {word}".strip()
    store = store_bytes if store_bytes is not None else through
    if store_bytes is not None and through > store_bytes:
        yield fail("shared memory", node,
                   f"the object store has {gigabytes(store_bytes)} and the weights, {gigabytes(weights)}, travel through it",
                   f"set placement.object_store_bytes={through} (of a running cluster: ray start "
                   f"--object-store-memory {through}), or another placement.weight_transport")  # fmt: skip
    elif room < store:
        size = f"--shm-size {-(-store // 10**9) + 1}g"
        yield fail("shared memory", node, f"{have}, the object store takes {gigabytes(store)}",
                   f"start the container with {size}, or lower placement.object_store_bytes")  # fmt: skip
    elif store_bytes is None and room < RAY_SHARE * facts["memory"]["total"] and room < 2 * through + 2**30:
        yield warn("shared memory", node, f"{have}; Ray would like {RAY_SHARE:.0%} of {gigabytes(facts['memory']['total'])}",
                   "start the container with more --shm-size, or set placement.object_store_bytes")  # fmt: skip
    else:
        takes = f", the object store takes {gigabytes(store)}" if store else ""
        yield ok("shared memory", node, f"{have}{takes}")


def open_files(node: str, facts: Mapping[str, Any]) -> Iterator[Finding]:
    """The limit of open files, which Ray's sockets reach first."""
    limit = facts["open_files"]
    shown = "no limit" if limit < 0 or limit > 2**40 else f"at most {limit}"
    if 0 <= limit < MIN_OPEN_FILES:
        yield fail("open files", node, shown, "ulimit -n 65536 (container: --ulimit nofile=65536:65536)")
    elif 0 <= limit < FEW_OPEN_FILES:
        yield warn(
            "open files", node, shown, "ulimit -n 65536 before Ray is started: large runs hold thousands of sockets"
        )
    else:
        yield ok("open files", node, shown)


def programs(node: str, facts: Mapping[str, Any], wanted: Wanted) -> Iterator[Finding]:
    """vLLM on a CPU asks `lscpu` about the machine, and dies where there is none."""
    target = "" if wanted.rollout is None else str(wanted.rollout.get("_target_", ""))
    if wanted.device == "cpu" and target.endswith(".vllm") and not facts["programs"]["lscpu"]:
        yield fail("programs", node, "no lscpu, which vLLM on a CPU calls when it starts", "install util-linux")
