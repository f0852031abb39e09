"""How good a process reward model is, from plain rows: sequence rewards, outcomes, groups, exact step labels.

Measured on fresh rollouts, unfiltered and before learning from them, always beside the surprisal baseline (the
sequence's ``log pi_ref``): a model that does not beat the surprise of the initial model has learnt nothing.
A measure that the rows do not allow (one class only, no mixed group) is None, never a made-up 0 or 1/2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlprm.errors import ConfigError


def pair_accuracy(
    rewards: Float[Tensor, " B"], outcome: Float[Tensor, " B"], present: Bool[Tensor, " B"], group: Int[Tensor, " B"]
) -> tuple[float | None, int]:
    """Pairs of a group with different outcomes that ``rewards`` puts in the right order; ties count one half.

    Averaged within each mixed group first, so that no prompt counts more than another. Returns the mean over mixed
    groups (None without any) and their number. Chance is 1/2 and the majority class cannot inflate it.

    >>> pair_accuracy(torch.tensor([2.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 0.0]), torch.tensor([True] * 3),
    ...               torch.tensor([7, 7, 7]))
    (0.75, 1)
    """
    accuracies = []
    for each in torch.unique(group[present]):
        members = present & (group == each)
        better = outcome[members][:, None] > outcome[members][None, :]
        if not bool(better.any()):
            continue
        gap = rewards[members].double()[:, None] - rewards[members].double()[None, :]
        accuracies.append(_ranked(gap[better]))
    return (sum(accuracies) / len(accuracies) if accuracies else None), len(accuracies)


def _ranked(gap: Tensor) -> float:
    return float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean())


def auc(rewards: Float[Tensor, " n"], right: Bool[Tensor, " n"]) -> float | None:
    """Chance that a right row outranks a wrong one, ties one half (Mann-Whitney U over all pairs); None with one class.

    >>> auc(torch.tensor([3.0, 1.0, 1.0]), torch.tensor([True, True, False]))
    0.75
    """
    positives, negatives = int(right.sum()), int((~right).sum())
    if positives == 0 or negatives == 0:
        return None
    _values, inverse, counts = torch.unique(rewards.double(), return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts - 1) / 2  # average 1-based rank of each tie
    rank_sum = float(ranks[inverse][right].double().sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def expected_calibration_error(
    logits: Float[Tensor, " n"], outcome: Float[Tensor, " n"], num_bins: int
) -> float | None:
    """``sum_bins (n_bin / n) |mean outcome - mean sigmoid(logit)|`` over equal-width bins of the probability.

    >>> expected_calibration_error(torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 0.0]), 10)
    0.25

    Raises:
        ConfigError: no bins.
    """
    if num_bins < 1:
        raise ConfigError(f"calibration over {num_bins} bins; expected at least 1")
    if len(logits) == 0:
        return None
    probability = logits.double().sigmoid()
    which = (probability * num_bins).long().clamp_max(num_bins - 1)
    gap = torch.zeros(num_bins, dtype=torch.float64, device=logits.device)
    return float(gap.index_add(0, which, outcome.double() - probability).abs().sum() / len(logits))


def correlation(first: Float[Tensor, " n"], second: Float[Tensor, " n"]) -> float | None:
    """Pearson's correlation; None where one of the two does not vary.

    >>> round(correlation(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])), 6)
    1.0
    """
    if len(first) < 2:
        return None
    x, y = first.double() - first.double().mean(), second.double() - second.double().mean()
    scale = float((x**2).sum().sqrt() * (y**2).sum().sqrt())
    return float((x * y).sum()) / scale if scale > 0 else None


def first_wrong_hit(step_rewards: Sequence[float], step_labels: Sequence[int]) -> float | None:
    """1 if the lowest step reward is that of the first wrong step; 1/k in a tie of k; None without a wrong step.

    Labels: 1 right, 0 wrong, -1 unknown; steps without a label are no candidates.

    >>> first_wrong_hit([0.5, -2.0, -1.0], [1, 0, 0]), first_wrong_hit([0.5, -1.0], [1, 1])
    (1.0, None)

    Raises:
        ConfigError: more or fewer labels than rewards.
    """
    candidates = _labelled(step_rewards, step_labels)
    if all(label for _, label in candidates):
        return None
    lowest = min(reward for reward, _ in candidates)
    first = next(reward for reward, label in candidates if label == 0)
    return 1.0 / sum(reward == lowest for reward, _ in candidates) if first == lowest else 0.0


def first_wrong_chance(step_labels: Sequence[int]) -> float | None:
    """What :func:`first_wrong_hit` gives a blind guess: 1 over the labelled steps; None without a wrong step.

    >>> first_wrong_chance([1, 0, 0, -1])
    0.3333333333333333
    """
    labels = [label for label in step_labels if label >= 0]
    return None if all(labels) else 1 / len(labels)


def step_auc(step_rewards: Sequence[Sequence[float]], step_labels: Sequence[Sequence[int]]) -> float | None:
    """:func:`auc` of step rewards over the labelled steps of all rows.

    >>> step_auc([[0.5, -1.0], [0.2]], [[1, 0], [-1]])
    1.0
    """
    pairs = [pair for row, labels in zip(step_rewards, step_labels, strict=True) for pair in _labelled(row, labels)]
    rewards = torch.tensor([reward for reward, _ in pairs], dtype=torch.float64)
    return auc(rewards, torch.tensor([label == 1 for _, label in pairs], dtype=torch.bool))


def _labelled(step_rewards: Sequence[float], step_labels: Sequence[int]) -> list[tuple[float, int]]:
    if len(step_rewards) != len(step_labels):
        raise ConfigError(f"{len(step_rewards)} step rewards and {len(step_labels)} labels; give one label per step")
    return [pair for pair in zip(step_rewards, step_labels, strict=True) if pair[1] >= 0]


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """``1 - C(n - c, k) / C(n, k)``: chance that one of k of the n samples is right (arXiv:2107.03374).

    As a product, because the binomials overflow.

    >>> round(pass_at_k(16, 3, 4), 6)
    0.607143

    Raises:
        ConfigError: fewer samples than k, or more right ones than samples.
    """
    if not (1 <= k <= num_samples and 0 <= num_right <= num_samples):
        raise ConfigError(f"pass@{k} of {num_samples} samples, {num_right} right; expected 1 <= k <= samples")
    missed = 1.0
    for j in range(num_samples - num_right + 1, num_samples + 1):
        missed *= max(0.0, 1 - k / j)
    return 1 - missed
