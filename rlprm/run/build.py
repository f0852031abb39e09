"""From a configuration to the parts of a run."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rlprm.actors.cluster import actor_environment, cluster
from rlprm.actors.group import WorkerGroup, answer, resources
from rlprm.actors.judge import JudgeActor, Judges
from rlprm.actors.learners import NoReference, Policy, Reference, SourcePlace, Sources
from rlprm.actors.rollout import RolloutActor, Rollouts
from rlprm.actors.services import EngineService, GraderService
from rlprm.actors.transfer import GroupTransfer, ObjectStoreTransfer
from rlprm.actors.worker import Worker
from rlprm.batch import shards_needed
from rlprm.config import Data, HeldOut, Placement, RolloutSection, SampledModel, TrainConfig, VerifierSection
from rlprm.core.gates import TrustState
from rlprm.data.prompt_source import PromptSource, Source, held_out
from rlprm.data.tokenizer import load_tokenizer, stop_token_ids
from rlprm.parts import made
from rlprm.run import factories
from rlprm.run.progress import Progress

TRUST_DECAY = 0.9  # a PRM that worsens loses its trust within about ten steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Engines and judges: what training and evaluation share."""

    rollouts: Rollouts
    judges: Judges
    judge_actors: tuple[Any, ...]
    own_engines: Mapping[str, Any]  # of process sources whose model generates, by stream

    def services(self, name: str, engine: str, placement: Placement) -> dict[str, Any]:
        """What the source of stream ``name`` may ask while it scores."""
        timeout = placement.stage_timeout_s
        grader = GraderService(self.judge_actors, timeout_s=timeout)
        if name in self.own_engines:
            own = EngineService([self.own_engines[name]], timeout_s=timeout, what=f"the engine of stream {name}")
            return {"engines": own, "grader": grader}
        if engine == "rollout":
            engines = EngineService(self.rollouts.engines, timeout_s=timeout, what="rollout engines (for a source)")
            return {"engines": engines, "grader": grader}
        return {}

    def actors(self) -> list[Any]:
        """Every actor that was started."""
        return [*self.rollouts.engines, *self.judge_actors, *self.own_engines.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """Policy, reference and process sources on their ranks, and the way of the weights."""

    policy: Policy
    reference: Any
    sources: Sources
    transfer: Any
    groups: tuple[WorkerGroup, ...]


def prompts_of(data: Data, tokenizer: Any, *, seed: int) -> PromptSource:
    """The training prompts in their seeded order."""
    render = made(data.template)(tokenizer)
    sources = [Source(name, made(source.reader), source.weight) for name, source in data.train.items()]
    return PromptSource(sources, render, seed=seed, max_prompt_tokens=data.max_prompt_tokens)


def evaluation_sets(data: HeldOut, tokenizer: Any, *, limit: int | None, seed: int) -> dict[str, Any]:
    """Held-out sets by name; over-long prompts are left out and counted in them."""
    render = made(data.template)(tokenizer)
    return {
        name: held_out(name, made(reader), render, max_prompt_tokens=data.max_prompt_tokens, limit=limit, seed=seed)
        for name, reader in data.evaluation.items()
    }


@contextmanager
def ray_cluster(placement: Placement, *, learners: bool, own_engines: int) -> Iterator[None]:
    """Ray for the actors of this placement, with as many engines of process sources besides."""
    ranks = placement.policy_ranks + placement.prm_ranks if learners else 0
    engines = placement.engines + own_engines
    gpus = ranks * placement.gpus_per_rank + engines * placement.gpus_per_engine * placement.tensor_parallel
    with cluster(
        address=placement.ray_address,
        num_actors=ranks + engines + 1,
        gpus=gpus,
        object_store_bytes=placement.object_store_bytes,
        working_dir=str(Path(__file__).resolve().parents[2]),
    ):
        yield


def sampling(
    *,
    model: SampledModel,
    data: HeldOut,
    verifier: VerifierSection,
    splitter: Mapping[str, Any],
    keep: Any,
    rollout: RolloutSection,
    placement: Placement,
    seed: int,
    temperature: float,
    max_tokens: int,
    samples: int,
    greedy: bool,
    needs_steps: bool,
    logs: Path,
    own: Mapping[str, tuple[str, int]],
    standing: Sampling | None = None,
) -> Sampling:
    """Start engines and judges; returns at once, `ready` waits for them.

    ``own``: engines of process sources by stream, each a model folder and the most tokens it must hold. ``standing``:
    what an earlier run with the same model, data, verifier, splitter, rule and placement has left; nothing is started.
    """
    engines, judges, own_engines = (
        (list(standing.rollouts.engines), list(standing.judge_actors), standing.own_engines)
        if standing is not None
        else _sampling_actors(model, data, verifier, splitter, keep, rollout, placement, max_tokens, logs, own)
    )
    return Sampling(
        rollouts=Rollouts(
            engines,
            seed=seed,
            temperature=temperature,
            max_tokens=max_tokens,
            samples=samples,
            greedy=greedy,
            timeout_s=placement.stage_timeout_s,
        ),
        judges=Judges(
            judges,
            num_shards=shards_needed(placement.policy_ranks, placement.prm_ranks),
            max_error_fraction=verifier.max_error_fraction,
            needs_steps=needs_steps,
            timeout_s=placement.stage_timeout_s,
        ),
        judge_actors=tuple(judges),
        own_engines=own_engines,
    )


def _sampling_actors(
    model: SampledModel,
    data: HeldOut,
    verifier: VerifierSection,
    splitter: Mapping[str, Any],
    keep: Any,
    rollout: RolloutSection,
    placement: Placement,
    max_tokens: int,
    logs: Path,
    own: Mapping[str, tuple[str, int]],
) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Rollout engines, judges, and engines of process sources by stream, all of them starting."""
    from rlprm.engine.generator_vllm import cpu_environment

    device = placement.device
    environment = (
        {**actor_environment(device=device, threads=placement.threads), **cpu_environment(placement.threads)}
        if device == "cpu"
        else actor_environment(device=device, threads=placement.threads)
    )

    def engine(path: str, tokens: int, log: str) -> Any:
        factory = functools.partial(
            made(rollout.engine),
            path,
            model.dtype,
            device,
            tokens,
            placement.tensor_parallel,
            stop_token_ids(path, load_tokenizer(path)),
        )
        gpus = placement.gpus_per_engine * placement.tensor_parallel
        return (
            ray.remote(RolloutActor)
            .options(**resources(cpus=1.0, gpus=gpus, environment=environment))
            .remote(factory, str(logs / log))
        )

    longest = data.max_prompt_tokens + max_tokens
    engines = [engine(model.path, longest, f"rollout{number}.log") for number in range(placement.engines)]
    own_engines = {name: engine(path, tokens, f"engine_{name}.log") for name, (path, tokens) in own.items()}
    judge_factory = functools.partial(
        factories.judge, model.path, verifier=_verifier(verifier), splitter=made(splitter), keep=keep
    )
    judges = [
        ray.remote(JudgeActor)
        .options(**resources(cpus=1.0, gpus=0.0, environment=actor_environment(device="cpu", threads=1)))
        .remote(judge_factory, str(logs / "judge0.log"))
    ]
    return engines, judges, own_engines


def _verifier(section: VerifierSection) -> dict[str, Any]:
    return {
        "verifier": made(section.function),
        "workers": section.workers,
        "timeout_s": section.timeout_s,
        "memory_mb": section.memory_mb,
    }


def learning(
    config: TrainConfig, started: Sampling | None, *, logs: Path, standing: Mapping[str, WorkerGroup] | None = None
) -> Learning:
    """Start the ranks of policy, reference and sources, and build their models.

    ``started`` None: nothing is sampled, so only what keeps a state is built. ``standing``: groups by name that an
    earlier run of the same placement has left, cleared; what is missing is started.
    """
    placement = config.placement
    sources = {
        name: section
        for name, section in factories.sources(config).items()
        if started is not None or factories.kind(section).stateful
    }
    with_model = {
        name
        for name, section in sources.items()
        if section.model is not None and not factories.own_engine(section) and not factories.kind(section).reads_policy
    }
    needs_reference = factories.needs_reference(config)
    sizes = {"policy": placement.policy_ranks}
    if with_model or needs_reference:
        sizes["prm"] = placement.prm_ranks
    # all processes start at once: starting and importing is most of the wait
    before = {} if standing is None else standing
    workers = {name: _workers(name, size, placement, logs) for name, size in sizes.items() if name not in before}
    found = {**before, **{name: _joined(name, members, placement, logs) for name, members in workers.items()}}
    groups = [found[name] for name in sizes]
    policy_group, prm_group = groups[0], groups[-1]
    building = policy_group.all(lambda worker: worker.build_policy, functools.partial(factories.policy, config))
    if needs_reference:
        building += prm_group.all(lambda worker: worker.build_reference, functools.partial(factories.reference, config))
    places = {name: prm_group if name in with_model else policy_group for name in sources}
    for name, group in places.items():
        services = {} if started is None else started.services(name, factories.kind(sources[name]).engine, placement)
        building += group.all(
            lambda worker: worker.build_source, name, functools.partial(factories.source, config, name, services)
        )
    answer(building, what="building the models", timeout_s=placement.start_timeout_s, logs=str(logs))
    return Learning(
        policy=Policy(policy_group),
        reference=Reference(prm_group) if needs_reference else NoReference(),
        sources=Sources(
            {
                name: SourcePlace(group=group, reads_text=factories.kind(sources[name]).reads_text)
                for name, group in places.items()
            },
            {name: TrustState.start(TRUST_DECAY) for name in places},
            outputs=factories.outputs(config),
        ),
        transfer=_transfer(placement),
        groups=tuple(groups),
    )


def started_group(name: str, size: int, placement: Placement, logs: Path) -> WorkerGroup:
    """Ranks of one learner, started and joined."""
    return _joined(name, _workers(name, size, placement, logs.resolve()), placement, logs)


def _workers(name: str, size: int, placement: Placement, logs: Path) -> list[Any]:
    """Ranks that are starting."""
    environment = actor_environment(device=placement.device, threads=placement.threads)
    return [
        ray.remote(Worker)
        .options(**resources(cpus=1.0, gpus=placement.gpus_per_rank, environment=environment))
        .remote(str(logs / f"{name}{rank}.log"))
        for rank in range(size)
    ]


def _joined(name: str, workers: list[Any], placement: Placement, logs: Path) -> WorkerGroup:
    """Ranks that have found each other."""
    timeout = placement.start_timeout_s
    host, port = answer(workers[0].rendezvous.remote(), what=f"{name} rank 0", timeout_s=timeout, logs=str(logs))
    joining = [
        worker.join.remote(rank, len(workers), host, port, placement.device, placement.collective_timeout_s)
        for rank, worker in enumerate(workers)
    ]
    answer(joining, what=f"the process group of {name}", timeout_s=timeout, logs=str(logs))
    return WorkerGroup(name, workers, timeout_s=placement.stage_timeout_s, logs=f"{logs}/{name}*.log")


def _transfer(placement: Placement) -> ObjectStoreTransfer | GroupTransfer:
    if placement.weight_transport == "object_store":
        return ObjectStoreTransfer(bucket_bytes=placement.weight_bucket_bytes, timeout_s=placement.stage_timeout_s)
    return GroupTransfer(
        backend=placement.weight_transport,
        bucket_bytes=placement.weight_bucket_bytes,
        timeout_s=placement.stage_timeout_s,
    )


def ready(started: Sampling, placement: Placement, progress: Progress, logs: Path) -> None:
    """Wait until engines and judges answer."""
    waiting = [actor.ready.remote() for actor in started.actors()]
    with progress.stage("start rollout engines"):
        answer(waiting, what="rollout engines and judge", timeout_s=placement.start_timeout_s, logs=str(logs))


def stop(started: Sampling | None, groups: tuple[WorkerGroup, ...]) -> None:
    """Close engines, verifier processes and learners; a part that is gone already does not stop the others."""
    actors = [] if started is None else started.actors()
    closing = [actor.close.remote() for actor in actors]
    for group in groups:
        closing += group.all(lambda worker: worker.close)
    ray.wait(closing, num_returns=len(closing), timeout=20.0)
    for actor in (*actors, *(worker for group in groups for worker in group.workers)):
        ray.kill(actor)
