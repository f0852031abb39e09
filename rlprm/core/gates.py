"""Advantage gates, and the trust that a process source has earned.

A gate is a function ``(part, around, **settings) -> part``, applied to a stream's weighted advantages. It may switch
credit off or scale it down, never turn it around.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.groups import known
from rlprm.core.steps import spread_over_step, step_sums
from rlprm.errors import CheckpointError, ConfigError
from rlprm.records import Shard, Stream

Z = 1.6448536269514722  # 95 % one-sided
OUTCOME = "outcome"


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What a gate may look at besides the part that it gates."""

    name: str  # of the gated stream
    shard: Shard
    parts: Mapping[str, Float[Tensor, "B T"]]  # every stream's weighted advantages, before any gate
    streams: Mapping[str, Stream]  # rewards as the sources gave them, before any merge
    trust: float | None  # of the gated stream; None: nobody measures it


def open_gate(part: Float[Tensor, "B T"], around: Around) -> Float[Tensor, "B T"]:
    """The part as it is."""
    return part


def sign_consistent(part: Float[Tensor, "B T"], around: Around) -> Float[Tensor, "B T"]:
    """``part`` where its sign is that of the outcome part, else 0; an outcome part of 0 agrees with nothing.

    Raises:
        ConfigError: there is no stream named `outcome`.
    """
    if OUTCOME not in around.parts:
        raise ConfigError("the sign_consistent gate compares with the stream `outcome`, and there is none; add it")
    return torch.where(part * around.parts[OUTCOME].sign() > 0, part, torch.zeros_like(part))


def trust_gate(part: Float[Tensor, "B T"], around: Around) -> Float[Tensor, "B T"]:
    """``trust * part``, with trust in [0, 1] from :class:`TrustState`.

    Raises:
        ConfigError: no trust is measured for the stream (only process sources earn it).
    """
    if around.trust is None:
        raise ConfigError("the trust gate is set on a stream whose trust nobody measures; use it on a process source")
    return around.trust * part


def selective(part: Float[Tensor, "B T"], around: Around, *, by: str, threshold: float) -> Float[Tensor, "B T"]:
    """``part`` on the tokens of steps whose verdict agrees with its sign: right and A >= 0, or wrong and A < 0; else 0.

    A step is right where the rewards of stream ``by`` sum to more than ``threshold``. A step without a verdict agrees
    with nothing. Changes the mean of the part, so whitening after it may only scale (SPARK, arXiv:2512.03244: selective
    advantage; read in notes, not in the paper).

    Raises:
        ConfigError: no stream of that name.
    """
    right, judged = verdicts(around, by, threshold)
    return torch.where(judged & (right == (part >= 0)), part, torch.zeros_like(part))


def failure_agrees(part: Float[Tensor, "B T"], around: Around, *, by: str, threshold: float) -> Float[Tensor, "B T"]:
    """``part``, but 0 on the steps of a wrong response that were judged right: they are not to blame.

    With the merge `thought_penalty` on the process stream these are the four cases of TP-GRPO (arXiv:2507.23317; read
    in notes): right response ``r`` and ``r - r_c``, wrong response ``r`` and 0. Steps without a verdict keep the part.

    Raises:
        ConfigError: no stream of that name.
    """
    right, judged = verdicts(around, by, threshold)
    wrong_response = (around.shard.outcome_present & (around.shard.outcome < 1))[:, None]
    return torch.where(judged & right & wrong_response, torch.zeros_like(part), part)


def verdicts(around: Around, by: str, threshold: float) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """For each token: was its step judged right, and was it judged at all?"""
    if by not in around.streams:
        raise ConfigError(
            f"the gate of stream {around.name!r} reads the verdicts of {by!r}; there are "
            f"{', '.join(sorted(around.streams))}: name one of them"
        )
    stream, index = around.streams[by], around.shard.step_index
    rewards = spread_over_step(step_sums(known(stream.rewards, stream.present), stream.present, index), index)
    judged = spread_over_step(step_sums(stream.present.double(), stream.present, index), index) > 0
    return rewards > threshold, judged


def trust_from(pair_accuracy_mean: float, count: float) -> float:
    """``clip(2 LCB - 1, 0, 1)``: LCB is the 95 % lower Wilson bound of a pair accuracy measured on ``count`` groups.

    Chance (1/2) earns 0. Few data earn little: Wilson's bound stays below 1 even at an accuracy of 1.

    >>> trust_from(0.9, 0.0), round(trust_from(0.9, 100.0), 3), round(trust_from(1.0, 4.0), 3)
    (0.0, 0.679, 0.193)
    """
    if count <= 0:
        return 0.0
    middle = pair_accuracy_mean + Z**2 / (2 * count)
    spread = Z * math.sqrt(pair_accuracy_mean * (1 - pair_accuracy_mean) / count + Z**2 / (4 * count**2))
    bound = (middle - spread) / (1 + Z**2 / count)
    return min(1.0, max(0.0, 2 * bound - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustState:
    """Moving pair accuracy of a process source on fresh rollouts; old measurements fade by ``decay`` per update.

    Starts without weight, hence with trust 0. Goes into the checkpoint.

    >>> state = TrustState(decay=0.5, mean=0.5, weight=0.0).update(1.0, 30).update(0.0, 0)
    >>> state.weight, state.mean, state.value > 0.8
    (30.0, 1.0, True)
    """

    decay: float  # in [0, 1): 0 looks at the last measurement only
    mean: float  # moving pair accuracy
    weight: float  # mixed groups behind it, faded

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"trust decay is {self.decay}; expected a number in [0, 1)")

    @classmethod
    def start(cls, decay: float) -> TrustState:
        """Nothing measured yet."""
        return cls(decay=decay, mean=0.5, weight=0.0)

    def update(self, pair_accuracy: float, num_mixed_groups: int) -> TrustState:
        """The state after one more measurement; held when no group was mixed, for then nothing was measured."""
        if num_mixed_groups == 0:
            return self
        weight = self.decay * self.weight + num_mixed_groups
        mean = (self.decay * self.weight * self.mean + num_mixed_groups * pair_accuracy) / weight
        return replace(self, mean=mean, weight=weight)

    @property
    def value(self) -> float:
        """The factor of the trust gate, in [0, 1]."""
        return trust_from(self.mean, self.weight)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, float]) -> TrustState:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: other keys than were saved.
        """
        if set(saved) != {"decay", "mean", "weight"}:
            raise CheckpointError(f"saved trust has the keys {sorted(saved)}; expected decay, mean, weight")
        return cls(**{key: float(value) for key, value in saved.items()})
