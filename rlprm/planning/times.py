"""How long a step takes, phase by phase: a roofline with stated efficiencies. Estimates, not measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlprm.planning.activations import ITEM
from rlprm.planning.arithmetic import Batch, Learning
from rlprm.planning.hardware import Hardware
from rlprm.planning.processes import Layout, policy_models, prm_models
from rlprm.planning.shapes import Shape
from rlprm.run import factories

TRAINING = 0.40  # of peak flops, forward and backward passes
PREFILL = 0.50  # of peak flops, prompts in an engine
BANDWIDTH = 0.70  # of the memory's, decoding
LINK = 0.60  # of one direction between GPUs or nodes, collectives
DECODE_STEP_S = 0.006  # an engine's own work for each step of decoding
PARALLEL_S = 30e-6  # of each layer's two all-reduces, where several GPUs share an engine
MICRO_S = 0.02  # a micro-batch's own cost, whatever its size
DIGEST = 1.0e9  # bytes per second: weights are hashed on both sides
CPU_FLOPS = 3.0e10  # of one core in float32
CPU_BANDWIDTH = 8.0e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Seconds of a phase, and what it waits for."""

    name: str
    seconds: float
    beside: str | None = None  # the phase that runs at the same time on other devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """A step; ``response`` is the mean length that was assumed."""

    phases: tuple[Phase, ...]
    step: float
    run: float
    response: int


def times(
    config: Any, shapes: Mapping[str, Shape], hardware: Hardware, batch: Batch, where: Layout, response: int
) -> Times:
    """The phases of a step with responses of ``response`` tokens on the mean."""
    speed = _Speed(config, hardware)
    prompt = config.data.max_prompt_tokens // 2
    number = batch.prompts * batch.responses
    tokens = number * (prompt + response)
    policy, ranks = shapes["model"], config.placement.policy_ranks
    rollout = _rollout(config, policy, batch, where, speed, prompt, response)
    old = speed.forward(policy, tokens, prompt + response, ranks)
    found = [Phase(name="rollout", seconds=rollout), Phase(name="old log-probs", seconds=old)]
    shared = _shared(where)
    prm = prm_models(config, shapes, batch)
    prm_ranks = config.placement.prm_ranks
    if "reference" in prm:
        seconds = speed.forward(policy, tokens, prompt + response, prm_ranks)
        beside = None if shared else "old log-probs"
        found.append(Phase(name="reference log-probs", seconds=seconds, beside=beside))
    update = _update(
        policy,
        _of(batch, "policy"),
        config.policy.zero_stage,
        tokens,
        prompt + response,
        speed,
        _spread(where, "policy"),
    )
    if "critic" in policy_models(config, shapes, batch):
        shape, share = shapes["critic.model"], _of(batch, "critic.learner")
        zero = config.critic.learner.zero_stage
        update += _update(shape, share, zero, tokens, prompt + response, speed, _spread(where, "policy"))
        update += speed.forward(shape, tokens, prompt + response, ranks)
    learnt = 0.0
    for name, section in factories.sources(config).items():
        if name not in prm:
            continue
        shape = shapes[f"streams.{name}.source.model"]
        found.append(Phase(name=f"score {name}", seconds=speed.forward(shape, tokens, prompt + response, prm_ranks)))
        if section.learner is not None:
            share = _of(batch, f"streams.{name}.source.learner")
            zero = section.learner.zero_stage
            learnt += _update(shape, share, zero, tokens, prompt + response, speed, _spread(where, "prm"))
    found.append(Phase(name="policy update", seconds=update))
    if learnt:
        found.append(Phase(name="PRM update", seconds=learnt, beside=None if shared else "policy update"))
    found.append(Phase(name="weight sync", seconds=_sync(config, policy, speed, where)))
    step = _together(found)
    return Times(phases=tuple(found), step=step, run=step * config.steps, response=response)


class _Speed:
    """What the devices do in a second."""

    def __init__(self, config: Any, hardware: Hardware) -> None:
        gpu = hardware.gpu if config.placement.device == "cuda" else None
        self.item = ITEM[config.model.dtype]
        self.checkpointing = config.model.gradient_checkpointing
        slower = 8 if self.item == 4 else 1  # float32 (TF32 is off) against dense bf16, roughly
        self.share = min(1.0, config.placement.gpus_per_rank) if gpu else 1.0
        self.flops = gpu.flops / slower if gpu else CPU_FLOPS * config.placement.threads / TRAINING
        self.bandwidth = gpu.bandwidth if gpu else CPU_BANDWIDTH / BANDWIDTH
        self.link = LINK * gpu.link / 2 if gpu else 1e9
        self.network = LINK * hardware.network

    def work(self, shape: Shape, tokens: int, longest: int) -> int:
        """Flops of a forward pass; causal attention reads half of the sequence on the mean."""
        return tokens * (2 * shape.matrix_parameters + 2 * shape.layers * shape.query * longest)

    def forward(self, shape: Shape, tokens: int, longest: int, ranks: int) -> float:
        return self.work(shape, tokens, longest) / (ranks * self.flops * self.share * TRAINING)


def _update(shape: Shape, share: Learning, zero: int, tokens: int, longest: int, speed: _Speed, spread: bool) -> float:
    """Forward and backward passes over the batch, and DeepSpeed's collectives."""
    passes = 4 if speed.checkpointing else 3
    work = share.epochs * passes * speed.work(shape, tokens, longest)
    seconds = work / (share.ranks * speed.flops * speed.share * TRAINING)
    micros = share.steps_per_batch * share.micro_batches
    if share.ranks > 1:
        ring = 2 * (share.ranks - 1) / share.ranks
        way = speed.network if spread else speed.link
        # gradients travel in float32; from ZeRO-2 on after every micro-batch, for which ZeRO-3 gathers all weights too
        bytes_each = ring * 4 if zero < 3 else ring / 2 * (4 + (passes - 1) * speed.item)
        rounds = micros if zero > 1 else share.steps_per_batch
        seconds += (rounds * bytes_each + share.steps_per_batch * ring / 2 * speed.item) * shape.parameters / way
    return seconds + micros * MICRO_S


def _rollout(
    config: Any, shape: Shape, batch: Batch, where: Layout, speed: _Speed, prompt: int, response: int
) -> float:
    """Decoding reads all weights and the sequences' keys and values for every token."""
    placement, engine = config.placement, where.engines["rollout engine"]
    each = -(-batch.prompts * batch.responses // placement.engines)
    parallel = placement.tensor_parallel
    token = shape.kv_bytes(speed.item) / parallel
    together = min(
        int(config.rollout.engine["max_num_seqs"]), each, max(1, int(engine.cache / (token * (prompt + response))))
    )
    prompts = (
        batch.prompts / placement.engines * (1 if config.rollout.engine.get("prefix_caching") else batch.responses)
    )
    prefill = 2 * shape.matrix_parameters * prompts * prompt / (parallel * speed.flops * PREFILL)
    cache = shape.kv_bytes(speed.item) * (prompt + response / 2)
    reading = (speed.item * shape.matrix_parameters + together * cache) / (parallel * speed.bandwidth * BANDWIDTH)
    computing = 2 * shape.matrix_parameters * together / (parallel * speed.flops * PREFILL)
    own = (DECODE_STEP_S if placement.device == "cuda" else 0.0015) + (PARALLEL_S * shape.layers if parallel > 1 else 0)
    step = max(reading, computing) + own
    rounds = max(each * response / together, config.max_response_tokens)  # the longest response ends last
    return prefill + rounds * step


def _sync(config: Any, shape: Shape, speed: _Speed, where: Layout) -> float:
    size = speed.item * shape.parameters
    way = speed.network if len({node for nodes in where.roles.values() for node in nodes}) > 1 else speed.link
    copies = 3 if config.placement.weight_transport == "object_store" else 1
    return size / DIGEST + copies * size / max(way, 1e9)


def _of(batch: Batch, key: str) -> Learning:
    return next(each for each in batch.learners if each.key == key)


def _spread(where: Layout, role: str) -> bool:
    return len(set(where.roles.get(role, ()))) > 1


def _shared(where: Layout) -> bool:
    """Do policy and PRM sit on the same GPUs?"""
    taken = {role: {(each.node, gpu) for each in where.processes if each.role == role for gpu in each.gpus}
             for role in ("policy", "prm")}  # fmt: skip
    return bool(taken["policy"] & taken["prm"])


def _together(phases: list[Phase]) -> float:
    """Phases that run beside another count only where they are longer."""
    own = {phase.name: phase.seconds for phase in phases if phase.beside is None}
    for phase in phases:
        if phase.beside is not None:
            own[phase.beside] = max(own[phase.beside], phase.seconds)
    return sum(own.values())
