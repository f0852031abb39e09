"""Supervised fine-tuning from start to end."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import ray

from rlprm.actors.group import answer
from rlprm.config import SftConfig
from rlprm.engine.combine import global_numbers
from rlprm.errors import ConfigError
from rlprm.parts import made
from rlprm.run import build, factories
from rlprm.run.progress import Progress

STRIDE = 20  # optimizer steps between two looks at the progress


def fine_tune(config: SftConfig, progress: Progress) -> dict[str, float]:
    """Train, write the folder `config.output`, and return the last measurements.

    Raises:
        ConfigError: the output folder exists and is not empty.
    """
    output = Path(config.output)
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"output {output} is not empty; choose another folder or remove it")
    if config.initial is not None:
        made(config.initial)(config.model.path)
    logs = output.parent / f"{output.name}.logs"
    metrics: dict[str, float] = {}
    with ExitStack() as stack:
        with progress.stage("start Ray"):
            stack.enter_context(build.ray_cluster(config.placement, learners=True))
        with progress.stage("start learners"):
            group = build.started_group("sft", config.placement.policy_ranks, config.placement, logs)
            stack.callback(lambda: [ray.kill(worker) for worker in group.workers])
            building = [
                worker.build_supervised.remote(partial(factories.supervised, config, rank))
                for rank, worker in enumerate(group.workers)
            ]
            answer(building, what="building the model", timeout_s=config.placement.start_timeout_s, logs=str(logs))
        with progress.stage("fine-tune", config.steps, "steps") as bar:
            done = 0
            while done < config.steps:
                size = min(STRIDE, config.steps - done)
                metrics = global_numbers(
                    group.get(group.all(lambda worker: worker.advance_supervised, size), "fine-tuning")
                )
                done += size
                bar.advance(size, f"loss {metrics['sft/loss']:.3f}")
        group.get(group.all(lambda worker: worker.export_supervised, str(output.resolve())), "export")
    return metrics
