"""Every process of a run: where it sits, and what it holds there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from rlprm.placement import seats
from rlprm.planning.activations import ITEM
from rlprm.planning.arithmetic import Batch, Learning
from rlprm.planning.engines import Engine, engine
from rlprm.planning.hardware import Hardware
from rlprm.planning.memory import GIB, Held, Learns, Parts, Peak, frozen, learner, peak
from rlprm.planning.shapes import Shape
from rlprm.run import factories

# Measured on a CPU (see rlprm.planning.measure): a learner beside its tensors, and the same process idle.
CPU_LEARNER = 87_000_000
CPU_IDLE = 453_000_000
CPU_ENGINE = 121_000_000  # an engine beside its tensors, and idle with all that it imports
CPU_ENGINE_IDLE = 618_000_000
# Assumptions, not measured here: context, NCCL and libraries on a GPU; what torch's allocator loses; the host's side.
GPU_LEARNER = int(1.5 * GIB)
GPU_SLACK = 0.05
GPU_HOST = 3 * GIB  # of each process that has a GPU
RAY = 700_000_000  # Ray's own processes on a node, without a dashboard
VERIFIER = 150_000_000  # of each verifier process


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process (for an engine: all of its devices, which are alike)."""

    role: str
    rank: int
    node: int
    gpus: tuple[int, ...]  # of its node; empty on CPU
    peak: Peak  # on each of its GPUs; on CPU in host memory
    host: Parts  # in host memory, of a process with a GPU

    @property
    def name(self) -> str:
        return f"{self.role} {self.rank}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """A GPU, or a node's memory: who is on it, and what there is."""

    name: str
    capacity: int
    parts: Mapping[str, int]  # by process, or by part
    processes: tuple[str, ...]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All processes, and all rooms."""

    processes: tuple[Process, ...]
    gpus: tuple[Room, ...]
    hosts: tuple[Room, ...]
    store: Room | None  # Ray's object store of the node of policy rank 0; None: on a cluster that exists
    engines: Mapping[str, Engine]
    roles: Mapping[str, tuple[int, ...]]  # role -> nodes of its ranks


def layout(config: Any, shapes: Mapping[str, Shape], hardware: Hardware, batch: Batch) -> Layout:
    """Who sits where, with what in memory.

    Raises:
        ConfigError: the processes find no room at all; rlprm.planning.search looks for numbers that do.
    """
    placement = config.placement
    own = factories.own_engines(config)
    where = [
        SimpleNamespace(index=index, name=f"node{index}", cpus=hardware.node_cpus, gpus=hardware.node_gpus)
        for index in range(hardware.nodes)
    ]
    memory = None if hardware.gpu is None or placement.device == "cpu" else hardware.gpu.memory
    models = {"policy": policy_models(config, shapes, batch), "prm": prm_models(config, shapes, batch)}
    found = seats(placement, where, len(own), prm=bool(models["prm"]), advice=False)
    engines = {"rollout engine": _engine(config, shapes["model"], batch.longest, memory)}
    engines |= {f"engine of {name}": _engine(config, shapes[f"streams.{name}.source.model"], tokens, memory)
                for name, (_, tokens) in own.items()}  # fmt: skip
    free = {node.index: [1.0] * hardware.node_gpus for node in where}
    processes: list[Process] = []
    for role, nodes in (("policy", found.policy), ("prm", found.prm)):
        for rank, node in enumerate(nodes):
            processes.append(_learner_process(config, role, rank, node, models[role], free[node], memory))
    own_seats = list(zip(list(engines)[1:], found.own_engines, strict=True))
    seated = [("rollout engine", number, node) for number, node in enumerate(found.engines)]
    for name, number, node in [*seated, *((name, 0, node) for name, node in own_seats)]:
        gpus = _take(free[node], placement.gpus_per_engine * placement.tensor_parallel) if memory else ()
        beside = 0 if memory else CPU_ENGINE + CPU_ENGINE_IDLE
        parts = {**engines[name].parts, **({"framework": beside} if beside else {})}
        host: Parts = {"framework": GPU_HOST * max(1, len(gpus))} if memory else {}
        processes.append(
            Process(role=name, rank=number, node=node, gpus=gpus, peak=Peak(phase="decode", parts=parts), host=host)
        )
    roles: dict[str, tuple[int, ...]] = {}
    for process in processes:
        roles[process.role] = (*roles.get(process.role, ()), process.node)
    weights = ITEM[config.model.dtype] * shapes["model"].parameters
    return Layout(
        processes=tuple(processes),
        gpus=_gpus(processes, memory, hardware),
        hosts=tuple(
            _host(config, index, processes, models, engines, weights, hardware) for index in range(hardware.nodes)
        ),
        store=_store(config, batch, weights, hardware),
        engines=engines,
        roles=roles,
    )


def policy_models(config: Any, shapes: Mapping[str, Shape], batch: Batch) -> dict[str, Held]:
    """What a policy rank holds."""
    found = {"policy": _learner(config, shapes["model"], config.policy, _of(batch, "policy"), entropy=True)}
    if config.critic is not None:
        share = _of(batch, "critic.learner")
        found["critic"] = _learner(config, shapes["critic.model"], config.critic.learner, share, value=True)
    return found


def prm_models(config: Any, shapes: Mapping[str, Shape], batch: Batch) -> dict[str, Held]:
    """What a rank of the PRM and the reference holds."""
    found: dict[str, Held] = {}
    micro = _of(batch, "policy").micro
    if factories.needs_reference(config):
        found["reference"] = frozen(shapes["model"], micro, dtype=config.model.dtype)
    for name, section in factories.sources(config).items():
        kind = factories.kind(section)
        if section.model is None or factories.own_engine(section) or kind.reads_policy:
            continue
        shape = shapes[f"streams.{name}.source.model"]
        if section.learner is None:
            found[name] = frozen(shape, micro, dtype=config.model.dtype)
        else:
            share = _of(batch, f"streams.{name}.source.learner")
            found[name] = _learner(config, shape, section.learner, share)
    return found


def _of(batch: Batch, key: str) -> Learning:
    return next(each for each in batch.learners if each.key == key)


def _learner(
    config: Any, shape: Shape, section: Any, share: Learning, *, entropy: bool = False, value: bool = False
) -> Held:
    return learner(
        shape,
        Learns(
            micro=share.micro,
            ranks=share.ranks,
            zero=section.zero_stage,
            offload=section.offload == "cpu",
            dtype=config.model.dtype,
            attention=config.model.attention,
            checkpointing=config.model.gradient_checkpointing,
            on_gpu=config.placement.device == "cuda",
            accumulates=share.micro_batches > 1,
            entropy=entropy,
            value=value,
        ),
    )


def _learner_process(
    config: Any, role: str, rank: int, node: int, models: Mapping[str, Held], free: list[float], memory: int | None
) -> Process:
    if memory is None:
        highest = peak(models, framework=CPU_LEARNER + CPU_IDLE, slack=0.0)
        return Process(role=role, rank=rank, node=node, gpus=(), peak=highest, host={})
    highest = peak(models, framework=GPU_LEARNER, slack=GPU_SLACK)
    host: Parts = {"framework": GPU_HOST}
    for each in models.values():
        for part, size in each.host.items():
            host[part] = host.get(part, 0) + size
    # each rank reads a whole model into host memory before it goes to the GPU; one model after the other
    host["loading"] = max(each.loaded for each in models.values())
    gpus = _take(free, config.placement.gpus_per_rank)
    return Process(role=role, rank=rank, node=node, gpus=gpus, peak=highest, host=host)


def _take(free: list[float], gpus: float) -> tuple[int, ...]:
    """GPUs of a node for one process, as rlprm.placement seats it: shares from the tightest fit, others whole."""
    if gpus < 1:
        fitting = [number for number, left in enumerate(free) if left >= gpus - 1e-6]
        chosen = [min(fitting, key=lambda number: free[number])]
        free[chosen[0]] -= gpus
    else:
        chosen = [number for number, left in enumerate(free) if left == 1.0][: round(gpus)]
        for number in chosen:
            free[number] = 0.0
    return tuple(chosen)


def _engine(config: Any, shape: Shape, longest: int, memory: int | None) -> Engine:
    placement = config.placement
    return engine(
        shape,
        config.rollout.engine,
        dtype=config.model.dtype,
        longest=longest,
        tensor_parallel=placement.tensor_parallel,
        gpu_memory=memory,
        bucket=placement.weight_bucket_bytes,
    )


def _gpus(processes: list[Process], memory: int | None, hardware: Hardware) -> tuple[Room, ...]:
    if memory is None:
        return ()
    rooms = []
    for node in range(hardware.nodes):
        for gpu in range(hardware.node_gpus):
            here = [each for each in processes if each.node == node and gpu in each.gpus]
            parts = {each.name: each.peak.total for each in here}
            if here:
                name = f"node {node} GPU {gpu}"
                rooms.append(Room(name=name, capacity=memory, parts=parts, processes=tuple(parts)))
    return tuple(rooms)


def _host(
    config: Any,
    node: int,
    processes: list[Process],
    models: Mapping[str, Mapping[str, Held]],
    engines: Mapping[str, Engine],
    weights: int,
    hardware: Hardware,
) -> Room:
    """A node's memory when all of its processes are at their highest."""
    here = [each for each in processes if each.node == node]
    on_cpu = config.placement.device == "cpu"
    parts: Parts = {}
    for each in here:
        for part, size in (each.peak.parts if on_cpu else each.host).items():
            parts[part] = parts.get(part, 0) + size
    parts["Ray"] = RAY
    if node == 0:
        parts["judge and verifiers"] = CPU_IDLE + config.verifier.workers * VERIFIER
        parts["driver"] = CPU_IDLE
    store = store_bytes(config, hardware)
    if store is not None:
        parts["object store"] = min(store, store_use(config, weights))
    asynchronous = config.rollout.engine.get("asynchronous") or config.placement.tensor_parallel > 1
    if config.placement.weight_transport == "object_store" and asynchronous:
        # an engine with processes of its own gets its weights as a file in shared memory
        parts["weights in /dev/shm"] = weights * sum(each.role == "rollout engine" for each in here)
    return Room(
        name=f"node {node} memory",
        capacity=hardware.node_memory,
        parts=parts,
        processes=tuple(each.name for each in here),
    )


def store_bytes(config: Any, hardware: Hardware) -> int | None:
    """Size of a node's object store; None where a cluster that exists has its own."""
    if config.placement.ray_address is not None:
        return None
    given: int | None = config.placement.object_store_bytes
    return int(0.3 * hardware.node_memory) if given is None else given  # Ray's own choice, where /dev/shm allows it


def store_use(config: Any, weights: int, headroom: float = 1.0) -> int:
    """What lies in the object store at once: a step's batch, and the weights where they travel through it."""
    tokens = config.prompts_per_step * config.responses_per_prompt
    tokens *= config.data.max_prompt_tokens + config.max_response_tokens
    streams = len(config.streams)
    batch = tokens * (28 + 8 + 4 + 5 * streams)  # shard fields, two log-probs, advantages, rewards with their presence
    return int(headroom * (batch + (weights if config.placement.weight_transport == "object_store" else 0)))


def _store(config: Any, batch: Batch, weights: int, hardware: Hardware) -> Room | None:
    capacity = store_bytes(config, hardware)
    if capacity is None:
        return None
    travelling = weights if config.placement.weight_transport == "object_store" else 0
    parts = {"weights": travelling, "a step's batch": store_use(config, weights) - travelling}
    return Room(name="object store of node 0", capacity=capacity, parts=parts, processes=())
