"""From deviations of a flow network to token rewards: the few most unusual tokens of a response are punished (RLFR).

A flow network ``v`` is trained on hidden states ``z`` of right responses (arXiv:2510.10201). A token whose hidden state
it predicts badly is unlike them: with noise e and ``x = tau z + (1 - tau) e`` the deviation is
``mean over dimensions of (v(x, tau, condition) - (z - e))^2``.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.errors import ConfigError


def debiased(deviations: Float[Tensor, "k n"], taus: Float[Tensor, " k"]) -> Float[Tensor, " n"]:
    """``mean over k of deviations[k] * tau_k / (1 - tau_k)``, in float64.

    The weight undoes that a deviation shrinks with the noise that is left. With one ``tau`` it cancels in
    :func:`flow_rewards`; it matters where several are averaged.

    >>> debiased(torch.tensor([[1.0], [4.0]]), torch.tensor([0.5, 0.75])).tolist()
    [6.5]

    Raises:
        ConfigError: a ``tau`` outside (0, 1).
    """
    wide = taus.double()
    if not bool(((wide > 0) & (wide < 1)).all()):
        raise ConfigError(f"taus are {taus.tolist()}; expected values between 0 and 1, both excluded")
    weight = (wide / (1 - wide))[:, None]
    return (deviations.double() * weight).mean(0)


def flow_rewards(
    deviation: Float[Tensor, "B T"],
    response_mask: Bool[Tensor, "B T"],
    *,
    threshold: float,
    keep: int,
    price: float,
) -> Float[Tensor, "B T"]:
    """``-price * s``, with s the deviation min-max normalized over the response, 0 below ``threshold`` and outside the
    ``keep`` largest of the response (RLFR, arXiv:2510.10201; the earlier of equal tokens counts as larger).

    The minimum is the true one over response tokens, and a response whose deviations are all equal gets 0 everywhere.
    The authors' code takes the second smallest distinct value of the padded row, because masked zeros are in it:
    infinite on a constant row, and wrong where the row has no masked entry.

    >>> flow_rewards(torch.tensor([[1.0, 2.0, 4.0, 5.0]]), torch.tensor([[True] * 4]),
    ...              threshold=0.6, keep=1, price=1.0).tolist()
    [[0.0, 0.0, 0.0, -1.0]]

    Raises:
        ConfigError: ``keep`` is below 1, or ``threshold`` outside [0, 1].
    """
    if keep < 1 or not 0.0 <= threshold <= 1.0:
        raise ConfigError(f"keep is {keep} and threshold {threshold}; expected at least 1, and a number from 0 to 1")
    if deviation.shape[1] == 0:
        return torch.zeros_like(deviation)
    wide = deviation.double()
    infinite = torch.full_like(wide, torch.inf)
    zero = torch.zeros_like(wide)
    lowest = torch.where(response_mask, wide, infinite).amin(1, keepdim=True)
    spread = torch.where(response_mask, wide, -infinite).amax(1, keepdim=True) - lowest
    usable = response_mask & (spread > 0)
    scaled = torch.where(usable, (wide - lowest) / torch.where(spread > 0, spread, torch.ones_like(spread)), zero)
    place = torch.where(usable, scaled, -infinite).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = usable & (scaled >= threshold) & (place < keep)
    return torch.where(chosen, -price * scaled, zero).to(deviation.dtype)
