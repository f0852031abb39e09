"""What the values in ``conf/`` mean: frozen sections with types, bounds, units and cross-field checks.

Values live in ``conf/``; no field here has a default, so a key that is missing in YAML is an error and a key that is
not listed here is one too. A dotted ``_target_`` is checked against the signature of what it names.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from rlprm.config_base import Count, NonNegative, Part, Positive, Section
from rlprm.config_watching import Alarms, Checkpoint, Evaluation, Recovery, Tracker
from rlprm.errors import ConfigError


class SampledModel(Section):
    """A model as an engine needs it."""

    path: Annotated[str, Field(min_length=1)]
    dtype: Literal["float32", "bfloat16"]


class Model(SampledModel):
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    gradient_checkpointing: bool


class Source(Section):
    reader: Part  # () -> rows {question, gold}
    weight: Positive  # share of prompts drawn from this source


class HeldOut(Section):
    """Evaluation sets, and how a question becomes a prompt."""

    evaluation: dict[str, Part]  # name -> reader
    template: Part
    max_prompt_tokens: Count


class Data(HeldOut):
    train: Annotated[dict[str, Source], Field(min_length=1)]


class VerifierSection(Section):
    function: Part
    workers: Count  # processes
    timeout_s: Positive  # wall clock per verdict
    memory_mb: Count  # address space per process
    max_error_fraction: Annotated[float, Field(ge=0, le=1)]  # more absent verdicts in a step end the run


class KeepSection(Section):
    rule: Part
    max_rounds: Count
    min_prompts: Count


class RolloutSection(Section):
    engine: Part


class TrustRegion(Section):
    weight: Positive  # of the hinge, per nat
    delta: NonNegative  # nats per token that are free


class PolicyLoss(Section):
    surrogate: Part
    aggregation: Literal[
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum"
    ]
    horizon: Count | None  # tokens
    kl_weight: NonNegative
    kl_kind: Literal["k1", "k2", "k3", "straight_through"]  # k1 is refused with its reason, which is worth reading
    entropy_weight: NonNegative
    trust_region: TrustRegion | None

    @model_validator(mode="after")
    def _kl_loss_has_a_gradient(self) -> PolicyLoss:
        if self.kl_kind == "k1":
            raise ValueError(
                "kl_kind is k1, and k1 as a loss has zero expected gradient; use k2 or straight_through, or k1 in the "
                "reward (a stream named kl)"
            )
        return self

    @model_validator(mode="after")
    def _horizon_belongs_to_its_mode(self) -> PolicyLoss:
        if (self.aggregation == "seq-mean-token-sum-norm") != (self.horizon is not None):
            raise ValueError(
                f"horizon is {self.horizon} with aggregation {self.aggregation}; "
                "it is needed by seq-mean-token-sum-norm and by no other mode"
            )
        return self


class Mismatch(Section):
    mode: Literal["none", "truncate", "band", "sequence_truncate"]
    cap: Positive | None
    low: Positive | None

    @model_validator(mode="after")
    def _bounds_belong_to_the_mode(self) -> Mismatch:
        if (self.mode != "none") != (self.cap is not None) or (self.mode == "band") != (self.low is not None):
            raise ValueError(f"mode {self.mode} with cap {self.cap} and low {self.low}: none takes neither, band both")
        return self


class OptimizerSection(Section):
    """How one learner updates its weights."""

    lr: Positive
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
    eps: Positive
    weight_decay: NonNegative
    schedule: Literal["constant", "linear", "cosine"]
    warmup: Annotated[int, Field(ge=0)]  # optimizer steps
    max_grad_norm: Positive
    token_budget: Count  # tokens per forward pass
    layout: Literal["padded", "packed"]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    offload: Literal["none", "cpu"]


class LearnerSection(OptimizerSection):
    """And how often, in how many parts, it goes over the batch of a step."""

    epochs: Count
    mini_batches: Count


class Critic(Section):
    model: str
    gamma: Annotated[float, Field(gt=0, le=1)]
    lam: Annotated[float, Field(ge=0, le=1)]
    clip: Positive | None
    learner: LearnerSection


class ProcessSource(Section):
    kind: Part  # the source's class and its own arguments
    model: str | None  # folder of the PRM; null where the source has no model
    learner: LearnerSection | None


class StreamSection(Section):
    """A stream with credit of its own has all pieces; one that a merge sums into another has a source and no more."""

    source: ProcessSource | None  # null for the built-in streams `outcome` and `kl`
    merge: Part | None
    normalizer: Part | None
    estimator: Part | None
    weight: float | None
    gate: Part | None

    @model_validator(mode="after")
    def _all_pieces_or_none(self) -> StreamSection:
        pieces = ("merge", "normalizer", "estimator", "weight", "gate")
        missing = [piece for piece in pieces if getattr(self, piece) is None]
        if missing and len(missing) < len(pieces):
            raise ValueError(
                f"{', '.join(missing)} null and the others not; a stream that a merge of another stream takes in has all of "
                f"{', '.join(pieces)} null, every other stream has all of them"
            )
        return self

    @property
    def pieces(self) -> dict[str, dict[str, Any]]:
        """Its pieces by group; none where another stream takes it in."""
        named = {"merge": self.merge, "normalizer": self.normalizer, "estimator": self.estimator, "gate": self.gate}
        return {group: part for group, part in named.items() if part is not None}


# Numbers of nodes (0: the head), dealt out to the processes of a role in turn; None: filled in order.
NodeList = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None


class Placement(Section):
    """What every command that starts Ray reads."""

    device: Literal["cpu", "cuda"]
    threads: Count
    object_store_bytes: Count | None
    ray_address: str | None
    start_timeout_s: Positive
    stage_timeout_s: Positive
    nodes: Count


class LearnerPlacement(Placement):
    policy_ranks: Count
    policy_nodes: NodeList
    gpus_per_rank: NonNegative
    collective_timeout_s: Positive

    @model_validator(mode="after")
    def _ranks_are_on_the_device(self) -> LearnerPlacement:
        _on_device(self.device, "gpus_per_rank", self.gpus_per_rank)
        return self


class EnginePlacement(Placement):
    engines: Count
    engine_nodes: NodeList
    tensor_parallel: Count
    gpus_per_engine: NonNegative

    @model_validator(mode="after")
    def _engines_are_on_the_device(self) -> EnginePlacement:
        _on_device(self.device, "gpus_per_engine", self.gpus_per_engine)
        return self


def _on_device(device: str, key: str, gpus: float) -> None:
    if (device == "cuda") != (gpus > 0):
        raise ValueError(f"device {device} with {key} {gpus}; expected 0 on cpu and more than 0 on cuda")


class TrainPlacement(EnginePlacement, LearnerPlacement):
    """Where the processes of `rlprm train` sit."""

    prm_ranks: Count
    prm_nodes: NodeList
    weight_transport: Literal["object_store", "gloo", "nccl"]
    weight_bucket_bytes: Count

    @model_validator(mode="after")
    def _weights_can_travel(self) -> TrainPlacement:
        if self.weight_transport == "nccl" and self.device == "cpu":
            raise ValueError("weight_transport nccl needs device cuda; use object_store or gloo on cpu")
        return self


class SftPlacement(LearnerPlacement):
    """Where the learner of `rlprm sft` sits; it is alone."""

    prm_ranks = engines = tensor_parallel = property(lambda self: 0)
    gpus_per_engine = property(lambda self: 0.0)
    prm_nodes = engine_nodes = property(lambda self: None)


class EvaluatePlacement(EnginePlacement):
    """Where the engines of `rlprm evaluate` sit; without learners one shard holds every response."""

    policy_ranks = prm_ranks = property(lambda self: 1)
    gpus_per_rank = property(lambda self: 0.0)
    policy_nodes = prm_nodes = property(lambda self: None)


class TrainConfig(Section):
    """The whole configuration of ``rlprm train``."""

    name: Annotated[str, Field(min_length=1)]
    output_dir: str
    seed: Annotated[int, Field(ge=0)]
    steps: Count
    prompts_per_step: Count
    responses_per_prompt: Count
    temperature: Positive
    max_response_tokens: Count
    resume: Literal["auto", "never"]
    model: Model
    data: Data
    verifier: VerifierSection
    splitter: Part
    keep: KeepSection
    select: Part
    rollout: RolloutSection
    streams: Annotated[dict[str, StreamSection], Field(min_length=1)]
    whiten: Literal["none", "scale", "full"]
    policy_loss: PolicyLoss
    mismatch: Mismatch
    policy: LearnerSection
    critic: Critic | None
    placement: TrainPlacement
    tracker: Tracker
    alarms: Alarms
    evaluation: Evaluation
    checkpoint: Checkpoint
    recovery: Recovery

    @model_validator(mode="after")
    def _parts_fit_together(self) -> TrainConfig:
        from rlprm.checks import check_train
        from rlprm.run.alarms import check_reach

        check_train(self)
        check_reach(self)
        return self


class EvaluateConfig(Section):
    """The whole configuration of ``rlprm evaluate``: training's own sections where both have them."""

    output: str | None  # JSON file for the results; null: print only
    seed: Annotated[int, Field(ge=0)]
    temperatures: Annotated[list[NonNegative], Field(min_length=1)]  # 0: greedy
    samples: Count  # responses per prompt at temperatures above 0
    limit: Count | None  # prompts of each set; null: all
    max_response_tokens: Count
    model: SampledModel
    data: HeldOut
    verifier: VerifierSection
    splitter: Part
    rollout: RolloutSection
    placement: EvaluatePlacement

    @model_validator(mode="after")
    def _something_is_measured_once(self) -> EvaluateConfig:
        if not self.data.evaluation:
            raise ValueError("data.evaluation names no set; add a reader under data.evaluation.NAME")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures {self.temperatures} names one twice; give each once")
        from rlprm.checks import check_evaluate

        check_evaluate(self)
        return self


class JudgeConfig(Section):
    """The whole configuration of ``rlprm judge``."""

    verifier: VerifierSection


class SftConfig(Section):
    """The whole configuration of ``rlprm sft``."""

    output: str  # Hugging Face folder to write
    seed: Annotated[int, Field(ge=0)]
    steps: Count  # optimizer steps
    batch_size: Count  # examples per optimizer step
    examples: Part  # (question, response) texts
    template: Part  # how a question becomes a prompt
    initial: Part | None  # makes the initial model folder; null: model.path exists
    model: Model
    learner: OptimizerSection
    placement: SftPlacement

    @model_validator(mode="after")
    def _schedule_fits(self) -> SftConfig:
        from rlprm.checks import check_sft

        check_sft(self)
        return self


def validated(schema: type[Section], values: Mapping[str, Any]) -> Any:
    """``values`` as a frozen ``schema``; every mistake is named by its key, with the nearest right one.

    Raises:
        ConfigError: unknown, missing or contradictory keys, wrong types, values out of bounds.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(schema, item) for item in error.errors())) from None


def _sentence(schema: type[Section], item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), _names(schema), n=1)
        return f"{key}: unknown key" + (f"; nearest is {near[0]!r}" if near else "; remove it")
    if item["type"] == "missing":
        return f"{key}: missing; expected a value in conf/ or as {key}=... on the command line"
    found = (
        item["input"]
        if isinstance(item["input"], (str, int, float, bool, type(None)))
        else type(item["input"]).__name__
    )
    if item["type"] == "value_error":
        return f"{key}: {item['msg'].removeprefix('Value error, ')}"
    return f"{key}: found {found!r}; {item['msg']}"


def _names(schema: type[BaseModel]) -> list[str]:
    """All field names of a schema and the sections below it."""
    names: set[str] = set()
    pending: list[Any] = [schema]
    seen: set[Any] = set()
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in seen:
            seen.add(annotation)
            names |= set(annotation.model_fields)
            pending += [field.annotation for field in annotation.model_fields.values()]
        pending += getattr(annotation, "__args__", ())
    return sorted(names)
