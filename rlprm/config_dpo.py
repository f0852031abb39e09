"""The configuration of ``rlprm dpo``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from rlprm.config import Count, Model, OptimizerSection, Part, Positive, Section, SftPlacement


class DpoConfig(Section):
    """The whole configuration of ``rlprm dpo``."""

    runs: str | Annotated[list[str], Field(min_length=1)]  # folders of runs
    output: str  # Hugging Face folder to write
    seed: Annotated[int, Field(ge=0)]
    steps: Count  # optimizer steps
    batch_size: Count  # pairs per optimizer step
    beta: Positive
    pairs_per_prompt: Count | None
    preference: Part  # (responses to one prompt) -> pairs
    model: Model  # the initial model and the reference
    learner: OptimizerSection
    placement: SftPlacement

    @model_validator(mode="after")
    def _schedule_fits(self) -> DpoConfig:
        from rlprm.checks import check_sft

        check_sft(self)
        return self
