"""From a configuration to the parts of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rlprm.actors.cluster import cluster
from rlprm.actors.group import WorkerGroup, answer
from rlprm.actors.judge import Judges
from rlprm.actors.learners import NoReference, Policy, Reference, SourcePlace, Sources
from rlprm.actors.rollout import Rollouts
from rlprm.actors.seating import Seating
from rlprm.actors.services import EngineService, GraderService
from rlprm.actors.transfer import GroupTransfer, ObjectStoreTransfer
from rlprm.batch import shards_needed
from rlprm.config import Data, HeldOut, Placement, RolloutSection, SampledModel, TrainConfig, VerifierSection
from rlprm.core.gates import TrustState
from rlprm.data.prompt_source import PromptSource, Source, held_out
from rlprm.parts import made
from rlprm.run import factories, starting
from rlprm.run.progress import Progress
from rlprm.run.several_nodes import Shared, refuse_alone, require_alike, seated

TRUST_DECAY = 0.9  # a PRM that worsens loses its trust within about ten steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Engines and judges: what training and evaluation share."""

    rollouts: Rollouts
    judges: Judges
    judge_actors: tuple[Any, ...]
    own_engines: Mapping[str, Any]  # of process sources whose model generates, by stream
    restart: Callable[[int], Any]  # rollout engine `number` once more: its handle, or None while there is no room

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


def gpus_needed(placement: Placement, own_engines: int, *, prm: bool, learners: bool = True) -> float:
    """GPUs of all processes; ``prm``: are there PRM ranks?"""
    ranks = placement.policy_ranks + (placement.prm_ranks if prm else 0) if learners else 0
    engines = placement.engines + own_engines
    return ranks * placement.gpus_per_rank + engines * placement.gpus_per_engine * placement.tensor_parallel


@contextmanager
def ray_cluster(
    placement: Placement,
    *,
    learners: bool,
    own_engines: int,
    prm: bool = True,
    shared: Shared | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Seating | None]:
    """Ray for the actors of this placement, with as many engines of process sources besides; ``prm``: with PRM ranks?

    Where it joins a cluster it waits for the nodes and yields their seats; ``shared`` is what all of them must see.

    Raises:
        ConfigError: nodes are missing or differ, or the placement does not fit them.
    """
    refuse_alone(placement)
    ranks = placement.policy_ranks + placement.prm_ranks if learners else 0
    engines = placement.engines + own_engines
    with cluster(
        address=placement.ray_address,
        num_actors=ranks + engines + 1,
        # of a cluster that was joined each node is looked at
        gpus=0.0 if placement.ray_address else gpus_needed(placement, own_engines, prm=prm, learners=learners),
        object_store_bytes=placement.object_store_bytes,
        working_dir=str(Path(__file__).resolve().parents[2]),
    ):
        with seated(placement, say) as seating:
            if shared is not None:
                require_alike(seating, placement, own_engines, shared, prm=prm)
            yield seating


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
    min_engines: int | None = None,
    standing: Sampling | None = None,
    seating: Seating | None = None,
    prm: bool = True,
) -> Sampling:
    """Start engines and judges; returns at once, `ready` waits for them.

    ``own``: engines of process sources by stream, each a model folder and the most tokens it must hold.
    ``min_engines``: fewest engines to go on with when some are lost; None: all. ``standing``: what an earlier run with
    the same model, data, verifier, splitter, rule and placement has left; nothing is started.
    ``prm``: will there be PRM ranks beside them?
    """
    engines, judges, own_engines, restart = (
        (standing.rollouts.engines, list(standing.judge_actors), standing.own_engines, standing.restart)
        if standing is not None
        else starting.sampling_actors(
            model,
            verifier,
            splitter,
            keep,
            rollout,
            placement,
            data.max_prompt_tokens + max_tokens,
            logs,
            own,
            seating,
            prm,
        )
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
            restart=restart,
            min_engines=min_engines,
            logs=str(logs),
            start_timeout_s=placement.start_timeout_s,
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
        restart=restart,
    )


def learning(
    config: TrainConfig,
    started: Sampling | None,
    *,
    logs: Path,
    standing: Mapping[str, WorkerGroup] | None = None,
    seating: Seating | None = None,
) -> Learning:
    """Start the ranks of policy, reference and sources, and build their models.

    ``started`` None: nothing is sampled, so only what keeps a state is built. ``standing``: groups by name that an
    earlier run of the same placement has left, cleared; what is missing is started, on the nodes alive now.
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
    missing = {name: size for name, size in sizes.items() if name not in before}
    seats = None if seating is None or not missing else seating.learners(placement, prm="prm" in sizes)
    seated_at = {} if seats is None else {"policy": seats.policy, "prm": seats.prm}
    workers = {
        name: starting.ranks(name, size, placement, logs, seating, seated_at[name] if seated_at else None)
        for name, size in missing.items()
    }
    found = {**before, **{name: starting.joined(name, each, placement, logs) for name, each in workers.items()}}
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


def started_group(
    name: str, size: int, placement: Placement, logs: Path, seating: Seating | None = None
) -> WorkerGroup:
    """Ranks of one learner alone, seated as those of the policy are; started and joined."""
    logs = logs.resolve()
    places = None if seating is None else seating.learners(placement).policy
    return starting.joined(name, starting.ranks(name, size, placement, logs, seating, places), placement, logs)


def _transfer(placement: Placement) -> ObjectStoreTransfer | GroupTransfer:
    if placement.weight_transport == "object_store":
        return ObjectStoreTransfer(bucket_bytes=placement.weight_bucket_bytes, timeout_s=placement.stage_timeout_s)
    return GroupTransfer(
        backend=placement.weight_transport,
        bucket_bytes=placement.weight_bucket_bytes,
        timeout_s=placement.stage_timeout_s,
        group_timeout_s=placement.collective_timeout_s,
    )


def ready(started: Sampling, placement: Placement, progress: Progress, logs: Path) -> None:
    """Wait until engines and judges answer."""
    waiting = [actor.ready.remote() for actor in started.actors()]
    with progress.stage("start rollout engines"):
        answer(waiting, what="rollout engines and judge", timeout_s=placement.start_timeout_s, logs=str(logs))


def stop(started: Sampling | None, groups: tuple[WorkerGroup, ...]) -> None:
    """Close engines, verifier processes and learners; a part that is gone already does not stop the others."""
    actors = [] if started is None else started.actors()
    if started is not None:
        started.rollouts.engines.drop_helpers()
    closing = [actor.close.remote() for actor in actors]
    for group in groups:
        closing += group.all(lambda worker: worker.close)
    ray.wait(closing, num_returns=len(closing), timeout=20.0)
    for actor in (*actors, *(worker for group in groups for worker in group.workers)):
        ray.kill(actor)
