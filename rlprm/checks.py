"""Combinations of settings that cannot work, refused before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlprm.batch import shards_needed
from rlprm.errors import ConfigError
from rlprm.placement import check_placement

if TYPE_CHECKING:
    from rlprm.config import (
        EnginePlacement,
        EvaluateConfig,
        LearnerSection,
        OptimizerSection,
        Placement,
        ProcessSource,
        RolloutSection,
        SftConfig,
        TrainConfig,
        TrainPlacement,
    )
    from rlprm.config_dpo import DpoConfig
    from rlprm.config_prm import PrmConfig
    from rlprm.core.implicit import Granularity

# Normalizers of their own that compare the responses of a group, and centres that do not.
GROUPED = ("rlprm.core.drpo.drpo", "rlprm.core.best_of_group.best_of_group")
PAIRED = ("ce_instance_balanced", "dpo", "dpo_detached", "nca", "kto_paired")  # PRM losses that compare responses
UNGROUPED = ("none", "batch", "running")
BUILT_IN: Mapping[str, Granularity] = {"outcome": "whole", "kl": "token"}
# Names of the policy's own parts in checkpoints and exports: a source of that name would overwrite them.
RESERVED = ("policy", "policy_critic", "critic", "reference")
# Pieces after which the sign of a stream's credit says whether the response was right.
SIGNED = (
    "rlprm.core.gates.sign_consistent",
    "rlprm.core.gates.selective",
    "rlprm.core.gates.failure_agrees",
    "rlprm.core.merge.posterior_gate",
)


def check_train(config: TrainConfig) -> None:
    """Cross-field rules of a training run.

    Raises:
        ValueError: with what was found, what was expected and what to do.
    """
    _sources(config)
    _groups(config)
    _kl(config)
    _critic(config)
    _arithmetic(config)
    _learners(config)
    _transport(config.placement)
    _placement(config.placement)
    _recovery(config)
    _temperature("temperature", config.temperature)
    _temperature("evaluation.temperature", config.evaluation.temperature)
    _engine(config.rollout, config.placement)
    _pieces(config)
    _whitening(config)
    _together(config)


def check_evaluate(config: EvaluateConfig) -> None:
    """Cross-field rules of an evaluation.

    Raises:
        ValueError: with what was found, what was expected and what to do.
    """
    for temperature in config.temperatures:
        if temperature > 0:
            _temperature("temperatures", temperature)
    _engine(config.rollout, config.placement)
    _placement(config.placement)


def check_sft(config: SftConfig | DpoConfig | PrmConfig) -> None:
    """Cross-field rules of fine-tuning, supervised or on preferences.

    Raises:
        ValueError: with what was found, what was expected and what to do.
    """
    _learner("learner", config.learner, config.placement.device, config.steps)
    _placement(config.placement)


def _sources(config: TrainConfig) -> None:
    for name, stream in config.streams.items():
        if name in RESERVED:
            raise ValueError(
                f"streams.{name}: the policy's checkpoint has a folder of that name ({', '.join(RESERVED)} are taken); "
                "choose another, for example process"
            )
        if name in BUILT_IN and stream.source is not None:
            raise ValueError(f"streams.{name} is built in and has a source; set streams.{name}.source to null")
        if name not in BUILT_IN and stream.source is None:
            raise ValueError(
                f"streams.{name} has no source; give it one (source@streams.{name}.source=implicit), or use one of the "
                f"built-in names {', '.join(BUILT_IN)}"
            )
        if stream.source is not None:
            _source(config, name, stream.source)
        if stream.gate and stream.gate["_target_"] == "rlprm.core.gates.trust_gate" and not _measured(stream.source):
            raise ValueError(
                f"streams.{name}.gate is trust, and only a PRM's pair accuracy is measured, so its trust would stay 0; "
                f"use gate@streams.{name}.gate=open"
            )


def _source(config: TrainConfig, name: str, section: ProcessSource) -> None:
    """What the source's own class says of its settings, and that the streams it names are there."""
    from rlprm.run.factories import kind, outputs, settings, sources

    target = kind(section)
    if not (isinstance(target, type) and issubclass(target, _base())):
        raise ValueError(
            f"streams.{name}.source.kind is {section.kind['_target_']}; expected a subclass of rlprm.sources.base.ProcessSource"
        )
    if missing := sorted(target.__abstractmethods__):
        raise ValueError(
            f"streams.{name}.source.kind {section.kind['_target_']} has no {', '.join(missing)}(); write it"
        )
    if section.learner is not None and section.model is None:
        raise ValueError(f"streams.{name}.source has a learner and no model; name the folder of the model that learns")
    if name in outputs(config):
        of, output = outputs(config)[name]
        if of not in sources(config) or output not in kind(sources(config)[of]).outputs:
            raise ValueError(
                f"streams.{name} is the output {output!r} of stream {of!r}, and no source of that name gives one; streams with "
                f"sources: {', '.join(sorted(sources(config))) or 'none'}"
            )
        return
    try:
        target.check(model=section.model, learner=section.learner is not None, **settings(section))
    except ConfigError as error:
        raise ValueError(f"streams.{name}.source: {error}") from error


def _base() -> type:
    from rlprm.sources.base import ProcessSource

    return ProcessSource


def _measured(section: ProcessSource | None) -> bool:
    from rlprm.run.factories import kind

    return section is not None and kind(section).measures


def _groups(config: TrainConfig) -> None:
    if config.responses_per_prompt > 1:
        return
    _compared(config)
    for name, stream in config.streams.items():
        normalizer = stream.normalizer or {}
        centre = normalizer.get("centre", "none")
        if normalizer.get("_target_") in GROUPED:
            centre = normalizer["_target_"].rpartition(".")[2]
        elif normalizer.get("scale") == "rank":
            centre = "rank"
        elif centre in UNGROUPED:
            continue
        raise ValueError(
            f"streams.{name}.normalizer centres by {centre}, which compares responses to the same prompt, and "
            "responses_per_prompt is 1; use at least 2, or a normalizer without a group (raw, batch_mean)"
        )


def _compared(config: TrainConfig) -> None:
    """Estimators, PRM losses and selections that mean nothing for a single response."""
    for name, stream in config.streams.items():
        baseline = (stream.estimator or {}).get("baseline", "none")
        if baseline != "none":
            raise ValueError(
                f"streams.{name}.estimator takes a baseline ({baseline}) from the other responses, and responses_per_prompt is "
                "1; use at least 2, or baseline none"
            )
        loss = (stream.source.kind.get("loss") or {}).get("_target_", "") if stream.source is not None else ""
        if loss.rpartition(".")[2] in PAIRED:
            raise ValueError(
                f"streams.{name}.source.kind.loss is {loss}, which compares responses to the same prompt, and "
                "responses_per_prompt is 1; use at least 2, or another loss (ce, bco, kto_unpaired)"
            )


def _together(config: TrainConfig) -> None:
    """Pieces of different sections that would undo each other without a word."""
    from rlprm.run.factories import kind, settings, sources

    keep = config.select.get("keep")
    if keep is not None and keep >= config.responses_per_prompt:
        raise ValueError(
            f"select.keep is {keep} and responses_per_prompt {config.responses_per_prompt}: nothing would be selected; sample "
            "more (PROF keeps 4 of 8), or keep fewer"
        )
    surrogate = config.policy_loss.surrogate["_target_"]
    for name, section in sources(config).items():
        weight, where = config.streams[name].weight, kind(section).granularity(**settings(section))
        if surrogate == "rlprm.core.policy_loss_sequence.gspo" and weight and where != "whole":
            raise ValueError(
                f"policy_loss is gspo, which averages a response's advantages, and streams.{name} pays its {where}s one by one; "
                "use policy_loss=gspo_token"
            )
    for name, stream in config.streams.items():
        mode = config.policy_loss.aggregation
        if (stream.normalizer or {}).get("_target_") == "rlprm.core.drpo.drpo" and mode != "seq-mean-token-mean":
            raise ValueError(
                f"streams.{name}.normalizer is drpo and policy_loss.aggregation {mode}; its weights are those of "
                "seq-mean-token-mean (policy_loss=drpo)"
            )


def _kl(config: TrainConfig) -> None:
    if "kl" in config.streams and config.policy_loss.kl_weight > 0:
        raise ValueError("KL is both a reward stream and a loss (policy_loss.kl_weight); keep one of the two")


def _critic(config: TrainConfig) -> None:
    if config.critic is None:
        return
    for name, stream in config.streams.items():
        if stream.estimator and not stream.estimator["_target_"].endswith(".none"):
            raise ValueError(
                f"streams.{name}.estimator is {stream.estimator['_target_']}; with a critic GAE accumulates, so the "
                f"estimator must be none (estimator@streams.{name}.estimator=none)"
            )


def _arithmetic(config: TrainConfig) -> None:
    if config.keep.min_prompts > config.prompts_per_step:
        raise ValueError(
            f"keep.min_prompts is {config.keep.min_prompts} and prompts_per_step {config.prompts_per_step}; no step could "
            "ever have enough prompts"
        )
    shards = shards_needed(config.placement.policy_ranks, config.placement.prm_ranks)
    if config.keep.min_prompts < shards:
        raise ValueError(
            f"keep.min_prompts is {config.keep.min_prompts} and a batch has {shards} shards; each needs a group of its own, "
            f"so set keep.min_prompts to at least {shards}"
        )


def _learners(config: TrainConfig) -> None:
    from rlprm.run.factories import updates

    learners: dict[str, LearnerSection] = {"policy": config.policy}
    if config.critic is not None:
        learners["critic.learner"] = config.critic.learner
    for name, stream in config.streams.items():
        if stream.source is not None and stream.source.learner is not None:
            learners[f"streams.{name}.source.learner"] = stream.source.learner
    for role, learner in learners.items():
        if learner.mini_batches > config.prompts_per_step:
            raise ValueError(
                f"{role}.mini_batches is {learner.mini_batches} and prompts_per_step {config.prompts_per_step}; a mini-batch "
                "holds at least one prompt's group"
            )
        _learner(role, learner, config.placement.device, updates(config, learner))


def _learner(role: str, learner: OptimizerSection, device: str, total_steps: int) -> None:
    from rlprm.engine.schedule import check

    if learner.offload != "none" and device == "cpu":
        raise ValueError(f"{role}.offload is {learner.offload} on device cpu, where there is nothing to offload from")
    try:
        check(kind=learner.schedule, warmup=learner.warmup, total=total_steps)
    except ConfigError as error:
        raise ValueError(f"{role}: {error}") from error


def _transport(placement: TrainPlacement) -> None:
    if placement.weight_transport == "gloo" and placement.device == "cuda":
        raise ValueError("weight_transport gloo moves tensors on CPU; use nccl (between GPUs) or object_store on cuda")
    bucket, store = placement.weight_bucket_bytes, placement.object_store_bytes
    if placement.weight_transport == "object_store" and store is not None and bucket > store:
        raise ValueError(
            f"placement.weight_bucket_bytes is {bucket} and placement.object_store_bytes {store}: no bucket of weights "
            "would fit the store; lower weight_bucket_bytes, or raise object_store_bytes"
        )


def _placement(placement: Placement) -> None:
    try:
        check_placement(placement)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _recovery(config: TrainConfig) -> None:
    """A run cannot begin with fewer processes than it may shrink to."""
    for key in ("policy_ranks", "prm_ranks", "engines"):
        fewest, count = getattr(config.recovery, f"min_{key}"), getattr(config.placement, key)
        if fewest is not None and fewest > count:
            raise ValueError(
                f"recovery.min_{key} is {fewest} and placement.{key} {count}: the run would begin with fewer than it may go on "
                f"with; set recovery.min_{key} to at most {count}, or to null (all of them)"
            )


def _temperature(key: str, value: float) -> None:
    from rlprm.engine.generating import MIN_TEMPERATURE

    if value < MIN_TEMPERATURE:
        raise ValueError(
            f"{key} {value} is below {MIN_TEMPERATURE}, the smallest at which the engines sample; raise it"
        )


def _engine(rollout: RolloutSection, placement: EnginePlacement) -> None:
    """The engine's memory belongs to its device."""
    cache, share = (_setting(rollout.engine, key) for key in ("kv_cache_bytes", "gpu_memory_utilization"))
    if placement.device == "cpu" and share is not None:
        raise ValueError(
            "rollout.engine.gpu_memory_utilization is set and placement.device is cpu; use rollout=vllm_cpu, or a placement "
            "with GPUs"
        )
    if placement.device == "cuda" and cache is not None:
        raise ValueError(
            "rollout.engine.kv_cache_bytes is set and placement.device is cuda, where the cache is a share of the GPU; use "
            "rollout=vllm_gpu"
        )
    if share is not None and placement.gpus_per_engine < 1 and share > placement.gpus_per_engine:
        raise ValueError(
            f"rollout.engine.gpu_memory_utilization is {share} and placement.gpus_per_engine {placement.gpus_per_engine}; "
            "an engine that shares its GPU must leave the others their part: set gpu_memory_utilization to at most "
            f"{placement.gpus_per_engine}"
        )


def _setting(part: Mapping[str, Any], key: str) -> Any:
    """An engine of another kind has no such setting: the same as one that is not set."""
    return part.get(key)


def _whitening(config: TrainConfig) -> None:
    if config.whiten != "full":
        return
    for name, stream in config.streams.items():
        for key, part in stream.pieces.items():
            if part["_target_"] in SIGNED:
                piece = part["_target_"].rpartition(".")[2]
                raise ValueError(
                    f"whiten is full and streams.{name}.{key} is {piece}: a shift moves zero, which would reward wrong "
                    "answers; use whiten=scale (or none)"
                )


def _pieces(config: TrainConfig) -> None:
    """Let every piece check its own settings, on two made-up responses."""
    import torch

    from rlprm.core.credit import CriticPlan
    from rlprm.core.mismatch import mismatch_weights
    from rlprm.core.policy_loss import one_choice
    from rlprm.core.probe import probe
    from rlprm.parts import made
    from rlprm.run.factories import kind, plans, settings

    critic = config.critic and CriticPlan(gamma=config.critic.gamma, lam=config.critic.lam)
    one, gap = torch.zeros(1, 1), config.mismatch
    sections = {name: stream.source for name, stream in config.streams.items() if stream.source is not None}
    where = {name: kind(section).granularity(**settings(section)) for name, section in sections.items()}
    where |= {name: granularity for name, granularity in BUILT_IN.items() if name in config.streams}
    trusted = [name for name, section in sections.items() if _measured(section)]
    tries = {
        "streams": lambda: probe(plans(config), critic, whiten=config.whiten, sources=where, trusted=trusted),
        "policy_loss.surrogate": lambda: made(config.policy_loss.surrogate)(one_choice()),
        "mismatch": lambda: mismatch_weights(one, one, one == 0, mode=gap.mode, cap=gap.cap, low=gap.low),
        "splitter": lambda: made(config.splitter)(["a"]),
        "keep.rule": lambda: made(config.keep.rule)([]),
        "select": lambda: made(config.select)([], {name: {} for name in sections}),
    }
    for key, attempt in tries.items():
        try:
            attempt()
        except ConfigError as error:
            raise ValueError(f"{key}: {error}") from error
