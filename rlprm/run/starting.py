"""Actors of a run, on their way up: engines, judge and ranks, each with its log, its environment and its seat."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from rlprm.actors.cluster import actor_environment
from rlprm.actors.group import WorkerGroup, answer, resources
from rlprm.actors.judge import JudgeActor
from rlprm.actors.rollout import RolloutActor
from rlprm.actors.seating import Seating
from rlprm.actors.worker import Worker
from rlprm.config import Placement, RolloutSection, SampledModel, VerifierSection
from rlprm.data.tokenizer import load_tokenizer, stop_token_ids
from rlprm.parts import made
from rlprm.run import factories


def sampling_actors(
    model: SampledModel,
    verifier: VerifierSection,
    splitter: Mapping[str, Any],
    keep: Any,
    rollout: RolloutSection,
    placement: Placement,
    longest: int,
    logs: Path,
    own: Mapping[str, tuple[str, int]],
    seating: Seating | None,
    prm: bool,
) -> tuple[list[Any], list[Any], dict[str, Any], Callable[[int], Any]]:
    """Rollout engines, judges, and engines of process sources by stream, all of them starting; and what starts a
    rollout engine again."""
    from rlprm.engine.generator_vllm import cpu_environment

    device = placement.device
    environment = (
        {**actor_environment(device=device, threads=placement.threads), **cpu_environment(placement.threads)}
        if device == "cpu"
        else actor_environment(device=device, threads=placement.threads)
    )

    def engine(path: str, tokens: int, log: str, what: str, place: int | None) -> Any:
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
        needs = resources(cpus=1.0, gpus=gpus, environment=environment)
        return _started(RolloutActor, needs, (factory, str(logs / log)), what, seating, place)

    def rollout_engine(number: int, place: int | None) -> Any:
        return engine(model.path, longest, f"rollout{number}.log", f"rollout engine {number}", place)

    def restart(number: int) -> Any:
        """Rollout engine ``number`` once more, starting; None where no node has room for it now."""
        if seating is None:
            return rollout_engine(number, None)
        place = seating.again(number, placement)
        return None if place is None else rollout_engine(number, place)

    places = _places(seating, placement, len(own), prm)
    engines = [rollout_engine(number, place) for number, place in enumerate(places[0])]
    own_engines = {
        name: engine(path, tokens, f"engine_{name}.log", f"the engine of stream {name}", place)
        for (name, (path, tokens)), place in zip(own.items(), places[1], strict=True)
    }
    judge_factory = functools.partial(
        factories.judge, model.path, verifier=_verifier(verifier), splitter=made(splitter), keep=keep
    )
    needs = resources(cpus=1.0, gpus=0.0, environment=actor_environment(device="cpu", threads=1))
    head = None if seating is None else seating.head()
    judge = _started(JudgeActor, needs, (judge_factory, str(logs / "judge0.log")), "the judge", seating, head)
    return engines, [judge], own_engines, restart


def _started(
    kind: type, needs: dict[str, Any], given: tuple[Any, ...], what: str, seating: Seating | None, place: int | None
) -> Any:
    """An actor that is starting: on its seat, or where Ray chooses."""
    if seating is None or place is None:
        return ray.remote(kind).options(**needs).remote(*given)
    actor = ray.remote(kind).options(**{**needs, **seating.options(place)}).remote(*given)
    seating.sits(actor, what, place)
    return actor


def _places(seating: Seating | None, placement: Placement, own: int, prm: bool) -> tuple[Sequence[int | None], ...]:
    """Nodes of rollout engines and of process sources' engines; None where Ray may choose."""
    if seating is None:
        return (None,) * placement.engines, (None,) * own
    found = seating.engines(placement, own, prm=prm)
    return found.engines, found.own_engines


def _verifier(section: VerifierSection) -> dict[str, Any]:
    return {
        "verifier": made(section.function),
        "workers": section.workers,
        "timeout_s": section.timeout_s,
        "memory_mb": section.memory_mb,
    }


def ranks(
    name: str, size: int, placement: Placement, logs: Path, seating: Seating | None, places: Sequence[int] | None
) -> list[Any]:
    """Ranks of one learner that are starting; ``places``: the node of each."""
    needs = resources(
        cpus=1.0,
        gpus=placement.gpus_per_rank,
        environment=actor_environment(device=placement.device, threads=placement.threads),
    )
    seats = (None,) * size if places is None else places
    return [
        _started(Worker, needs, (str(logs / f"{name}{rank}.log"),), f"{name} rank {rank}", seating, seats[rank])
        for rank in range(size)
    ]


def joined(name: str, workers: list[Any], placement: Placement, logs: Path) -> WorkerGroup:
    """Ranks that have found each other."""
    timeout = placement.start_timeout_s
    host, port = answer(workers[0].rendezvous.remote(), what=f"{name} rank 0", timeout_s=timeout, logs=str(logs))
    joining = [
        worker.join.remote(rank, len(workers), host, port, placement.device, placement.collective_timeout_s)
        for rank, worker in enumerate(workers)
    ]
    answer(joining, what=f"the process group of {name}", timeout_s=timeout, logs=str(logs))
    return WorkerGroup(name, workers, timeout_s=placement.stage_timeout_s, logs=f"{logs}/{name}*.log")
