"""Mean and spread of a stream's rewards over the batches so far, for normalizers with running statistics.

The record is immutable and the same on every rank. A run keeps one per stream whose normalizer :func:`uses_running`,
replaces it by :func:`updated` once per batch, hands the *new* one to the normalizer (``moments=``) and saves it with
the checkpoint. A normalizer that is given none takes the statistics of its own batch, as a first batch does anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.groups import known
from rlprm.core.normalize_entries import entries
from rlprm.errors import CheckpointError
from rlprm.records import Shard
from rlprm.roles import Reduce


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Weighted mean and squared deviation of all entries so far; what came earlier fades by ``decay`` per batch.

    Batches are merged by Chan's formula, so that nothing is lost when the mean is large beside the spread. With decay 1
    the result is that of all entries together.

    >>> seen = Moments.start(1.0).merged(2.0, 1.0, 0.0).merged(1.0, 4.0, 0.0)  # 1 and 1, then 4
    >>> seen.weight, seen.mean, round(seen.std, 6)
    (3.0, 2.0, 1.732051)
    """

    weight: float  # entries behind it, faded
    mean: float
    m2: float  # faded sum of squared deviations from the mean
    decay: float  # in (0, 1]

    @classmethod
    def start(cls, decay: float) -> Moments:
        """Nothing seen yet."""
        return cls(weight=0.0, mean=0.0, m2=0.0, decay=decay)

    def merged(self, number: float, mean: float, m2: float) -> Moments:
        """The moments after a batch of ``number`` entries; held when it had none, for then nothing was seen."""
        if number == 0:
            return self
        old = self.decay * self.weight
        weight = old + number
        apart = mean - self.mean
        return replace(
            self,
            weight=weight,
            mean=self.mean + apart * number / weight,
            m2=self.decay * self.m2 + m2 + apart**2 * old * number / weight,
        )

    @property
    def std(self) -> float:
        """``sqrt(m2 / (weight - 1))``, as Bessel's; 0 before there are two entries."""
        return math.sqrt(self.m2 / max(self.weight - 1, 1.0))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, float]) -> Moments:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: other keys than were saved.
        """
        if set(saved) != {"weight", "mean", "m2", "decay"}:
            raise CheckpointError(f"saved moments have the keys {sorted(saved)}; expected weight, mean, m2, decay")
        return cls(**{key: float(value) for key, value in saved.items()})


def uses_running(normalizer: Callable[..., Any]) -> bool:
    """Does the normalizer want ``moments``?

    >>> from rlprm.core.normalize import RAW
    >>> uses_running(RAW), uses_running(partial(RAW, centre="running", decay=1.0))
    (False, True)
    """
    settings = normalizer.keywords if isinstance(normalizer, partial) else {}
    return settings.get("centre") == "running" or settings.get("scale") == "running_std"


def updated(
    moments: Moments | None,
    rewards: Float[Tensor, "B T"],
    present: Bool[Tensor, "B T"],
    shard: Shard,
    reduce: Reduce,
    normalizer: Callable[..., Any],
) -> Moments:
    """The moments after this batch, global over shards (collective); None: this is the first.

    They are those of the normalizer's own entries: of its unit and subset, clipped and accumulated as it says. A decay
    that was changed between two runs holds from now on.
    """
    settings = normalizer.keywords  # type: ignore[attr-defined]
    axes = {axis: settings[axis] for axis in ("unit", "subset", "clip_first", "accumulate")}
    return measured(moments, *entries(rewards, present, shard, **axes), reduce, settings["decay"])


def measured(
    moments: Moments | None,
    values: Float[Tensor, "B T"],
    counts: Bool[Tensor, "B T"],
    reduce: Reduce,
    decay: float,
) -> Moments:
    """``moments`` and these entries of all shards, merged."""
    total, number = reduce.sum(torch.stack([known(values, counts).sum(), counts.sum().double()]))
    mean = total / number.clamp_min(1)
    square = reduce.sum((known(values - mean, counts) ** 2).sum())
    before = Moments.start(decay) if moments is None else replace(moments, decay=decay)
    return before.merged(float(number), float(mean), float(square))
