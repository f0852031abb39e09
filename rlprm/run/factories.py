"""What is built inside an actor's process: plain functions of plain values, so that they travel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlprm.actors.judge import Judge
from rlprm.config import Critic as CriticSection
from rlprm.config import LearnerSection, Model, OptimizerSection, ProcessSource, SftConfig, TrainConfig
from rlprm.config_dpo import DpoConfig
from rlprm.config_prm import PrmConfig
from rlprm.core.credit import CriticPlan, StreamPlan
from rlprm.core.kl import TrustRegion
from rlprm.core.preference import Pair
from rlprm.data.tokenizer import load_tokenizer
from rlprm.errors import ConfigError
from rlprm.parts import locate, made
from rlprm.records import JaggedShard
from rlprm.sources.base import OutputOf, SourceContext
from rlprm.sources.base import ProcessSource as Source


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


STEPWISE = frozenset(
    {
        "step",
        "step_index",
        "rlprm.core.estimators.step_local",
        "rlprm.core.estimators.to_go_from_step",
        "rlprm.core.softmin.pure_softmin",
        "rlprm.core.merge_outcome.renorm",
        "rlprm.core.merge_outcome.thought_penalty",
        "rlprm.core.merge_response.aggregate",
        "rlprm.core.merge_response.blend",
    }
)  # settings and pieces that mean something only where a response has steps


def sources(config: TrainConfig) -> dict[str, ProcessSource]:
    """The sections of the run's process sources by stream; further outputs of a source are not listed again."""
    return {
        name: stream.source
        for name, stream in config.streams.items()
        if stream.source is not None and kind(stream.source) is not OutputOf
    }


def outputs(config: TrainConfig) -> dict[str, tuple[str, str]]:
    """Streams that are a further output of another stream's source: name -> (that stream, output)."""
    return {
        name: (stream.source.kind["of"], stream.source.kind["output"])
        for name, stream in config.streams.items()
        if stream.source is not None and kind(stream.source) is OutputOf
    }


def kind(section: ProcessSource) -> type[Source]:
    """The class that a source's section names."""
    return locate(section.kind["_target_"])  # type: ignore[return-value]


def settings(section: ProcessSource) -> dict[str, Any]:
    """The source's own settings, as the YAML has them."""
    return {key: value for key, value in section.kind.items() if not key.startswith("_")}


def own_engine(section: ProcessSource) -> bool:
    """Is the source's model one that generates, on an engine of its own?"""
    return section.model is not None and kind(section).engine != "none"


def own_engines(config: TrainConfig) -> dict[str, tuple[str, int]]:
    """Engines of sources whose model generates: stream -> (model folder, most tokens)."""
    limits = {"prompt": config.data.max_prompt_tokens, "response": config.max_response_tokens}
    return {
        name: (section.model, kind(section).engine_tokens(**limits, **settings(section)))
        for name, section in sources(config).items()
        if section.model is not None and own_engine(section)
    }


def needs_reference(config: TrainConfig) -> bool:
    """Does anything in this run measure from the frozen initial model? (Every PRM does: surprisal is its baseline.)"""
    asked = any(kind(section).reads_reference for section in sources(config).values())
    return asked or "kl" in config.streams or config.policy_loss.kl_weight > 0


def on_prm_ranks(config: TrainConfig) -> bool:
    """Does anything of this run sit on PRM ranks: the reference, or a model that scores? Otherwise none is started."""
    models = [section for section in sources(config).values() if section.model is not None]
    return needs_reference(config) or any(
        not own_engine(section) and not kind(section).reads_policy for section in models
    )


def needs_steps(config: TrainConfig) -> bool:
    """Does a stream pay, compare or accumulate by reasoning step? Then a splitter that finds none is a mistake."""
    if any(kind(section).pays_steps for section in sources(config).values()):
        return True
    for stream in config.streams.values():
        pieces = [*stream.pieces.values(), *([stream.source.kind] if stream.source is not None else [])]
        named = {value for piece in pieces for value in piece.values() if isinstance(value, str)}
        if named & STEPWISE:
            return True
    return False


def needs_greedy(config: TrainConfig) -> bool:
    """Does a stream measure from a greedy response to the same prompt (ReMax)?"""
    normalizers = [stream.normalizer for stream in config.streams.values() if stream.normalizer is not None]
    return any(part["_target_"] == "rlprm.core.remax.minus_greedy" for part in normalizers)


def plans(config: TrainConfig) -> list[StreamPlan]:
    """The pieces of the streams that have credit of their own, in the order of the configuration."""
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
        if stream.weight is not None
    ]


def policy(config: TrainConfig) -> Any:
    """The policy (and critic) of one rank."""
    from rlprm.engine.distributed import GroupReduce
    from rlprm.engine.learner import Learner
    from rlprm.engine.policy import Objective, Policy

    model = trained(config.model, config.model.path)
    loss, mismatch, region = config.policy_loss, config.mismatch, config.policy_loss.trust_region
    return Policy(
        Learner(model, learner_settings(config, config.policy, updates(config, config.policy))),
        None if config.critic is None else critic(config, config.critic),
        plans=plans(config),
        built_in=tuple(name for name, stream in config.streams.items() if stream.source is None),
        whiten=config.whiten,
        objective=Objective(
            surrogate=made(loss.surrogate),
            aggregation=loss.aggregation,
            horizon=loss.horizon,
            kl_weight=loss.kl_weight,
            kl_kind=loss.kl_kind,
            entropy_weight=loss.entropy_weight,
            trust=None if region is None else TrustRegion(weight=region.weight, delta=region.delta),
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


def trained(section: Model, path: str) -> Any:
    """A causal model that learns, as the run's model section says, from the folder ``path``."""
    from rlprm.engine.model import load_causal

    return load_causal(
        path, section.dtype, attention=section.attention, gradient_checkpointing=section.gradient_checkpointing
    )


def turns(config: SftConfig | DpoConfig | PrmConfig, rank: int) -> Any:
    """How a rank goes over a fixed set of examples."""
    from rlprm.engine.distributed import GroupReduce
    from rlprm.engine.offline import Turns

    return Turns(
        batch_size=config.batch_size,
        seed=config.seed,
        token_budget=config.learner.token_budget,
        layout=config.learner.layout,
        rank=rank,
        world_size=config.placement.policy_ranks,
        reduce=GroupReduce(),
        tokenizer_path=config.model.path,
    )


def critic(config: TrainConfig, section: CriticSection) -> Any:
    """The learned value function of one rank."""
    from rlprm.engine.critic import Critic
    from rlprm.engine.learner import Learner
    from rlprm.engine.model import load_value

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


def source(config: TrainConfig, name: str, services: Mapping[str, Any], policy: Any) -> Source:
    """One process source on one rank. ``policy`` is the policy of the same rank, None where it is elsewhere."""
    from rlprm.engine.distributed import GroupReduce
    from rlprm.engine.learner import Learner

    section = config.streams[name].source
    assert section is not None
    learner = None
    if section.model is not None and section.learner is not None:
        model = trained(config.model, section.model)
        learner = Learner(model, learner_settings(config, section.learner, updates(config, section.learner)))
    own = load_tokenizer(config.model.path)
    context = SourceContext(
        name=name,
        model=section.model,
        learner=learner,
        passes=None if section.learner is None else passes(section.learner, config.seed),
        tokenizer=own if section.model is None else load_tokenizer(section.model),
        policy_tokenizer=own,
        temperature=config.temperature,
        reduce=GroupReduce(),
        device=config.placement.device,
        dtype=config.model.dtype,
        attention=config.model.attention,
        token_budget=(section.learner or config.policy).token_budget,
        layout=(section.learner or config.policy).layout,
        seed=config.seed,
        max_response_tokens=config.max_response_tokens,
        policy=policy,
        **services,
    )
    return made(section.kind)(context)


def supervised(config: SftConfig, rank: int) -> Any:
    """Supervised fine-tuning on one rank."""
    from rlprm.engine.learner import Learner
    from rlprm.engine.sft import Supervised

    tokenizer = load_tokenizer(config.model.path)
    model = trained(config.model, config.model.path)
    settings = learner_settings(config, config.learner, total_steps=config.steps)
    return Supervised(
        Learner(model, settings),
        tokenized(made(config.examples), made(config.template)(tokenizer), tokenizer),
        turns(config, rank),
    )


def preference(config: DpoConfig, shard: JaggedShard, pairs: Sequence[Pair], rank: int) -> Any:
    """Preference optimisation on one rank."""
    from rlprm.engine.learner import Learner
    from rlprm.engine.preference import Preference

    model = trained(config.model, config.model.path)
    return Preference(
        Learner(model, learner_settings(config, config.learner, total_steps=config.steps)),
        shard,
        pairs,
        turns(config, rank),
        beta=config.beta,
    )


def tokenized(examples: Any, render: Any, tokenizer: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt tokens exactly as training will render them, response tokens with one EOS; stored tokens stay as they are.

    Raises:
        ConfigError: no examples, or a tokenizer without EOS, from which no model would learn to stop.
    """
    if callable(examples):
        return [(each.prompt, each.response) for each in examples()]
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
    from rlprm.engine.batching import Passes

    return Passes(
        epochs=section.epochs,
        mini_batches=section.mini_batches,
        token_budget=section.token_budget,
        layout=section.layout,
        seed=seed,
    )


def learner_settings(
    config: TrainConfig | SftConfig | DpoConfig | PrmConfig, section: OptimizerSection, total_steps: int
) -> Any:
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
