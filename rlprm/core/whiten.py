"""Whitening of the summed advantages that keeps the parts a decomposition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.groups import known
from rlprm.errors import ConfigError
from rlprm.roles import Reduce

Whiten = Literal["none", "scale", "full"]
EPS = 1e-8  # inside the square root, as in PRIME and verl


def whiten(
    parts: Mapping[str, Float[Tensor, "B T"]], mask: Bool[Tensor, "B T"], reduce: Reduce, mode: Whiten
) -> dict[str, Float[Tensor, "B T"]]:
    """``part_k <- (part_k - mean(part_k)) / sqrt(var(total) + 1e-8)`` over all masked tokens of the whole batch.

    ``scale`` leaves the mean where it is: a shift moves zero and rewards wrong answers, so it is the mode to take after
    sign or posterior gates. Bessel variance; results are 0 off the mask. The parts sum to the whitened total in every
    mode. PRIME whitens the total only (identical for it), per rank in some releases; here the batch is global.

    >>> from rlprm.core.reduce import Identity
    >>> whiten({"a": torch.tensor([[1.0, 3.0]])}, torch.tensor([[True, True]]), Identity(), "full")["a"].tolist()
    [[-0.7071067690849304, 0.7071067690849304]]

    Raises:
        ConfigError: an unknown mode.
    """
    if mode not in ("none", "scale", "full"):
        raise ConfigError(f"whiten is {mode!r}; expected none, scale or full")
    masked = {name: known(part, mask) for name, part in parts.items()}
    if mode == "none" or not masked:
        return {name: values.to(parts[name].dtype) for name, values in masked.items()}
    count, *sums = reduce.sum(torch.stack([mask.sum().double(), *(values.sum() for values in masked.values())]))
    means = [one / count.clamp_min(1) for one in sums]
    deviation = known(sum(masked.values()) - sum(means), mask)
    variance = reduce.sum((deviation**2).sum()) / (count - 1).clamp_min(1)
    divisor = (variance + EPS).sqrt()
    shifts = means if mode == "full" else [torch.zeros_like(mean) for mean in means]
    return {
        name: (known(values - shift, mask) / divisor).to(parts[name].dtype)
        for (name, values), shift in zip(masked.items(), shifts, strict=True)
    }
