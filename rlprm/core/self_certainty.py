"""How far a model's choices are from blind ones, from their entropies alone."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.errors import ConfigError


def self_certainty(
    entropy: Float[Tensor, "B T"], response_mask: Bool[Tensor, "B T"], vocabulary: int
) -> Float[Tensor, "B T"]:
    """``c_t = (1 / (N V)) * sum_v p_v log(p_v V) = (log V - H_t) / (N V)``: a response's entries sum to Shop-R1's s.

    N response tokens, V entries of the vocabulary, H the entropy in nats. ``sum_v p log(p V)`` is ``KL(p || uniform)``,
    from 0 (blind) to log V (certain); in the other direction, ``KL(uniform || p)``, of which "self-certainty" elsewhere
    is made, the entropy would not do. The formula divides by V on top (Shop-R1, arXiv:2507.17842, read in notes only),
    so s is at most ``log V / V``: 0.00008 for 150,000 entries. A weight has to make up for it.

    >>> on = torch.tensor([[True, True]])
    >>> found = self_certainty(torch.tensor([[0.0, math.log(4)]]), on, 4)  # a certain token and a blind one
    >>> round(found.sum().item(), 6)  # log(4) / (2 * 4) + 0
    0.173287

    Raises:
        ConfigError: a vocabulary of fewer than two entries.
    """
    if vocabulary < 2:
        raise ConfigError(f"the vocabulary has {vocabulary} entries; expected 2 or more")
    size = response_mask.sum(1, keepdim=True).clamp_min(1).double()
    certainty = (math.log(vocabulary) - entropy.double()) / (size * vocabulary)
    return torch.where(response_mask, certainty, torch.zeros_like(certainty))
