"""The configuration of ``rlprm prepare``: data sets and models, where they come from and where they go."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from rlprm.config_base import Count, Positive, Section
from rlprm.data.prepare import Reading


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts:
        raise ValueError(f"is {path!r}; expected a path below the folder of data or models, without ..")
    return path


Inside = Annotated[str, AfterValidator(_inside)]
HubName = Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]


class DatasetSection(Section):
    """One split of one data set: where it is, what its columns hold, where the rows go."""

    hub: HubName
    config_name: str | None
    split: str
    revision: str | None  # commit; null: not pinned, the newest is taken and noted
    files: str  # pattern of the split's files in the repository, for --from
    rows: Count | None  # records of the split; another number is an error. null: not known
    role: Literal["train", "evaluation"]
    question: str
    answer: str
    solution: str | None
    gold: Literal["text", "boxed"]
    gold_pattern: str | None
    gold_remove: str
    missing_gold: Literal["refuse", "drop"]
    question_remove: list[str]
    only_column: str | None
    only_values: list[str]
    output: Inside

    @model_validator(mode="after")
    def _can_be_read(self) -> DatasetSection:
        self.reading()
        return self

    def reading(self) -> Reading:
        """What of it says how a record becomes a row."""
        return Reading(**{field: getattr(self, field) for field in Reading.__dataclass_fields__})


class ModelSource(Section):
    """One model of the hub, and the folder it becomes."""

    hub: HubName
    revision: str | None  # commit; null: not pinned, the newest is taken and noted
    output: Inside


class PrepareConfig(Section):
    """The whole configuration of ``rlprm prepare``."""

    data_dir: Annotated[str, Field(min_length=1)]
    models_dir: Annotated[str, Field(min_length=1)]
    timeout_s: Positive  # for an answer of the hub
    data: dict[str, DatasetSection]
    models: dict[str, ModelSource]

    @model_validator(mode="after")
    def _each_has_its_own_place(self) -> PrepareConfig:
        for what, outputs in (
            ("data", [each.output for each in self.data.values()]),
            ("models", [each.output for each in self.models.values()]),
        ):
            twice = [output for output, count in Counter(outputs).items() if count > 1]
            if twice:
                raise ValueError(f"{what}: two entries have the output {twice[0]!r}; give each its own")
        return self
