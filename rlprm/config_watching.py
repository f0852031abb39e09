"""Sections that say how a run is watched, evaluated and saved."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlprm.config_base import Count, Positive, Section


class Tracker(Section):
    tensorboard: bool
    tensorboard_dir: str | None
    wandb: bool
    project: str
    group: str | None
    job_type: str | None
    tags: list[str]
    config_artifact: bool
    rollout_groups: Annotated[int, Field(ge=0)] | None  # of the first rank; null: all groups of all ranks


Limits = Annotated[list[float | None], Field(min_length=2, max_length=2)]


class AlarmRule(Section):
    metric: str
    band: Limits  # lowest and highest value
    change: Limits  # lowest and highest multiple of the metric's moving mean
    patience: Count  # steps in a row
    action: Literal["log", "brake", "stop"]
    advice: str


class Alarms(Section):
    decay: Annotated[float, Field(ge=0, lt=1)]
    warmup: Annotated[int, Field(ge=0)]  # steps
    brake_factor: Annotated[float, Field(ge=0, lt=1)]
    brake_recovery: Annotated[float, Field(ge=0, le=1)]
    canary_every: Annotated[int, Field(ge=0)]  # steps
    rules: dict[str, AlarmRule] | None

    @model_validator(mode="after")
    def _rules_make_sense(self) -> Alarms:
        from rlprm.run.alarms import rules

        rules(self)
        return self


class Evaluation(Section):
    every: Annotated[int, Field(ge=0)]  # steps
    limit: Count | None  # prompts
    samples: Annotated[int, Field(ge=0)]
    temperature: Positive


class Checkpoint(Section):
    every: Annotated[int, Field(ge=0)]  # steps
    keep_last: Count


class Recovery(Section):
    """What happens when a process or its node is lost."""

    restarts: Annotated[int, Field(ge=0)]  # of the learners, from the last checkpoint
    wait_s: Annotated[float, Field(ge=0)]  # for lost nodes to come back
    min_policy_ranks: Count | None
    min_prm_ranks: Count | None
    min_engines: Count | None
