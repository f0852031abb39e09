"""Policy losses without a flat branch: each token keeps a gradient, however far the policy has moved."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rlprm.core.policy_loss import Choices, check_band
from rlprm.errors import ConfigError


def reinforce(given: Choices) -> tuple[Float[Tensor, "b t"], dict[str, Float[Tensor, "b t"]]]:
    """``-A log pi``: the plain policy gradient (Williams, 1992), no ratio and no clip.

    Only the first update of a batch is on-policy; what holds later ones back must come from elsewhere (a trust region,
    one update per batch).

    >>> from rlprm.core.policy_loss import one_choice
    >>> reinforce(one_choice())[0].item()  # log-prob -1, advantage 1
    1.0
    """
    own = given.masked()
    return -own.advantages * own.logprobs, own.indicators()


def cispo(
    given: Choices, *, clip_low: float, clip_high: float
) -> tuple[Float[Tensor, "b t"], dict[str, Float[Tensor, "b t"]]]:
    """``-sg(clip(rho, 1 - clip_low, 1 + clip_high)) A log pi``: the importance weight is clipped, not the gradient.

    Source: MiniMax-M1, arXiv:2506.13585. Conventions differ: here (and in verl) the bounds are distances from 1; TRL's
    ``epsilon_high`` is the upper bound itself, without a lower one. ScaleRL's 5.0 there is ``clip_high`` 4.0 with
    ``clip_low`` 1.0 here.

    Told besides ``ratio`` and ``ppo_kl``: ``pg_clipfrac`` (the weight was clipped; its token still learns).

    >>> from dataclasses import replace
    >>> from rlprm.core.policy_loss import one_choice
    >>> moved = replace(one_choice(), old_logprobs=torch.tensor([[-3.0]]))  # to log-prob -1: the ratio is e^2
    >>> cispo(moved, clip_low=1.0, clip_high=4.0)[0].item()  # clipped at 5: -5 * 1 * -1
    5.0

    Raises:
        ConfigError: clip bounds that leave no band around 1.
    """
    check_band(clip_low, clip_high)
    own = given.masked()
    ratio = own.log_ratio.detach().exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -weight * own.advantages * own.logprobs, own.indicators(pg_clipfrac=weight != ratio)


def sapo(
    given: Choices, *, tau_positive: float, tau_negative: float
) -> tuple[Float[Tensor, "b t"], dict[str, Float[Tensor, "b t"]]]:
    """``-A (4 / tau) sigma(tau (rho - 1))``, tau by the sign of A: a soft gate in place of a clip.

    Source: SAPO, arXiv:2511.20347. The gradient is that of ``-rho A`` times ``4 sigma (1 - sigma)``: 1 at rho = 1, and
    smaller the farther away. A larger tau for negative advantages damps them sooner.

    Told besides ``ratio`` and ``ppo_kl``: ``pg_damping`` (``1 - 4 sigma (1 - sigma)``, the share that the gate took).

    >>> from rlprm.core.policy_loss import one_choice
    >>> loss, told = sapo(one_choice(), tau_positive=1.0, tau_negative=1.05)
    >>> loss.item(), told["pg_damping"].item()
    (-2.0, 0.0)

    Raises:
        ConfigError: a tau that is not above 0.
    """
    if not (tau_positive > 0 and tau_negative > 0):
        raise ConfigError(f"tau_positive and tau_negative are {tau_positive}, {tau_negative}; expected both above 0")
    own = given.masked()
    tau = torch.where(own.advantages > 0, tau_positive, tau_negative).to(own.logprobs.dtype)
    opening = torch.sigmoid(tau * (own.log_ratio.exp() - 1))
    return -own.advantages * opening * 4 / tau, own.indicators(pg_damping=1 - 4 * opening * (1 - opening))
