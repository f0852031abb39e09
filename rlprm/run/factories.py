"""What is built inside an actor's process: plain functions of plain values, so that they travel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlprm.actors.judge import Judge
from rlprm.config import Critic as CriticSection
from rlprm.config import LearnerSection, OptimizerSection, SftConfig, TrainConfig
from rlprm.core.credit import CriticPlan, StreamPlan
from rlprm.data.tokenizer import load_tokenizer
from rlprm.errors import ConfigError


def judge(
    model_path: str,
    *,
    verifier: Mapping[str, Any],
    splitter: Callable[..., list[int]],
    keep: Callable[..., bool],
) -> Judge:
    """A judge with its own verifier processes; the verifier's canaries must pass first."""
    from rlprm.verify.pool import VerifierPool, check_canaries

    pool = VerifierPool(**verifier)
    check_canaries(pool)
    return Judge(tokenizer=load_tokenizer(model_path), pool=pool, splitter=splitter, keep=keep)


def needs_reference(config: TrainConfig) -> bool:
    """Does anything in this run measure from the frozen initial model? (Every PRM does: surprisal is its baseline.)"""
    has_prm = any(stream.source is not None and stream.source.model is not None for stream in config.streams.values())
    return has_prm or "kl" in config.streams or config.policy_loss.kl_weight > 0


def needs_steps(config: TrainConfig) -> bool:
    """Does a stream pay, compare or accumulate by reasoning step? Then a splitter that finds none is a mistake."""
    for stream in config.streams.values():
        pieces = [stream.normalizer, stream.estimator, *([stream.source.kind] if stream.source is not None else [])]
        named = {value for piece in pieces for value in piece.values() if isinstance(value, str)}
        if named & {"step", "step_index", "rlprm.core.estimators.step_local", "rlprm.sources.exact.exact_steps"}:
            return True
    return False


def plans(config: TrainConfig) -> list[StreamPlan]:
    """The streams' pieces, in the order of the configuration."""
    from rlprm.parts import made

    return [
        StreamPlan(
            name=name,
            merge=made(stream.merge),
            normalizer=made(stream.normalizer),
            estimator=made(stream.estimator),
            weight=stream.weight,
            gate=made(stream.gate),
        )
        for name, stream in config.streams.items()
    ]


def policy(config: TrainConfig) -> Any:
    """The policy (and critic) of one rank."""
    from rlprm.engine.distributed import GroupReduce
    from rlprm.engine.learner import Learner
    from rlprm.engine.model import load_causal
    from rlprm.engine.policy import Objective, Policy
    from rlprm.parts import made

    model = load_causal(
        config.model.path,
        config.model.dtype,
        attention=config.model.attention,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    loss, mismatch = config.policy_loss, config.mismatch
    return Policy(
        Learner(model, learner_settings(config, config.policy, updates(config, config.policy))),
        None if config.critic is None else critic(config, config.critic),
        plans=plans(config),
        whiten=config.whiten,
        objective=Objective(
            surrogate=made(loss.surrogate),
            aggregation=loss.aggregation,
            horizon=loss.horizon,
            kl_weight=loss.kl_weight,
            kl_kind=loss.kl_kind,
            entropy_weight=loss.entropy_weight,
            mismatch_mode=mismatch.mode,
            mismatch_cap=mismatch.cap,
            mismatch_low=mismatch.low,
        ),
        passes=passes(config.policy, config.seed),
        temperature=config.temperature,
        reduce=GroupReduce(),
        tokenizer=load_tokenizer(config.model.path),
        readable_groups=config.tracker.rollout_groups,
    )


def critic(config: TrainConfig, section: CriticSection) -> Any:
    """The learned value function of one rank."""
    from rlprm.engine.learner import Learner
    from rlprm.engine.model import load_value
    from rlprm.engine.policy import Critic

    model = load_value(
        section.model,
        config.model.dtype,
        attention=config.model.attention,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    return Critic(
        learner=Learner(model, learner_settings(config, section.learner, updates(config, section.learner))),
        plan=CriticPlan(gamma=section.gamma, lam=section.lam),
        clip=section.clip,
        passes=passes(section.learner, config.seed),
    )


def reference(config: TrainConfig) -> Any:
    """The frozen initial model on one rank."""
    from rlprm.engine.model import load_causal
    from rlprm.engine.reference import Reference
    from rlprm.engine.scoring import Frozen

    model = load_causal(
        config.model.path, config.model.dtype, attention=config.model.attention, gradient_checkpointing=False
    )
    frozen = Frozen(
        model, token_budget=config.policy.token_budget, layout=config.policy.layout, device=config.placement.device
    )
    return Reference(frozen, temperature=config.temperature)


def source(config: TrainConfig, name: str) -> Any:
    """One process source on one rank."""
    from rlprm.engine.distributed import GroupReduce
    from rlprm.engine.learner import Learner
    from rlprm.engine.model import load_causal
    from rlprm.parts import made

    section = config.streams[name].source
    assert section is not None
    if section.model is None or section.learner is None:
        return made(section.kind)(name)
    model = load_causal(
        section.model,
        config.model.dtype,
        attention=config.model.attention,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    learner = Learner(model, learner_settings(config, section.learner, updates(config, section.learner)))
    return made(section.kind)(
        learner,
        name,
        passes(section.learner, config.seed),
        config.temperature,
        GroupReduce(),
        load_tokenizer(section.model),
    )


def supervised(config: SftConfig, rank: int) -> Any:
    """Supervised fine-tuning on one rank."""
    from rlprm.engine.distributed import GroupReduce
    from rlprm.engine.learner import Learner
    from rlprm.engine.model import load_causal
    from rlprm.engine.sft import Supervised
    from rlprm.parts import made

    tokenizer = load_tokenizer(config.model.path)
    model = load_causal(
        config.model.path,
        config.model.dtype,
        attention=config.model.attention,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    settings = learner_settings(config, config.learner, total_steps=config.steps)
    return Supervised(
        Learner(model, settings),
        tokenized(made(config.examples), made(config.template)(tokenizer), tokenizer),
        batch_size=config.batch_size,
        seed=config.seed,
        token_budget=config.learner.token_budget,
        layout=config.learner.layout,
        rank=rank,
        world_size=config.placement.policy_ranks,
        reduce=GroupReduce(),
        tokenizer_path=config.model.path,
    )


def tokenized(examples: Any, render: Any, tokenizer: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt tokens exactly as training will render them, response tokens with one EOS.

    Raises:
        ConfigError: no examples, or a tokenizer without EOS, from which no model would learn to stop.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token, so the model would never learn to stop; set eos_token")
    pairs = [
        (render(question)[1], (*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id))
        for question, response in examples
    ]
    if not pairs:
        raise ConfigError("there are no examples to learn from; check the `examples` section")
    return pairs


def updates(config: TrainConfig, section: LearnerSection) -> int:
    """Optimizer steps of the whole run."""
    return config.steps * section.epochs * section.mini_batches


def passes(section: LearnerSection, seed: int) -> Any:
    """How often and in how many parts a batch is learnt from."""
    from rlprm.engine.policy import Passes

    return Passes(
        epochs=section.epochs,
        mini_batches=section.mini_batches,
        token_budget=section.token_budget,
        layout=section.layout,
        seed=seed,
    )


def learner_settings(config: TrainConfig | SftConfig, section: OptimizerSection, total_steps: int) -> Any:
    """DeepSpeed and AdamW settings of one learner; decaying schedules end with the run."""
    from rlprm.engine.learner import LearnerSettings

    first, second = section.betas
    return LearnerSettings(
        lr=section.lr,
        betas=(first, second),
        eps=section.eps,
        weight_decay=section.weight_decay,
        schedule=section.schedule,
        warmup=section.warmup,
        total_steps=total_steps,
        max_grad_norm=section.max_grad_norm,
        zero_stage=section.zero_stage,
        offload=section.offload,
        token_budget=section.token_budget,
        layout=section.layout,
        dtype=config.model.dtype,
        device=config.placement.device,
    )
