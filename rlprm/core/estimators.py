"""Accumulation of normalized rewards into advantages; no centring and no scaling happens here.

Each estimator returns 0 off the response. Tokens inside a response that the policy did not sample (tool output) carry
the return through without discount, as if they were not there.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.groups import known
from rlprm.core.steps import spread_over_step, step_sums
from rlprm.errors import ConfigError
from rlprm.records import Shard


def none(rewards: Float[Tensor, "B T"], present: Bool[Tensor, "B T"], shard: Shard) -> Float[Tensor, "B T"]:
    """``A_t = r_t``: each token is paid for itself only; an outcome then reaches the last token alone."""
    return known(rewards, present & shard.response_mask).to(rewards.dtype)


def to_go(
    rewards: Float[Tensor, "B T"], present: Bool[Tensor, "B T"], shard: Shard, *, gamma: float
) -> Float[Tensor, "B T"]:
    """``A_t = sum_{s >= t} gamma^(s-t) r_s`` over response tokens.

    With gamma 1 an outcome at the last token reaches every token, and centred token rewards sum up with the length of
    the response (discounting is meant for process rewards only).

    Raises:
        ConfigError: gamma outside [0, 1].
    """
    _check("gamma", gamma)
    received = known(rewards, present & shard.response_mask)
    returns = received.flip(1).cumsum(1).flip(1) if gamma == 1 else _suffix(received, shard.response_mask, gamma)
    return torch.where(shard.response_mask, returns, torch.zeros_like(returns)).to(rewards.dtype)


def step_local(rewards: Float[Tensor, "B T"], present: Bool[Tensor, "B T"], shard: Shard) -> Float[Tensor, "B T"]:
    """``A_t = sum of the present rewards of t's own step``: nothing flows from one step to another."""
    sums = step_sums(rewards, present & shard.response_mask, shard.step_index)
    spread = spread_over_step(sums, shard.step_index)
    return torch.where(shard.response_mask, spread, torch.zeros_like(spread)).to(rewards.dtype)


def to_go_from_step(rewards: Float[Tensor, "B T"], present: Bool[Tensor, "B T"], shard: Shard) -> Float[Tensor, "B T"]:
    """``A_t = sum of the rewards from the first token of t's step on``: the return, read at step starts only.

    PRL (arXiv:2601.10201) reads its KL-to-go at the starts of segments, so all tokens of a segment share one number.
    Differs from :func:`step_local`, where nothing of later steps arrives.

    >>> from rlprm.core.probe import made_up
    >>> shard = made_up()  # steps [0, 0, 1, 1]
    >>> to_go_from_step(torch.tensor([[1.0, 2.0, 4.0, 8.0]] * 2), shard.response_mask, shard)[0].tolist()
    [15.0, 15.0, 12.0, 12.0]
    """
    sums = step_sums(rewards, present & shard.response_mask, shard.step_index)
    spread = spread_over_step(sums.flip(1).cumsum(1).flip(1), shard.step_index)
    return torch.where(shard.response_mask, spread, torch.zeros_like(spread)).to(rewards.dtype)


def as_value(rewards: Float[Tensor, "B T"], present: Bool[Tensor, "B T"], shard: Shard) -> Float[Tensor, "B T"]:
    """``A_t = -sum_{s < t} r_s``: what the stream has said *before* t, as the value of the state in which t was chosen.

    Beside an outcome part it gives outcome minus value, PRIME's variant of the PRM as a Q function (arXiv:2502.01456).
    The paper writes the value of a state; whether t's own reward belongs to it is not said. Here it does not: a value
    must not know the action that it is the baseline of.

    >>> from rlprm.core.probe import made_up
    >>> shard = made_up()
    >>> as_value(torch.tensor([[1.0, 2.0, 4.0, 8.0]] * 2), shard.response_mask, shard)[0].tolist()
    [0.0, -1.0, -3.0, -7.0]
    """
    received = known(rewards, present & shard.response_mask)
    before = received - received.cumsum(1)
    return torch.where(shard.response_mask, before, torch.zeros_like(before)).to(rewards.dtype)


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """``A_t = delta_t + gamma lam A_{t+1}``, ``delta_t = r_t + gamma V_{t+1} - V_t``; returns (A, A + V).

    ``values[b, t]`` is the value of the state in which ``tokens[b, t]`` was chosen; 0 follows the last response token.
    Off the mask ``V_{t+1}`` and ``A_{t+1}`` pass through unchanged, otherwise tool output leaks into the TD errors
    (Schulman et al., arXiv:1506.02438). Linear in (rewards, values), which is what makes a critic's baseline a part.

    >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    >>> gae(rewards, values, torch.tensor([[True, True, True]]), 1.0, 0.95)[0].round(decimals=5).tolist()[0][2]
    0.30000001192092896

    Raises:
        ConfigError: gamma or lam outside [0, 1].
    """
    _check("gamma", gamma)
    _check("lam", lam)
    reward, value = known(rewards, mask), known(values, mask)
    following = torch.zeros(len(rewards), dtype=torch.float64, device=rewards.device)
    deltas = []
    for t in reversed(range(rewards.shape[1])):
        deltas.append(reward[:, t] + gamma * following - value[:, t])
        following = torch.where(mask[:, t], value[:, t], following)
    stacked = torch.stack(deltas[::-1], dim=1) if deltas else reward
    advantages = _suffix(torch.where(mask, stacked, torch.zeros_like(stacked)), mask, gamma * lam)
    advantages = torch.where(mask, advantages, torch.zeros_like(advantages))
    return advantages.to(rewards.dtype), (advantages + value).to(rewards.dtype)


def _suffix(values: Tensor, mask: Tensor, discount: float) -> Tensor:
    """``G_t = v_t + discount G_{t+1}`` on the mask, ``G_t = G_{t+1}`` off it."""
    carry = torch.zeros(len(values), dtype=torch.float64, device=values.device)
    columns = []
    for t in reversed(range(values.shape[1])):
        carry = torch.where(mask[:, t], values[:, t] + discount * carry, carry)
        columns.append(carry)
    return torch.stack(columns[::-1], dim=1) if columns else values


def _check(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}; expected a number in [0, 1]")
