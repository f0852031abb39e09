"""Preference optimisation on stored rollouts: which pairs, which of their tokens, and the loss of a pair.

A pair is two responses to one prompt, a preferred one and another. All three methods share one loss; they differ in
which pairs there are, which tokens of them are scored, and what a pair weighs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlprm.errors import ConfigError, DataError
from rlprm.roles import StoredRollout

LABELS = "labels"  # of exact step labels; any other word is the name of a stored process stream
Span = tuple[int, int]  # first response token, and the one after the last


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Positions of two responses among those of their prompt, what is scored of each, and how much the pair counts."""

    preferred: int
    other: int
    preferred_span: Span
    other_span: Span
    weight: float


def outcome_pairs(responses: Sequence[StoredRollout]) -> list[Pair]:
    """DPO: every right response with every wrong one, scored whole (arXiv:2305.18290).

    Right means an outcome above 1/2; a response without a verdict is in no pair.
    """
    right = [index for index, each in enumerate(responses) if each.outcome is not None and each.outcome > 0.5]
    wrong = [index for index, each in enumerate(responses) if each.outcome is not None and each.outcome <= 0.5]
    return [
        Pair(
            preferred=good,
            other=bad,
            preferred_span=(0, len(responses[good].response)),
            other_span=(0, len(responses[bad].response)),
            weight=1.0,
        )
        for good in right
        for bad in wrong
        if responses[good].response and responses[bad].response
    ]


def step_pairs(responses: Sequence[StoredRollout], *, steps: str) -> list[Pair]:
    """Step-DPO (arXiv:2406.18629): after a shared right beginning, the right next step is preferred to the wrong one.

    Only the two steps are scored; what follows them is not. The source has the preferred step sampled anew from the
    beginning of a wrong response; here both come from what a run has stored, so the beginnings must be equal token by
    token. For a wrong response, h is its first wrong step:

    - ``steps: labels``: the first with exact label 0, all before it being labelled 1. The preferred step is another
      response's step h with label 1, after the same tokens. The prompt alone is a beginning, too (h = 0).
    - ``steps: NAME``: the first that earns less in the stream NAME than the step before it (a reading: the source has no
      process rewards). The preferred step is step h of a *right* response, after the same tokens, which earns no less
      than the step before it. The first step has none before it, hence no pair.

    A response without the stored labels or rewards that are asked for is in no pair.
    """
    found = []
    for bad, wrong in enumerate(responses):
        fault = _first_fault(wrong, steps)
        if fault is None:
            continue
        beginning = wrong.response[: wrong.spans[fault][0]]
        for good, right in enumerate(responses):
            if good == bad or fault >= len(right.spans) or not _sound(right, fault, steps):
                continue
            start, end = right.spans[fault]
            if right.response[:start] == beginning and right.response[start:end] != _tokens(wrong, fault):
                found.append(
                    Pair(
                        preferred=good,
                        other=bad,
                        preferred_span=(start, end),
                        other_span=wrong.spans[fault],
                        weight=1.0,
                    )
                )
    return found


def weighted_pairs(responses: Sequence[StoredRollout], *, quality: str) -> list[Pair]:
    """Weighted DPO: DPO's pairs, each weighing ``max(0, q(preferred) - q(other))``, the process-quality difference.

    ``quality`` labels: q is the share of right steps among those with an exact label; NAME: the mean over steps of what
    the stream NAME pays. A pair whose process speaks against its outcome weighs 0 and is left out. :func:`balanced` then
    brings the mean weight of all pairs to 1. Inferred: StepORLM names a weight from the difference in process quality,
    and no formula for it could be sourced.

    Raises:
        DataError: a response of a pair has no label or no reward of that stream.
    """
    qualities: dict[int, float] = {}
    found = []
    for pair in outcome_pairs(responses):
        for index in (pair.preferred, pair.other):
            if index not in qualities:
                qualities[index] = _quality(responses[index], quality)
        weight = qualities[pair.preferred] - qualities[pair.other]
        if weight > 0:
            found.append(replace(pair, weight=weight))
    return found


def balanced(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with their weights divided by the mean weight, so that the learning rate keeps its meaning.

    >>> pair = Pair(preferred=0, other=1, preferred_span=(0, 1), other_span=(0, 1), weight=3.0)
    >>> [each.weight for each in balanced([pair, replace(pair, weight=1.0)])]
    [1.5, 0.5]
    """
    mean = sum(pair.weight for pair in pairs) / max(1, len(pairs))
    return [replace(pair, weight=pair.weight / mean) for pair in pairs]


def sampled(pairs: Sequence[Pair], limit: int | None, draw: random.Random) -> list[Pair]:
    """At most ``limit`` of a prompt's pairs (None: all), drawn evenly and given in their order."""
    if limit is None or len(pairs) <= limit:
        return list(pairs)
    return [pairs[index] for index in sorted(draw.sample(range(len(pairs)), limit))]


def _first_fault(response: StoredRollout, steps: str) -> int | None:
    """The first wrong step; None where there is none, or nobody can say."""
    if steps == LABELS:
        for index, label in enumerate(response.labels):
            if label != 1:
                return index if label == 0 else None  # an unknown step before the first wrong one: not certainly right
        return None
    if response.outcome is None or response.outcome > 0.5:
        return None
    rewards = response.rewards.get(steps, ())
    for index, (before, now) in enumerate(pairwise(rewards), start=1):
        if before is None or now is None:
            return None
        if now < before:
            return index
    return None


def _sound(response: StoredRollout, step: int, steps: str) -> bool:
    """Is that step of the response right, and right without doubt?"""
    if steps == LABELS:
        return step < len(response.labels) and response.labels[step] == 1
    rewards = response.rewards.get(steps, ())
    if response.outcome is None or response.outcome <= 0.5 or step >= len(rewards):
        return False
    before, now = rewards[step - 1], rewards[step]
    return before is not None and now is not None and now >= before


def _tokens(response: StoredRollout, step: int) -> tuple[int, ...]:
    start, end = response.spans[step]
    return response.response[start:end]


def _quality(response: StoredRollout, quality: str) -> float:
    if quality == LABELS:
        known = [float(label) for label in response.labels if label >= 0]
    else:
        known = [reward for reward in response.rewards.get(quality, ()) if reward is not None]
    if not known:
        what = "exact step label" if quality == LABELS else f"step reward of the stream {quality!r}"
        has = ", ".join(sorted(response.rewards)) or "none"
        raise DataError(
            f"{response.where}: no {what} is stored, which the weight of a pair comes from (streams stored: {has}); choose "
            f"preference.quality among those, or {LABELS} where a task has exact labels"
        )
    return sum(known) / len(known)


def preference_loss(margin: Float[Tensor, " p"], weight: Float[Tensor, " p"], beta: float) -> Float[Tensor, " p"]:
    """``-weight * log sigmoid(beta * margin)`` per pair (DPO, arXiv:2305.18290, eq. 7), in nats.

    ``margin = sum over scored tokens of log pi / pi_ref, of the preferred minus the same of the other``.

    >>> [round(loss, 6) for loss in preference_loss(torch.tensor([0.0, 10.0]), torch.tensor([1.0, 2.0]), 0.1).tolist()]
    [0.693147, 0.626523]

    Raises:
        ConfigError: beta is not positive.
    """
    if not beta > 0:
        raise ConfigError(f"beta is {beta}; expected more than 0 (it is the price of moving away from the reference)")
    return weight.double() * F.softplus(-beta * margin.double())


def pull(margin: Float[Tensor, " p"], weight: Float[Tensor, " p"], beta: float) -> Float[Tensor, " p"]:
    """``-d loss / d margin = weight * beta * sigmoid(-beta * margin)`` per pair: how hard it pulls its two log-probs apart.

    The gradient of the loss is that of ``-sum_p pull_p * (log pi(preferred) - log pi(other))`` with ``pull`` held fixed, so
    the two responses of a pair need not lie in one micro-batch, and any split gives the same gradient.

    >>> pull(torch.tensor([0.0]), torch.tensor([2.0]), 0.1).tolist()
    [0.1]
    """
    return weight.double() * beta * torch.sigmoid(-beta * margin.double())
