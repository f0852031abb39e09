"""Progress of a prover: how much more likely success became with a step (Rewarding Progress, arXiv:2410.08146).

``A_h = Q_h - Q_{h-1}``, where ``Q_h`` is the chance that a prover finishes a response well from the end of step h on.
Progress is rewarded, never ``Q`` itself: paid by value, a policy would stay where the value is high.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import comb

from rlprm.errors import ConfigError


def success_of_best(outcomes: Sequence[float], best_of: int) -> float | None:
    """``Q^BoK``, the chance that the best of K = ``best_of`` continuations succeeds, from n sampled ones, without bias.

    ``1 - (mean over all K-subsets S of prod_{j in S} (1 - o_j))``. Independent samples make the expectation of each
    product ``(1 - Q)^K``, so this estimates ``1 - (1 - Q)^K`` without bias also for outcomes between 0 and 1; with 0/1
    outcomes it is pass@K. ``1 - (1 - mean)^K``, which puts the mean into the paper's formula, is too low on average.
    K = 1 is the mean. None (absent) with fewer than K outcomes, from which nothing follows without bias.

    >>> success_of_best([1.0, 0.0, 0.0, 0.0], 2), success_of_best([1.0, 0.0, 0.0, 0.0], 1)
    (0.5, 0.25)

    Raises:
        ConfigError: ``best_of`` is below 1.
    """
    if best_of < 1:
        raise ConfigError(f"best_of is {best_of}; expected 1 or more continuations")
    if len(outcomes) < best_of:
        return None
    products = [1.0] + [0.0] * best_of  # products[k]: sum over the k-subsets read so far of the product of failures
    for outcome in outcomes:
        for size in range(best_of, 0, -1):
            products[size] += products[size - 1] * (1.0 - outcome)
    return 1.0 - products[best_of] / comb(len(outcomes), best_of)


def progress(values: Sequence[float | None]) -> list[float | None]:
    """``[Q_0, Q_1, ..., Q_H] -> [Q_1 - Q_0, ..., Q_H - Q_{H-1}]``; absent (None) where either side is.

    The sum over a response is ``Q_H - Q_0``, the outcome minus the chance at the start, when nothing is absent.

    >>> progress([0.5, 0.75, None, 1.0])
    [0.25, None, None]
    """
    return [None if before is None or after is None else after - before for before, after in pairwise(values)]


def tried_steps(num_steps: int, at_most: int | None) -> list[int]:
    """The steps, from 0, after which success is estimated: all, or ``at_most`` evenly spaced ones and the last.

    The last step needs no continuation (the response ends there), so it does not count. Progress between two tried
    steps is paid at the later one: it is the sum of the steps in between.

    >>> tried_steps(6, None), tried_steps(6, 2), tried_steps(1, 2)
    ([0, 1, 2, 3, 4, 5], [1, 3, 5], [0])

    Raises:
        ConfigError: ``at_most`` is below 1.
    """
    if at_most is not None and at_most < 1:
        raise ConfigError(f"at_most is {at_most}; expected 1 or more steps, or null for all")
    if num_steps < 1:
        return []
    inner = num_steps - 1
    if at_most is None or at_most >= inner:
        return list(range(num_steps))
    return [(part * num_steps) // (at_most + 1) - 1 for part in range(1, at_most + 1)] + [num_steps - 1]
