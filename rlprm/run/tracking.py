"""The trackers that a run's configuration asks for."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from rlprm.cli.compose import Composed
from rlprm.config import TrainConfig
from rlprm.run.tracker import MetricsLog, RolloutLog, TensorBoard, Trackers, WandB


def trackers_of(config: TrainConfig, composed: Composed, folder: Path, resume_from: int | None) -> Trackers:
    """Where this run's metrics and rollouts go. ``resume_from``: the last step that counts; None: a new run."""
    sinks: list[Any] = [MetricsLog(folder, resume_from)]
    if config.tracker.tensorboard:
        sinks.append(TensorBoard(tensorboard_folder(config.tracker.tensorboard_dir, folder), resume_from))
    if config.tracker.wandb:
        sinks.append(
            WandB(
                folder,
                project=config.tracker.project,
                name=f"{config.name}-seed{config.seed}",
                group=config.tracker.group or config.name,
                job_type=config.tracker.job_type
                or config.name,  # in an ablation the cell, the group being the ablation
                tags=config.tracker.tags,
                run_id=wandb_id(folder),
                config=composed.values,
                artifact=config.name if config.tracker.config_artifact else None,
            )
        )
    return Trackers(sinks, RolloutLog(folder, resume_from))


def tensorboard_folder(shared: str | None, folder: Path) -> Path:
    """Where the event files go: in the run folder, or below a folder that all runs share, as ``<name>/seed<seed>``.

    >>> tensorboard_folder(None, Path("runs/quick/seed0")).as_posix()
    'runs/quick/seed0/tensorboard'
    >>> tensorboard_folder("/shared/tb", Path("runs/quick/seed0")).as_posix()
    '/shared/tb/quick/seed0'
    """
    return folder / "tensorboard" if shared is None else Path(shared, *folder.parts[-2:])


def wandb_id(folder: Path) -> str:
    """The run's own id on Weights & Biases, drawn once: a name and a seed may occur in many folders and projects."""
    file = folder / "wandb_id"
    if not file.is_file():
        file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return file.read_text(encoding="utf-8")
