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
    def _parts_fit_together(self) -> PrmConfig:
        from rlprm.checks import check_sft
        from rlprm.parts import locate

        check_sft(self)
        head = self.format.get("head", getattr(locate(self.format["_target_"]), "head", None))
        if head != "classifier" and (head is not None or self.format.get("good") is not None):
            raise ValueError(
                f"format reads the {head or 'vocabulary'} head of a model, and rlprm prm trains a classification head; use "
                "prm_format@format=token_classification, qwen_prm, reasonflux or fin_prm"
            )
        return self
