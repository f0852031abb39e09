"""Combinations of settings that cannot work, refused before any model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlprm.batch import shards_needed
from rlprm.errors import ConfigError

if TYPE_CHECKING:
    from rlprm.config import TrainConfig

BUILT_IN = ("outcome", "kl")


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
    _pieces(config)


def check_model_folders(config: TrainConfig) -> None:
    """Every model of the run is there.

    Raises:
        ConfigError: see :func:`check_model_folder`.
    """
    check_model_folder("model.path", config.model.path)
    for name, stream in config.streams.items():
        if stream.source is not None and stream.source.model is not None:
            check_model_folder(f"streams.{name}.source.model", stream.source.model)
    if config.critic is not None:
        check_model_folder("critic.model", config.critic.model)


def check_model_folder(key: str, path: str) -> None:
    """``path`` is a folder with a model's configuration and weights, or may be a hub name (``owner/name``).

    Raises:
        ConfigError: with the key of the configuration that names it.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{key} {path!r} has no config.json; expected a Hugging Face model folder")
        if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
            raise ConfigError(f"{key} {path!r} holds no weights (*.safetensors); expected a complete model folder")
    elif folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ConfigError(
            f"{key} {path!r} is no folder (looked for {folder.absolute()}); expected a Hugging Face model folder, or a "
            "hub name (owner/name) where the machine may download"
        )


def _sources(config: TrainConfig) -> None:
    for name, stream in config.streams.items():
        if name in BUILT_IN and stream.source is not None:
            raise ValueError(f"streams.{name} is built in and has a source; set streams.{name}.source to null")
        if name not in BUILT_IN and stream.source is None:
            raise ValueError(
                f"streams.{name} has no source; give it one (source@streams.{name}.source=implicit), or use one of the "
                f"built-in names {', '.join(BUILT_IN)}"
            )
        if stream.source is not None and (stream.source.model is None) != (stream.source.learner is None):
            raise ValueError(f"streams.{name}.source has only one of model and learner; a PRM needs both, a rule none")
        if stream.gate["_target_"] == "rlprm.core.gates.trust_gate" and (
            stream.source is None or not stream.source.model
        ):
            raise ValueError(
                f"streams.{name}.gate is trust, and only a PRM's pair accuracy is measured, so its trust would stay 0; "
                f"use gate@streams.{name}.gate=open"
            )
        if stream.source is not None and "beta" in stream.source.kind and not stream.source.kind["beta"] > 0:
            raise ValueError(
                f"streams.{name}.source.kind.beta is {stream.source.kind['beta']}; expected more than 0 (0 pays nothing, a "
                "negative one pays for being wrong)"
            )
    learnt = [name for name, stream in config.streams.items() if stream.source and stream.source.model]
    if len(learnt) > 1:
        raise ValueError(f"streams {', '.join(learnt)} each train a PRM; one learnt PRM per run is supported")


def _groups(config: TrainConfig) -> None:
    if config.responses_per_prompt > 1:
        return
    for name, stream in config.streams.items():
        centre = stream.normalizer.get("centre", "none")
        if centre in ("group", "leave_one_out", "token_mean_loo", "token_mean_loo_released", "step_index"):
            raise ValueError(
                f"streams.{name}.normalizer centres by {centre}, which compares responses to the same prompt, and "
                "responses_per_prompt is 1; use at least 2, or a normalizer without a group (raw, batch_mean)"
            )


def _kl(config: TrainConfig) -> None:
    if "kl" in config.streams and config.policy_loss.kl_weight > 0:
        raise ValueError("KL is both a reward stream and a loss (policy_loss.kl_weight); keep one of the two")


def _critic(config: TrainConfig) -> None:
    if config.critic is None:
        return
    for name, stream in config.streams.items():
        if not stream.estimator["_target_"].endswith(".none"):
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
    learners = {"policy": config.policy}
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
        if learner.offload != "none" and config.placement.device == "cpu":
            raise ValueError(
                f"{role}.offload is {learner.offload} on device cpu, where there is nothing to offload from"
            )
    on_gpu_only = "gpu_memory_utilization" in config.rollout.engine and (
        config.rollout.engine["gpu_memory_utilization"] is not None
    )
    if on_gpu_only and config.placement.device == "cpu":
        raise ValueError(
            "rollout.engine.gpu_memory_utilization is set and placement.device is cpu; use rollout=vllm_cpu, or a placement "
            "with GPUs"
        )
    if config.placement.weight_transport == "gloo" and config.placement.device == "cuda":
        raise ValueError("weight_transport gloo moves tensors on CPU; use nccl (between GPUs) or object_store on cuda")


def _pieces(config: TrainConfig) -> None:
    """Let every piece check its own settings, on two made-up responses."""
    import torch

    from rlprm.core.credit import CriticPlan, probe
    from rlprm.core.mismatch import mismatch_weights
    from rlprm.parts import made
    from rlprm.run.factories import plans

    critic = config.critic and CriticPlan(gamma=config.critic.gamma, lam=config.critic.lam)
    one, gap = torch.zeros(1, 1), config.mismatch
    tries = {
        "streams": lambda: probe(plans(config), critic, whiten=config.whiten),
        "policy_loss.surrogate": lambda: made(config.policy_loss.surrogate)(one, one, one, one == 0),
        "mismatch": lambda: mismatch_weights(one, one, one == 0, mode=gap.mode, cap=gap.cap, low=gap.low),
        "splitter": lambda: made(config.splitter)(["a"]),
        "keep.rule": lambda: made(config.keep.rule)([]),
    }
    for key, attempt in tries.items():
        try:
            attempt()
        except ConfigError as error:
            raise ValueError(f"{key}: {error}") from error
