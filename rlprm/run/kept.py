"""What outlives a run where several follow each other: Ray, rollout engines, verifiers and learner processes.

A run asks for its parts. Where the last one left parts that fit, it gets those, cleared; what does not fit is stopped
and started anew. What a run sees does not depend on what ran before it: weights are published before the first
rollout, every request brings its own seed, models are read from their files, and random states are put back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rlprm.actors.group import WorkerGroup, answer
from rlprm.actors.seating import Seating
from rlprm.config import TrainConfig
from rlprm.parts import made
from rlprm.run import build, factories
from rlprm.run.progress import Progress
from rlprm.run.several_nodes import of_training


class Kept:
    """Ray, engines, judges and learner processes; nothing starts before a run asks for it. Use it as a context."""

    def __init__(self, logs: Path, progress: Progress) -> None:
        self._logs = logs.resolve()
        self._progress = progress
        self._ray: tuple[dict[str, Any], ExitStack] | None = None
        self.seating: Seating | None = None  # of a cluster that was joined
        self._sampling: tuple[str, build.Sampling] | None = None
        self._learners: tuple[str, dict[str, WorkerGroup]] | None = None

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def parts(self, config: TrainConfig) -> Iterator[tuple[build.Sampling, build.Learning]]:
        """The run's parts. An error stops everything: nobody knows in what state it has left them."""
        try:
            self._stop_what_does_not_fit(config)
            yield self._started(config)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop everything. Calling it twice is fine."""
        self._stop_learners()
        self._stop_sampling()
        if self._ray is not None:
            (_, stack), self._ray, self.seating = self._ray, None, None
            stack.close()

    def _stop_what_does_not_fit(self, config: TrainConfig) -> None:
        if self._ray is not None and not _fits(ray_needs(config), self._ray[0]):
            self.close()
        if self._sampling is not None and self._sampling[0] != sampling_key(config):
            self._stop_sampling()
        if self._learners is not None and self._learners[0] != learner_key(config):
            self._stop_learners()

    def _started(self, config: TrainConfig) -> tuple[build.Sampling, build.Learning]:
        if self._ray is None:
            stack = ExitStack()
            self._ray = ray_needs(config), stack
            with self._progress.stage("start Ray"):
                self.seating = stack.enter_context(
                    build.ray_cluster(
                        config.placement,
                        learners=True,
                        own_engines=len(factories.own_engines(config)),
                        prm=factories.on_prm_ranks(config),
                        shared=of_training(config),
                        say=self._progress.say,
                    )
                )
        before = self._sampling
        started = build.sampling(
            model=config.model,
            data=config.data,
            verifier=config.verifier,
            splitter=config.splitter,
            keep=made(config.keep.rule),
            rollout=config.rollout,
            placement=config.placement,
            seed=config.seed,
            temperature=config.temperature,
            max_tokens=config.max_response_tokens,
            samples=config.responses_per_prompt,
            greedy=factories.needs_greedy(config),
            needs_steps=factories.needs_steps(config),
            logs=self._logs,
            own=factories.own_engines(config),
            min_engines=config.recovery.min_engines,
            standing=None if before is None else before[1],
            seating=self.seating,
            prm=factories.on_prm_ranks(config),
        )
        self._sampling = sampling_key(config), started
        started.rollouts.engines.say = self._progress.say
        groups = {} if self._learners is None else self._learners[1]
        self._learners = learner_key(config), groups
        with self._progress.stage("start learners"):
            self._clear(config, groups)
            learning = build.learning(config, started, logs=self._logs, standing=groups, seating=self.seating)
        groups.update({group.name: group for group in learning.groups})
        if before is None:
            build.ready(started, config.placement, self._progress, self._logs)
        return started, learning

    def _clear(self, config: TrainConfig, groups: dict[str, WorkerGroup]) -> None:
        """Of what the last run has built, nothing stays in the learner processes."""
        clearing = [each for group in groups.values() for each in group.all(lambda worker: worker.clear)]
        answer(
            clearing,
            what="clearing the last run's models",
            timeout_s=config.placement.stage_timeout_s,
            logs=str(self._logs),
        )

    def _stop_sampling(self) -> None:
        if self._sampling is not None:
            (_, started), self._sampling = self._sampling, None
            build.stop(started, ())

    def _stop_learners(self) -> None:
        if self._learners is not None:
            (_, groups), self._learners = self._learners, None
            build.stop(None, tuple(groups.values()))


def ray_needs(config: TrainConfig) -> dict[str, Any]:
    """What Ray is started for; a Ray of the same address and store serves a run that needs no more processes and GPUs."""
    placement, own = config.placement, len(factories.own_engines(config))
    return {
        "address": placement.ray_address,
        "nodes": placement.nodes,
        "store": placement.object_store_bytes,
        "device": placement.device,
        "processes": placement.policy_ranks + placement.prm_ranks + placement.engines + own,
        "gpus": build.gpus_needed(placement, own, prm=factories.on_prm_ranks(config)),
    }


def _fits(needed: dict[str, Any], there: dict[str, Any]) -> bool:
    same = all(needed[key] == there[key] for key in ("address", "nodes", "store", "device"))
    return same and (needed["address"] is not None or all(needed[key] <= there[key] for key in ("processes", "gpus")))


def sampling_key(config: TrainConfig) -> str:
    """All that engines and judges are made from; runs with the same key can share them."""
    return json.dumps(
        {
            "model": [config.model.path, config.model.dtype],
            "max_tokens": [config.data.max_prompt_tokens, config.max_response_tokens],
            "verifier": config.verifier.model_dump(mode="json"),
            "splitter": config.splitter,
            "keep": config.keep.rule,
            "rollout": config.rollout.model_dump(mode="json"),
            "placement": config.placement.model_dump(mode="json"),
            "own": factories.own_engines(config),
        },
        sort_keys=True,
    )


def learner_key(config: TrainConfig) -> str:
    """All that learner processes are started from; models are built in them anew for each run."""
    return json.dumps(config.placement.model_dump(mode="json"), sort_keys=True)
