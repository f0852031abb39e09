"""The configuration of ``rlprm prm``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from rlprm.config import Count, Model, OptimizerSection, Part, Section, SftPlacement


class PrmConfig(Section):
    """The whole configuration of ``rlprm prm``."""

    output: str  # Hugging Face folder to write
    seed: Annotated[int, Field(ge=0)]
    steps: Count  # optimizer steps
    batch_size: Count  # solutions per optimizer step
    solutions: Part  # labelled solutions to learn from
    held_out: Part | None  # labelled solutions on which the PRM is measured at the end
    format: Part  # how the PRM reads a solution; the same that training with it names
    model: Model  # the initial model
    learner: OptimizerSection
    placement: SftPlacement

    @model_validator(mode="after")
    def _schedule_fits(self) -> PrmConfig:
        from rlprm.checks import check_sft

        check_sft(self)
        return self
