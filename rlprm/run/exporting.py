"""From a run's checkpoint to Hugging Face folders.

A checkpoint holds DeepSpeed's own shards, one file per rank. What puts them together is what wrote them: the learners
start as the run's configuration says (same ranks, same ZeRO stage), load, and gather their weights bucket by bucket.
So there is no second reader of DeepSpeed's formats that could disagree with the first. It needs the run's ranks, and no
rollout engine.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import ray

from rlprm.checks_models import check_model_folders
from rlprm.config import TrainConfig, validated
from rlprm.errors import CheckpointError, ConfigError
from rlprm.run import build, factories
from rlprm.run.checkpoint import damage
from rlprm.run.folder import CONFIG, HEADER, last_config
from rlprm.run.progress import Progress
from rlprm.run.scratch import scratch_logs
from rlprm.run.several_nodes import of_training
from rlprm.run.tracker import send_models
from rlprm.run.tracking import wandb_id

NOTE = "export.json"
_STEP = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written, and the training step its weights are from."""

    step: int
    folders: tuple[Path, ...]


def export(run: Path, output: Path, progress: Progress) -> Exported:
    """Write ``output/policy`` and one folder per learnt PRM, from the newest intact checkpoint of ``run``.

    All appear at once or not at all; ``output/export.json`` says which run and step they are from.

    Raises:
        ConfigError: ``run`` is no run folder, or ``output`` is not empty.
        CheckpointError: the run has no intact checkpoint.
    """
    config = here(run_config(run))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output {output} is not an empty folder; choose another one or remove it")
    check_model_folders(config)
    with progress.stage("verify checkpoint"):
        step, checkpoint = newest_checkpoint(run, progress)
    partial = (output.parent / f"{output.name}.partial").resolve()
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with ExitStack() as stack:
        logs = stack.enter_context(scratch_logs("export"))
        with progress.stage("start Ray"):
            shared = replace(of_training(config), folder=partial)  # ranks on every node write their part
            seating = stack.enter_context(
                build.ray_cluster(
                    config.placement,
                    learners=True,
                    own_engines=0,
                    prm=factories.on_prm_ranks(config),
                    shared=shared,
                    say=progress.say,
                )
            )
        with progress.stage("start learners"):
            learning = build.learning(config, None, logs=logs, seating=seating)
        stack.callback(lambda: [ray.kill(worker) for group in learning.groups for worker in group.workers])
        with progress.stage(f"export step {step}"):
            for group in learning.groups:
                group.get(group.all(lambda worker: worker.load, str(checkpoint.resolve())), "load")
                group.get(group.all(lambda worker: worker.export, str(partial)), "export")
    names = sorted(path.name for path in partial.iterdir())
    note = {"run": str(run.resolve()), "step": step, "models": names}
    (partial / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    if output.exists():
        output.rmdir()  # it is empty
    partial.rename(output)
    return Exported(step=step, folders=tuple(output / name for name in names))


def here(config: TrainConfig) -> TrainConfig:
    """The run's configuration on this machine: the cluster that it ran on may be gone."""
    alone = {"ray_address": None, "nodes": 1, "policy_nodes": None, "prm_nodes": None, "engine_nodes": None}
    return config.model_copy(update={"placement": config.placement.model_copy(update=alone)})


def run_config(run: Path) -> TrainConfig:
    """The resolved configuration of the run's last start.

    Raises:
        ConfigError: not a run folder, or one of another version of rlprm.
    """
    if not run.is_dir():
        raise ConfigError(f"{run} is no folder; expected the folder of a run, for example runs/NAME/seed0")
    if not (run / HEADER).is_file() or not (run / CONFIG).is_file():
        inside = sorted(path.parent for path in run.glob(f"*/{HEADER}")) or sorted(
            path.parent for path in run.glob(f"*/*/{HEADER}")
        )
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise ConfigError(f"{run} holds no run (no {HEADER} with {CONFIG}); expected what rlprm train wrote{hint}")
    try:
        return validated(TrainConfig, last_config(run))
    except ConfigError as error:
        raise ConfigError(
            f"the configuration in {run} is not a configuration of this version of rlprm: {error}"
        ) from None


def newest_checkpoint(run: Path, progress: Progress) -> tuple[int, Path]:
    """Step and folder of the newest intact checkpoint; damaged ones are named and passed over. Nothing is changed.

    Raises:
        CheckpointError: there is none.
    """
    folder = run / "checkpoints"
    steps = {path: match for path in folder.glob("step_*") if (match := _STEP.fullmatch(path.name))}
    damaged = []
    for path, match in sorted(steps.items(), key=lambda item: -int(item[1].group(1))):
        reason = damage(path)
        if reason is None:
            return int(match.group(1)), path
        progress.say(f"skipped a damaged checkpoint: {path}: {reason}")
        damaged.append(f"{path.name}: {reason}")
    if damaged:
        raise CheckpointError(f"no checkpoint under {folder} is intact: {'; '.join(damaged)}; restore one from a copy")
    raise CheckpointError(
        f"{run} has no checkpoint yet; let it run to one (checkpoint.every), the last step always writes one"
    )


def send(run: Path, exported: Exported) -> str:
    """Keep what was exported as an artifact of the run's own entry on Weights & Biases; "online" or "offline"."""
    config = run_config(run)
    return send_models(
        run,
        project=config.tracker.project,
        run_id=wandb_id(run),
        name=config.name,
        models=exported.folders,
        step=exported.step,
    )
