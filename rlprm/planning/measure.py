"""What learner processes really take on this machine's CPU, against what was predicted: real workers, real updates.

Each rank is a process with the worker of a run in it. Idle, it has joined its group and imported all libraries; then it
builds its models, scores a full micro-batch and learns from it twice. Counted is the highest resident memory above idle.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlprm.errors import ConfigError, WorkerLost

if TYPE_CHECKING:
    from rlprm.config import TrainConfig
    from rlprm.planning.processes import Layout, Process

Role = Literal["policy", "prm", "engine"]
STATUS = Path("/proc/self/status")
UPDATES = 2  # the optimizer's moments exist from the end of the first update on
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Increment:
    """Bytes of one process."""

    rank: int
    idle: int
    peaks: Mapping[str, int]  # above idle, the highest of each phase
    resident: int  # above idle, at the end

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def measured(config: TrainConfig, role: Role, logs: Path) -> list[Increment]:
    """The increment of each rank of ``role``, in a group of as many ranks as the placement has.

    Raises:
        ConfigError: the placement is not on CPU, or this system does not say how much memory a process has.
        WorkerLost: a rank ended or did not answer.
    """
    if config.placement.device != "cpu" or not STATUS.is_file():
        raise ConfigError(
            f"placement.device is {config.placement.device} on {sys.platform}; memory is measured as resident memory of "
            "CPU processes under Linux: use placement=cpu"
        )
    size = {"policy": config.placement.policy_ranks, "prm": config.placement.prm_ranks, "engine": 1}[role]
    context = multiprocessing.get_context("spawn")
    answers, meeting = context.Queue(), context.Queue()
    from rlprm.actors.cluster import actor_environment

    before = dict(os.environ)
    os.environ.update(actor_environment(device="cpu", threads=config.placement.threads))
    if role == "engine":
        from rlprm.engine.generator_vllm import cpu_environment

        os.environ.update(cpu_environment(config.placement.threads))
    try:
        ranks = [
            context.Process(target=_rank, args=(config, role, rank, size, str(logs), meeting, answers), daemon=True)
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        return sorted((_answer(answers, ranks, logs) for _ in ranks), key=lambda each: each.rank)
    finally:
        os.environ.clear()
        os.environ.update(before)
        for rank in ranks:
            rank.join(5.0)
            rank.kill()


def _answer(answers: Any, ranks: list[Any], logs: Path) -> Increment:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            found: Increment = answers.get(timeout=0.5)
            return found
        except queue.Empty:
            dead = [rank for rank in ranks if rank.exitcode not in (None, 0)]
            if dead:
                raise WorkerLost(f"a measured rank ended with exit code {dead[0].exitcode}; see {logs}/*.log") from None
    raise WorkerLost(f"a measured rank gave no answer within {TIMEOUT_S:.0f} s; see {logs}/*.log")


def _rank(config: TrainConfig, role: Role, rank: int, size: int, logs: str, meeting: Any, answers: Any) -> None:
    """One process: idle, then each phase with its own highest mark."""
    from rlprm.actors.worker import Worker

    worker = Worker(f"{logs}/{role}{rank}.log")
    if role != "engine":
        from rlprm.engine.distributed import reserve

        if rank == 0:
            port = reserve("127.0.0.1")
            for _ in range(size - 1):
                meeting.put(port)
        else:
            port = meeting.get(timeout=TIMEOUT_S)
        worker.join(rank, size, "127.0.0.1", port, "cpu", TIMEOUT_S)
    _imported(config, role)
    phases = {"policy": _policy, "prm": _prm, "engine": _engine}[role](config, worker)
    idle = _settled()
    peaks: dict[str, int] = {}
    for name, phase in phases:
        _reset_peak()
        phase()
        peaks[name] = _memory("VmHWM") - idle
    answers.put(Increment(rank=rank, idle=idle, peaks=peaks, resident=_settled() - idle))
    worker.close()


def _imported(config: TrainConfig, role: Role) -> None:
    """Libraries belong to an idle process: they cost the same for every model."""
    if role == "engine":
        from rlprm.engine import vllm_compat

        vllm_compat.engine_died()
        vllm_compat.cpu_head_sizes()
    from rlprm.engine.generating import expected_weights, read_config

    expected_weights(read_config(config.model.path))  # imports the architecture's code; the tensors have no memory


def _policy(config: TrainConfig, worker: Any) -> list[tuple[str, Any]]:
    from rlprm.run import factories

    def learn() -> None:
        shard = shard_of(config, ["policy"])
        zeros = shard.rollout_logprobs * 0
        selected = shard.train
        policy = worker._policy
        old = policy.logprobs(shard)
        for _ in range(UPDATES):
            policy.learn(shard, selected, old, zeros, {"advantages": zeros + 1.0}, len(shard))

    return [
        ("build", lambda: worker.build_policy(functools.partial(factories.policy, config))),
        ("learn", learn),
    ]


def _prm(config: TrainConfig, worker: Any) -> list[tuple[str, Any]]:
    from rlprm.run import factories
    from rlprm.sources.base import Scorable

    sources = factories.sources(config)

    def build() -> None:
        if factories.needs_reference(config):
            worker.build_reference(functools.partial(factories.reference, config))
        for name, section in sources.items():
            if section.model is not None:
                worker.build_source(name, functools.partial(factories.source, config, name, {}))

    def learn() -> None:
        shard = shard_of(config, [f"streams.{name}.source.learner" for name in worker._sources])
        ref = None if worker._reference is None else worker._reference.logprobs(shard)
        given = Scorable(shard=shard, old=shard.rollout_logprobs, ref=ref, texts=None, step=1)
        for source in worker._sources.values():
            source.score(given)
            for _ in range(UPDATES):
                source.learn(given)

    return [("build", build), ("learn", learn)]


def _engine(config: TrainConfig, worker: Any) -> list[tuple[str, Any]]:
    from rlprm.data.tokenizer import load_tokenizer, stop_token_ids
    from rlprm.parts import made
    from rlprm.roles import Prompt, Request

    longest = config.data.max_prompt_tokens + config.max_response_tokens
    held: list[Any] = []

    def build() -> None:
        path = config.model.path
        ends = stop_token_ids(path, load_tokenizer(path))
        held.append(made(config.rollout.engine)(path, config.model.dtype, "cpu", longest, 1, ends))

    def generate() -> None:
        prompt = Prompt(id="0", tokens=(1,) * config.data.max_prompt_tokens, text="", question="", gold="", source="")
        request = Request(
            prompt=prompt,
            seeds=tuple(range(min(4, int(config.rollout.engine["max_num_seqs"])))),
            temperature=1.0,
            max_tokens=config.max_response_tokens,
        )
        for _ in held[0].generate([request]):
            pass

    return [("build", build), ("generate", generate)]


def shard_of(config: TrainConfig, keys: list[str]) -> Any:
    """Sequences of the longest length: a full micro-batch for each optimizer step of the learners ``keys``, or two where
    the run accumulates gradients over several."""
    import torch

    from rlprm.planning.arithmetic import arithmetic
    from rlprm.records import JaggedShard

    prompt, response = config.data.max_prompt_tokens, config.max_response_tokens
    wanted = [each for each in arithmetic(config).learners if each.key in keys] or arithmetic(config).learners[:1]
    count = max(each.mini_batches * each.micro.rows * min(2, each.micro_batches) for each in wanted)
    lengths = torch.full((count,), prompt + response)
    lengths[-1] -= int(count > 1)  # so that there is padding, for which attention keeps masks
    total = int(lengths.sum())
    every, none = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    numbers = torch.arange(count)
    return JaggedShard(
        lengths=lengths,
        prompt_lengths=torch.full((count,), prompt),
        outcome=(numbers % 2).float(),
        outcome_present=every,
        greedy_outcome=torch.zeros(count),
        greedy_present=none,
        group=numbers,
        version=torch.zeros(count, dtype=torch.int64),
        truncated=none,
        fresh=every,
        train=every,
        row=numbers,
        tokens=torch.arange(total) % 8 + 3,  # ids that every vocabulary has; 0 is often padding, whose embedding is 0
        rollout_logprobs=torch.full((total,), -1.0),
        step_index=torch.zeros(total, dtype=torch.int64),
        step_label=torch.full((total,), -1),
    )


def _settled() -> int:
    """Resident memory after what was freed has gone back to the system."""
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _memory("VmRSS")


def _memory(field: str) -> int:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise ConfigError(f"{STATUS} has no {field}; memory cannot be measured on this system")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def compared(config: TrainConfig, where: Layout, logs: Path) -> list[str]:
    """A line for each measured process: its increment over an idle one, and what the plan says of it."""
    lines = ["", "Measured here, resident memory above an idle process, MB"]
    roles: tuple[tuple[Role, str], ...] = (("policy", "policy"), ("prm", "prm"), ("engine", "rollout engine"))
    for role, name in roles:
        planned = next((each for each in where.processes if each.role == name), None)
        if planned is None:
            continue
        expected = predicted(planned)
        for each in measured(config, role, logs):
            off = 100 * (expected - each.peak) / each.peak
            lines.append(
                f"  {name} {each.rank}: highest {each.peak / 1e6:.0f}, predicted {expected / 1e6:.0f} ({off:+.1f} %); at rest "
                f"{each.resident / 1e6:.0f}; idle {each.idle / 1e6:.0f}"
            )
    return lines


def predicted(process: Process) -> int:
    """What the plan says of a CPU process above an idle one."""
    from rlprm.planning.processes import CPU_ENGINE_IDLE, CPU_IDLE

    return process.peak.total - (CPU_IDLE if process.role in ("policy", "prm") else CPU_ENGINE_IDLE)
