"""From prompts to optimizer steps: how a batch is divided, and what does not divide evenly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rlprm.batch import shards_needed
from rlprm.planning.activations import Micro


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """One learner's share of a step."""

    key: str  # of its section in the configuration
    ranks: int
    epochs: int
    mini_batches: int
    prompts: tuple[int, int]  # in a mini-batch, fewest and most
    sequences: int  # of a rank in a mini-batch, rounded up, where ranks are even
    micro: Micro
    micro_batches: int  # of a rank for an optimizer step, at the longest length
    steps_per_batch: int
    steps: int  # of the whole run


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step, and the run."""

    prompts: int
    responses: int
    longest: int
    shards: int
    groups: tuple[int, int]  # of a shard, fewest and most
    rollouts: int  # of the run, without rounds that are sampled again
    learners: tuple[Learning, ...]
    warnings: tuple[str, ...]


def arithmetic(config: Any) -> Batch:
    """The numbers of a validated training configuration."""
    placement, prompts, responses = config.placement, config.prompts_per_step, config.responses_per_prompt
    longest = config.data.max_prompt_tokens + config.max_response_tokens
    shards = shards_needed(placement.policy_ranks, placement.prm_ranks)
    warnings: list[str] = []
    if prompts % shards:
        warnings.append(
            f"{prompts} prompts over {shards} shards: some ranks get one prompt more than others and the rest wait; "
            f"prompts_per_step={_multiple(prompts, shards)} divides evenly"
        )
    found = []
    for key, section, ranks in learners(config):
        parts = section.mini_batches
        sizes = (prompts // parts, -(-prompts // parts))
        sequences = -(-sizes[1] * responses // ranks)
        # all sequences of a mini-batch may lie on one rank, but never more than its shards hold
        most = min(sizes[1], -(-prompts // ranks)) * responses
        lengths = (config.data.max_prompt_tokens, config.max_response_tokens)
        micro = Micro.largest(min(section.token_budget, most * longest), *lengths, section.layout)
        if sizes[0] != sizes[1]:
            warnings.append(
                f"{key}.mini_batches={parts} does not divide {prompts} prompts: mini-batches of {sizes[0]} and {sizes[1]}"
            )
        if sizes[0] < ranks:
            warnings.append(
                f"{key}: a mini-batch has {sizes[0]} prompts for {ranks} ranks, so some ranks have nothing to do in an "
                f"optimizer step; use {key}.mini_batches={max(1, prompts // ranks)} or fewer"
            )
        if section.token_budget < longest:
            warnings.append(
                f"{key}.token_budget={section.token_budget} is shorter than the longest sequence ({longest} tokens), which "
                "then goes alone and above the budget; memory is planned for that"
            )
        found.append(
            Learning(
                key=key,
                ranks=ranks,
                epochs=section.epochs,
                mini_batches=parts,
                prompts=sizes,
                sequences=sequences,
                micro=micro,
                micro_batches=math.ceil(sequences / micro.rows),
                steps_per_batch=section.epochs * parts,
                steps=config.steps * section.epochs * parts,
            )
        )
    if config.keep.min_prompts < prompts and config.keep.min_prompts % shards:
        warnings.append(
            f"a step may go on with {config.keep.min_prompts} prompts (keep.min_prompts), which {shards} shards do not share "
            "evenly"
        )
    return Batch(
        prompts=prompts,
        responses=responses,
        longest=longest,
        shards=shards,
        groups=(prompts // shards, -(-prompts // shards)),
        rollouts=config.steps * prompts * responses,
        learners=tuple(found),
        warnings=tuple(warnings),
    )


def learners(config: Any) -> list[tuple[str, Any, int]]:
    """Key, section and ranks of everything that learns."""
    found = [("policy", config.policy, config.placement.policy_ranks)]
    if config.critic is not None:
        found.append(("critic.learner", config.critic.learner, config.placement.policy_ranks))
    for name, stream in config.streams.items():
        if stream.source is not None and stream.source.learner is not None:
            found.append((f"streams.{name}.source.learner", stream.source.learner, config.placement.prm_ranks))
    return found


def _multiple(number: int, of: int) -> int:
    """The nearest multiple, not 0."""
    return max(of, round(number / of) * of)
