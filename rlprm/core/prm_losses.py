"""Losses of an implicit PRM: from the rewards of the responses of one optimizer step to the step's loss.

Each loss is a pure function ``(rewards, outcome, present, group, reduce, state, **settings) -> Share``. ``rewards[i]`` is
``r(y_i) = beta * sum_t (log pi_phi - log pi_ref)`` of a response on this rank (whole groups are on one rank), the only
thing that gradients flow into; responses that are not ``present`` are not read. Denominators, reference points and
class means are those of all ranks, so the shares of the ranks sum to one loss however the rows are dealt out.

Some losses compare the responses of a group, so none is computed per micro-batch: ``dL/dr_i`` is taken once, from the
rewards of all responses of the step (:func:`slopes`), and each micro-batch then only needs ``sum_i sg(dL/dr_i) r_i``,
whose gradient is the loss's, exactly, whatever the split.

Where a loss needs right and wrong responses, right is an outcome above 1/2; the cross-entropies and BCO take a fractional
outcome as a soft label all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from rlprm.core.groups import group_count, group_mean, group_sum, known
from rlprm.core.reduce import Identity
from rlprm.errors import ConfigError
from rlprm.roles import Reduce

State = Mapping[str, float]  # what a loss carries from one optimizer step to the next; empty for most
Weighting = Literal["none", "bon_outcome", "bon_reward"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One rank's share of a loss; ``terms`` and everything below it are the same on every rank."""

    loss: Float[Tensor, ""]  # nats (KTO: 1); the shares of all ranks sum to the loss
    terms: float  # what the loss is averaged over; 0: there is nothing to learn, skip the optimizer step
    pairs: float | None = None  # right and wrong response to one prompt, where the loss compares such
    shift: float | None = None  # what rewards are measured from, where that moves
    state: State


# (rewards, outcome, present, group, reduce, state) -> Share: a loss of this module, its settings given
PrmLoss = Callable[..., Share]


def slopes(
    loss: PrmLoss,
    rewards: Float[Tensor, " n"],
    outcome: Float[Tensor, " n"],
    present: Bool[Tensor, " n"],
    group: Int[Tensor, " n"],
    reduce: Reduce,
    state: State,
) -> tuple[Share, Float[Tensor, " n"]]:
    """The loss (detached) and ``dL/dr_i``, in float64; 0 for responses that are not present.

    >>> from rlprm.core.reduce import Identity
    >>> one = torch.ones(1)
    >>> slopes(ce, torch.zeros(1), one, one > 0, torch.tensor([0]), Identity(), {})[1].tolist()
    [-0.5]
    """
    leaf = rewards.detach().double().requires_grad_(True)
    with torch.enable_grad():
        share = loss(leaf, outcome, present, group, reduce, state)
        # a rank without a pair has a loss that is a constant 0
        (slope,) = torch.autograd.grad(share.loss + 0.0 * known(leaf, present).sum(), leaf)
    detached = Share(
        loss=share.loss.detach(), terms=share.terms, pairs=share.pairs, shift=share.shift, state=share.state
    )
    return detached, slope


# -- cross-entropies: every response for itself ----------------------------------------------------------------------


def ce(
    rewards: Float[Tensor, " n"],
    outcome: Float[Tensor, " n"],
    present: Bool[Tensor, " n"],
    group: Int[Tensor, " n"],
    reduce: Reduce,
    state: State,
) -> Share:
    """``-mean [l log sigma(r) + (1 - l) log(1 - sigma(r))]``, from logits (PRIME, arXiv:2502.01456; 2412.01981).

    PRIME's code applies the logarithm to ``sigma(r)``, which is infinite from ``|r| = 17`` on in float32.

    >>> from rlprm.core.reduce import Identity
    >>> sums, on = torch.tensor([2.0, 2.0, 8.0]), torch.tensor([True, True, True])
    >>> share = ce(0.05 * sums, torch.tensor([1.0, 0.0, 1.0]), on, torch.tensor([0, 0, 0]), Identity(), {})
    >>> round(share.loss.item(), 6)
    0.633936
    """
    return _weighted_ce(rewards, outcome, present, known(torch.ones_like(rewards), present), reduce)


def ce_instance_balanced(
    rewards: Float[Tensor, " n"],
    outcome: Float[Tensor, " n"],
    present: Bool[Tensor, " n"],
    group: Int[Tensor, " n"],
    reduce: Reduce,
    state: State,
) -> Share:
    """:func:`ce` where right and wrong responses to the same prompt weigh the same: ``n_g / (2 n_class)`` each.

    Prompts whose responses are all right or all wrong cannot be balanced; they are left out. The best of the
    cross-entropies in arXiv:2412.01981, which does not print the weights and whose code does not have them: this
    reading is inferred from the name.
    """
    right = present & (outcome > 0.5)
    wrong = present & ~(outcome > 0.5)
    rights, wrongs = (group_sum(torch.ones_like(rewards), each, group) for each in (right, wrong))
    size, mixed = group_count(present, group), (rights > 0) & (wrongs > 0)
    weights = size / (2 * torch.where(right, rights, wrongs).clamp_min(1))
    return _weighted_ce(rewards, outcome, present, known(weights, present & mixed), reduce)


def ce_dataset_balanced(
    rewards: Float[Tensor, " n"],
    outcome: Float[Tensor, " n"],
    present: Bool[Tensor, " n"],
    group: Int[Tensor, " n"],
    reduce: Reduce,
    state: State,
) -> Share:
    """:func:`ce` where the right and the wrong responses of the whole optimizer step weigh the same.

    Each counts ``n / (2 n_class)``; a step with one class only cannot be balanced and is skipped. Named in
    arXiv:2412.01981, which does not print the weights and whose code does not have them: inferred. There the set is
    the training data, here what one update sees.
    """
    right = present & (outcome > 0.5)
    wrong = present & ~(outcome > 0.5)
    rights, wrongs = (float(reduce.sum(each.sum().double())) for each in (right, wrong))
    if rights == 0 or wrongs == 0:
        return Share(loss=rewards.new_zeros(()), terms=0.0, state=state)
    total = rights + wrongs
    weights = torch.where(right, total / (2 * rights), total / (2 * wrongs)).double()
    return _weighted_ce(rewards, outcome, present, known(weights, present), reduce)


def bco(
    rewards: Float[Tensor, " n"],
    outcome: Float[Tensor, " n"],
    present: Bool[Tensor, " n"],
    group: Int[Tensor, " n"],
    reduce: Reduce,
    state: State,
    *,
    decay: float,
) -> Share:
    """:func:`ce` on ``r - delta``, ``delta = (E[r | right] + E[r | wrong]) / 2``, without gradient (BCO, 2404.04656).

    The shift keeps the sigmoid unsaturated when all log-ratios drift one way, as they do in an online PRM. Each class
    mean is an exponential average over optimizer steps, ``decay`` old and ``1 - decay`` new, this step included; a class
    starts at its first mean, and until both have been seen the shift is 0. The released code (TRL) takes one mean over
    both classes, which is not balanced, over all of history, which reacts ever more slowly. Without its optional
    density-ratio weights. BCO for an online PRM is not in the source.

    Raises:
        ConfigError: a decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ConfigError(
            f"BCO's decay is {decay}; expected a number in [0, 1), such as 0.95 (0: this step's means only)"
        )
    right = present & (outcome > 0.5)
    wrong = present & ~(outcome > 0.5)
    means = dict(state)
    for name, members in (("right", right), ("wrong", wrong)):
        total, count = _total(rewards, members, reduce)
        if count > 0:
            mean = total / count
            means[name] = decay * means[name] + (1 - decay) * mean if name in means else mean
    shift = (means["right"] + means["wrong"]) / 2 if len(means) == 2 else 0.0
    share = _weighted_ce(rewards - shift, outcome, present, known(torch.ones_like(rewards), present), reduce)
    return Share(loss=share.loss, terms=share.terms, shift=shift, state=means)


def kto_unpaired(
    rewards: Float[Tensor, " n"],
    outcome: Float[Tensor, " n"],
    present: Bool[Tensor, " n"],
    group: Int[Tensor, " n"],
    reduce: Reduce,
    state: State,
    *,
    desirable: float,
    undesirable: float,
) -> Share:
    """``mean lambda_D (1 - sigma(r - z))`` over right, ``lambda_U (1 - sigma(z - r))`` over wrong responses (KTO).

    ``z = max(0, mean r)`` over the step, without gradient (arXiv:2402.01306 by way of 2412.01981). The mean runs over the
    responses themselves; the released code pairs prompts with other prompts' responses for it, an extra forward pass.

    Raises:
        ConfigError: a weight that is not positive.
    """
    if not (desirable > 0 and undesirable > 0):
        raise ConfigError(
            f"KTO's weights are desirable {desirable} and undesirable {undesirable}; expected both above 0"
        )
    total, count = _total(rewards, present, reduce)
    if count == 0:
        return Share(loss=rewards.new_zeros(()), terms=0.0, state=state)
    reference = max(0.0, total / count)
    right = outcome > 0.5
    values = known(rewards, present) - reference
    regret = torch.where(right, desirable * torch.sigmoid(-values), undesirable * torch.sigmoid(values))
    return Share(loss=known(regret, present).sum() / count, terms=count, shift=reference, state=state)


# -- pairs: a right and a wrong response to the same prompt ----------------------------------------------------------


def dpo(
    rewards: Float[Tensor, " n"],
    outcome: Float[Tensor, " n"],
    present: Bool[Tensor, " n"],
    group: Int[Tensor, " n"],
    reduce: Reduce,
    state: State,
) -> Share:
    """``-mean log sigma(r+ - r-)`` over all pairs of a right and a wrong response to one prompt (2412.01981, 2509.19199).

    All pairs of all prompts weigh the same. The source trains on given pairs; taking all of a group's is iStar's.

    >>> from rlprm.core.reduce import Identity
    >>> on, one_group = torch.tensor([True] * 3), torch.tensor([4, 4, 4])
    >>> share = dpo(torch.tensor([0.1, 0.1, 0.4]), torch.tensor([1.0, 0.0, 1.0]), on, one_group, Identity(), {})
    >>> round(share.loss.item(), 6), share.pairs  # -(log sigma(0) + log sigma(0.3)) / 2
    (0.623751, 2.0)
    """
    better, worse, count = _pairs(rewards, outcome, present, group, reduce)
    return _mean_of_pairs(-logsigmoid(better - worse), count, state)


def nca(
    rewards: Float[Tensor, " n"],
    outcome: Float[Tensor, " n"],
    present: Bool[Tensor, " n"],
    group: Int[Tensor, " n"],
    reduce: Reduce,
    state: State,
) -> Share:
    """``-mean [log sigma(r+) + (log sigma(-r+) + log sigma(-r-)) / 2]`` over pairs (NCA, arXiv:2402.05369).

    Holds the rewards themselves near 0, where DPO only looks at their difference. The pairwise form from the method's
    own paper; ImplicitPRM reports it (arXiv:2412.01981) without code.
    """
    better, worse, count = _pairs(rewards, outcome, present, group, reduce)
    return _mean_of_pairs(-logsigmoid(better) - 0.5 * (logsigmoid(-better) + logsigmoid(-worse)), count, state)


def kto_paired(
    rewards: Float[Tensor, " n"],
    outcome: Float[Tensor, " n"],
    present: Bool[Tensor, " n"],
    group: Int[Tensor, " n"],
    reduce: Reduce,
    state: State,
) -> Share:
    """``mean [(1 - sigma(r+ - z-)) + (1 - sigma(z+ - r-))] / 2`` over pairs, ``z = max(0, mean r)`` of each side.

    The variant for pairs of arXiv:2412.01981. The means run over the pairs of the step and carry no gradient; the
    released code takes each rank's own mean and lets the gradient through it.
    """
    better, worse, count = _pairs(rewards, outcome, present, group, reduce)
    sums = reduce.sum(torch.stack([better.detach().sum(), worse.detach().sum()]))
    above, below = (max(0.0, float(total) / max(count, 1.0)) for total in sums)
    return _mean_of_pairs((torch.sigmoid(below - better) + torch.sigmoid(worse - above)) / 2, count, state)


def dpo_detached(
    rewards: Float[Tensor, " n"],
    outcome: Float[Tensor, " n"],
    present: Bool[Tensor, " n"],
    group: Int[Tensor, " n"],
    reduce: Reduce,
    state: State,
    *,
    weighting: Weighting,
) -> Share:
    """``-mean w_i log sigma(s_i (r_i - sg(b_i)))``, ``b_i`` the mean reward of the siblings with the other verdict.

    ``s_i`` is +1 for a right and -1 for a wrong response; without such a sibling ``b_i`` is 0 and the term is that of
    the cross-entropy. ``weighting`` none: ``w = 1``; bon_outcome and bon_reward: ``K P^(K-1)`` with ``P`` the share of the
    group (itself included) whose outcome or reward is at most its own, as if the best of K had been drawn.

    The ``dpo``, ``bon_acc`` and ``bon_rm`` losses of verl's PRIME recipe (no paper). There a right response is one with any
    outcome above 0, ``b`` comes from before the first of several updates, and the weighted losses are summed over a
    micro-batch, so that they depend on its size; here they are averaged over the step.
    """
    values, fixed = known(rewards, present), known(rewards.detach(), present)
    right = present & (outcome > 0.5)
    wrong = present & ~(outcome > 0.5)
    baseline = torch.where(right, group_mean(fixed, wrong, group), group_mean(fixed, right, group))
    sign = torch.where(right, 1.0, -1.0).double()
    losses = -logsigmoid(sign * (values - baseline)) * _best_of_weights(fixed, outcome, present, group, weighting)
    wrongs_there = group_sum(torch.ones_like(fixed), wrong, group)
    count, pairs = reduce.sum(torch.stack([present.sum().double(), known(wrongs_there, right).sum()])).tolist()
    return Share(loss=known(losses, present).sum() / max(count, 1.0), terms=count, pairs=pairs, state=state)


def _best_of_weights(values: Tensor, outcome: Tensor, present: Tensor, group: Tensor, weighting: Weighting) -> Tensor:
    if weighting == "none":
        return torch.ones_like(values)
    compared = known(outcome, present) if weighting == "bon_outcome" else values
    members = [torch.nonzero(present & (group == each)).flatten() for each in torch.unique(group[present])]
    # ...[i, j]: is j's value at most i's?
    at_most = [(compared[rows][None, :] <= compared[rows][:, None]).double().mean(1) for rows in members]
    weights = [len(rows) * share ** (len(rows) - 1) for rows, share in zip(members, at_most, strict=True)]
    none = torch.zeros_like(values)
    return none.index_put((torch.cat(members),), torch.cat(weights)) if members else none


def _weighted_ce(rewards: Tensor, outcome: Tensor, present: Tensor, weights: Tensor, reduce: Reduce) -> Share:
    total = float(reduce.sum(weights.sum()))
    losses = binary_cross_entropy_with_logits(known(rewards, present), known(outcome, present), reduction="none")
    # selected once more: an infinite reward of a response with weight 0 must not make the sum NaN
    counted = torch.where(weights > 0, weights * losses, torch.zeros_like(losses))
    return Share(loss=counted.sum() / (total or 1.0), terms=total, state={})


def _total(rewards: Tensor, members: Tensor, reduce: Reduce) -> tuple[float, float]:
    """Sum and number of the members' rewards over all ranks, without gradient."""
    own = torch.stack([known(rewards.detach(), members).sum(), members.sum().double()])
    total, count = reduce.sum(own).tolist()
    return total, count


def _pairs(
    rewards: Tensor, outcome: Tensor, present: Tensor, group: Tensor, reduce: Reduce
) -> tuple[Tensor, Tensor, float]:
    """Rewards of the right and of the wrong member of each pair on this rank, and the number of pairs on all ranks."""
    values, right = known(rewards, present), outcome > 0.5
    rows = [
        torch.cartesian_prod(
            torch.nonzero(present & (group == each) & right).flatten(),
            torch.nonzero(present & (group == each) & ~right).flatten(),
        )
        for each in torch.unique(group[present])
    ]
    index = torch.cat([*rows, group.new_zeros(0, 2)])
    count = float(reduce.sum(torch.tensor(float(len(index)), dtype=torch.float64)))
    return values[index[:, 0]], values[index[:, 1]], count


def _mean_of_pairs(losses: Tensor, count: float, state: State) -> Share:
    return Share(loss=losses.sum() / max(count, 1.0), terms=count, pairs=count, state=state)


def check_loss(loss: PrmLoss) -> None:
    """Try a loss on a right and a wrong response, so that it refuses its settings before anything starts.

    Raises:
        ConfigError: whatever the loss refuses, or a gradient that does not raise the right and lower the wrong one.
    """
    yes = torch.tensor([True, True])
    outcome, group = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    _, slope = slopes(loss, torch.zeros(2), outcome, yes, group, Identity(), {})
    if not (slope[0] < 0 < slope[1] and all(math.isfinite(each) for each in slope.tolist())):
        raise ConfigError(
            f"the PRM's loss has gradient {slope.tolist()} on a right and a wrong response of reward 0; expected a "
            "negative and a positive one"
        )
