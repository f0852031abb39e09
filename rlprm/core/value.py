"""The critic's loss, and how much of the returns it explains."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.groups import known
from rlprm.errors import ConfigError
from rlprm.roles import Reduce


def value_loss(
    values: Float[Tensor, "b t"],
    old_values: Float[Tensor, "b t"],
    value_targets: Float[Tensor, "b t"],
    response_mask: Bool[Tensor, "b t"],
    *,
    clip: float | None,
) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"]]:
    """``1/2 max((V - G)^2, (clip(V, V_old +- clip) - G)^2)`` per token, and where the clipped branch decides.

    0 off the mask. ``clip`` None: no clipping (PPO, arXiv:1707.06347).

    >>> on = torch.tensor([[True]])
    >>> value_loss(torch.tensor([[2.0]]), torch.tensor([[0.0]]), torch.tensor([[2.0]]), on, clip=0.5)[0].item()
    1.125

    Raises:
        ConfigError: a clip that is not positive.
    """
    if clip is not None and not clip > 0:
        raise ConfigError(f"value clip is {clip}; expected a number above 0, or null for none")
    zero = torch.zeros_like(values)
    new, old, target = (torch.where(response_mask, each, zero) for each in (values, old_values, value_targets))
    free = (new - target) ** 2
    if clip is None:
        return free / 2, zero
    clipped = (old + (new - old).clamp(-clip, clip) - target) ** 2
    return torch.maximum(free, clipped) / 2, (clipped > free).to(values.dtype)


def explained_variance(
    values: Float[Tensor, "B T"], value_targets: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], reduce: Reduce
) -> float | None:
    """``1 - var(G - V) / var(G)`` over the masked tokens of the whole batch; None where the targets do not vary.

    >>> from rlprm.core.reduce import Identity
    >>> target = torch.tensor([[0.0, 1.0]])
    >>> explained_variance(target, target, target >= 0, Identity())
    1.0
    """
    target = known(value_targets, mask)
    error = known(value_targets.double() - values.double(), mask)
    count, *sums = reduce.sum(torch.stack([mask.sum().double(), target.sum(), error.sum()]))
    target_mean, error_mean = (one / count.clamp_min(1) for one in sums)
    squares = [known(target - target_mean, mask) ** 2, known(error - error_mean, mask) ** 2]
    target_square, error_square = reduce.sum(torch.stack([square.sum() for square in squares]))
    return float(1 - error_square / target_square) if target_square > 0 else None
