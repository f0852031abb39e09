"""Fine-tuning from start to end: examples or pairs, one learner, a model folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import ray

from rlprm.actors.group import answer
from rlprm.checks_models import same_vocabulary
from rlprm.config import SftConfig
from rlprm.config_dpo import DpoConfig
from rlprm.config_prm import PrmConfig
from rlprm.data.stored import folders
from rlprm.engine.combine import global_numbers
from rlprm.errors import ConfigError, DataError
from rlprm.parts import made
from rlprm.run import build, factories
from rlprm.run.folder import HEADER, last_config
from rlprm.run.progress import Progress
from rlprm.run.several_nodes import Shared

STRIDE = 20  # optimizer steps between two looks at the progress


def fine_tune(config: SftConfig, progress: Progress) -> dict[str, float]:
    """Train on examples, write the folder `config.output`, and return the last measurements.

    Raises:
        ConfigError: the output folder exists and is not empty, or stored rollouts are of another tokenizer's tokens.
    """
    refuse_full(config.output)
    if config.initial is not None:
        made(config.initial)(config.model.path)
    if "runs" in config.examples:
        check_runs(config.examples["runs"], config.model.path)
    return learnt(config, partial(factories.supervised, config), name="sft", told="sft/loss", progress=progress)


def refuse_full(folder: str) -> None:
    """Raise where the folder to write holds something already."""
    output = Path(folder)
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"output {output} is not empty; choose another folder or remove it")


def check_runs(runs: str | Sequence[str], model: str) -> None:
    """The runs sampled with the vocabulary of ``model``, or their token ids would mean something else to it.

    A run whose own model folder has gone is taken at its word.

    Raises:
        ConfigError: another vocabulary.
        DataError: a folder that holds no run.
    """
    for run in folders(runs):
        if not (Path(run) / HEADER).is_file():
            raise DataError(f"{run} holds no run ({HEADER} is missing); expected a folder such as runs/NAME/seed0")
        own = last_config(Path(run))["model"]["path"]
        if Path(own).is_dir():
            same_vocabulary(f"the model of the run {run},", own, model)


def learnt(
    config: SftConfig | DpoConfig | PrmConfig,
    factory: Callable[[int], Any],
    *,
    name: str,
    told: str,
    progress: Progress,
) -> dict[str, float]:
    """Run the learner that ``factory`` makes on each rank to its end, export it, and return the last measurements.

    ``told`` is the metric that the progress shows.
    """
    output = Path(config.output)
    logs = output.parent / f"{output.name}.logs"
    metrics: dict[str, float] = {}
    with ExitStack() as stack:
        with progress.stage("start Ray"):
            shared = Shared(folder=output.parent, models={"policy": {"model.path": config.model.path}})
            seating = stack.enter_context(
                build.ray_cluster(config.placement, learners=True, own_engines=0, shared=shared, say=progress.say)
            )
        with progress.stage("start learners"):
            group = build.started_group(name, config.placement.policy_ranks, config.placement, logs, seating)
            stack.callback(lambda: [ray.kill(worker) for worker in group.workers])
            building = [
                worker.build_supervised.remote(partial(factory, rank)) for rank, worker in enumerate(group.workers)
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
                bar.advance(size, f"{told.rpartition('/')[2]} {metrics[told]:.3f}")
        group.get(group.all(lambda worker: worker.export_supervised, str(output.resolve())), "export")
    return metrics
