"""One noun per stage, as frozen tensor records.

Axes, used in every annotation: ``P`` prompts, ``G`` responses per prompt, ``B = P*G`` sequences, ``T`` padded length,
``N`` flat tokens, ``S`` steps, ``V`` vocabulary. Every entry ``[b, t]`` describes ``tokens[b, t]`` itself; masks are
True where an entry counts. Storage and transport are jagged (:class:`JaggedShard`), the maths of one shard is padded
(:class:`Shard`); :mod:`rlprm.batch` is the only place that turns one into the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

R = TypeVar("R", bound="Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Frozen dataclass of tensors that share axis 0."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def select(self: R, rows: Tensor) -> R:
        """The record restricted to ``rows`` (index or boolean mask over axis 0)."""
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard(Record):
    """Whole groups of sequences, right-padded to the longest one; what the maths of one rank sees."""

    tokens: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]  # True on prompt and response
    response_mask: Bool[Tensor, "B T"]  # True on tokens the policy sampled
    rollout_logprobs: Float[Tensor, "B T"]  # log mu, nats; 0 off the response
    step_index: Int[Tensor, "B T"]  # reasoning step of each response token from 0; -1 off the response
    step_label: Int[Tensor, "B T"]  # exact label of the token's step: 1 right, 0 wrong, -1 unknown or off the response
    outcome: Float[Tensor, " B"]  # verifier's reward in [0, 1]; 0 where absent
    outcome_present: Bool[Tensor, " B"]  # False: the verifier failed or timed out
    greedy_outcome: Float[Tensor, " B"]  # of the greedy response to the same prompt; 0 where absent
    greedy_present: Bool[Tensor, " B"]  # False: none was sampled, or it got no verdict
    group: Int[Tensor, " B"]  # equal value = same prompt
    version: Int[Tensor, " B"]  # optimizer steps the sampling policy had taken
    truncated: Bool[Tensor, " B"]  # the response was cut by the length limit
    fresh: Bool[Tensor, " B"]  # sampled in the first round: PRM quality is measured on these
    train: Bool[Tensor, " B"]  # accepted by `keep`: models learn from these
    row: Int[Tensor, " B"]  # position in the batch's row table


@dataclass(frozen=True, slots=True, kw_only=True)
class JaggedShard(Record):
    """A shard as it is stored and sent: no padding, one flat array per token field."""

    lengths: Int[Tensor, " B"]  # prompt + response tokens per sequence
    prompt_lengths: Int[Tensor, " B"]
    outcome: Float[Tensor, " B"]
    outcome_present: Bool[Tensor, " B"]
    greedy_outcome: Float[Tensor, " B"]
    greedy_present: Bool[Tensor, " B"]
    group: Int[Tensor, " B"]
    version: Int[Tensor, " B"]
    truncated: Bool[Tensor, " B"]
    fresh: Bool[Tensor, " B"]
    train: Bool[Tensor, " B"]
    row: Int[Tensor, " B"]
    tokens: Int[Tensor, " N"]
    rollout_logprobs: Float[Tensor, " N"]
    step_index: Int[Tensor, " N"]
    step_label: Int[Tensor, " N"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream(Record):
    """A named source's rewards. ``present`` is False where there is no reward; absent, unparsed and a true 0 differ."""

    rewards: Float[Tensor, "B T"]
    present: Bool[Tensor, "B T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """Per-token advantages and the part of each stream; ``total`` is the sum of the parts, always."""

    total: Float[Tensor, "B T"]
    parts: Mapping[str, Float[Tensor, "B T"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward pass sees: a padded block of sequences, or one row of packed ones.

    ``sequence`` says which of the ``num_sequences`` a token belongs to (-1 on padding); ``positions`` restart at 0
    with each sequence. Losses use ``token_fields`` (same shape as ``tokens``) and ``sequence_fields`` (one entry per
    sequence), so they do not know which layout they run in.
    """

    tokens: Int[Tensor, "b t"]
    positions: Int[Tensor, "b t"]
    sequence: Int[Tensor, "b t"]
    response_mask: Bool[Tensor, "b t"]
    packed: bool
    num_sequences: int
    token_fields: Mapping[str, Tensor]
    sequence_fields: Mapping[str, Tensor]


def cat(records: Sequence[R]) -> R:
    """Concatenate records of one type along axis 0 (padded records must share their length T)."""
    first = records[0]
    return type(first)(
        **{field.name: torch.cat([getattr(record, field.name) for record in records]) for field in fields(first)}
    )
