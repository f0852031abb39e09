"""Which rollouts of the accepted groups train the policy: ``select(rows, scores) -> keep this row``, an answer per row.

``scores`` holds, for each process stream, what it says of each row (:class:`rlprm.core.row_scores.RowScore`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from rlprm.batch import Row
from rlprm.errors import ConfigError
from rlprm.roles import RowScore

RowScores = Mapping[str, Mapping[int, RowScore]]
Aggregate = Literal["mean", "lowest", "sum", "last"]
Key = Callable[[int], tuple[float, ...]]


def everything(rows: Sequence[Row], scores: RowScores) -> list[bool]:
    """Every accepted rollout."""
    return [row.train for row in rows]


def finished(rows: Sequence[Row], scores: RowScores) -> list[bool]:
    """Accepted rollouts that ended by themselves; those cut by the length limit are left out (and counted)."""
    return [row.train and row.finish != "length" for row in rows]


def balanced(rows: Sequence[Row], scores: RowScores, *, keep: int, seed: int) -> list[bool]:
    """``keep`` rollouts of each group, right and wrong as even as can be, drawn at random: no process reward is asked.

    What :func:`prof` is to be compared with: the same numbers of right and wrong rollouts, chosen blindly.

    Raises:
        ConfigError: fewer than one rollout to keep.
    """
    return _kept(rows, keep, lambda place: _drawn(rows[place], seed), lambda place: _drawn(rows[place], seed))


def prof(
    rows: Sequence[Row],
    scores: RowScores,
    *,
    stream: str,
    keep: int,
    aggregate: Aggregate,
    negatives: Literal["lowest", "random"],
    penalty: float,
    most_steps: int | None,
    seed: int,
) -> list[bool]:
    """``keep`` rollouts of each group, right and wrong as even as can be, whose process rewards agree with the outcome.

    ``r = aggregate_h r_h - penalty * 1(H = 1 or H >= most_steps)``, with H the response's steps. Right rollouts with the
    highest r stay, of the wrong ones those with the lowest r (PROF-Both) or random ones (PROF-Pos). Right is an outcome
    above one half. A rollout without a process reward is the first to go, whatever its outcome; one without a verdict is
    neither right nor wrong, and does not stay. Ties go to the earlier sample.

    Source: PROF, arXiv:2509.03403; no code was released. Its README keeps the wrong rollouts with the lowest mean; its
    formula multiplies r by the outcome's sign, which says the same.

    Raises:
        ConfigError: no process stream of that name, or fewer than one rollout to keep.
    """
    if stream not in scores:
        raise ConfigError(
            f"select reads the process rewards of stream {stream!r}, and the run has "
            f"{', '.join(sorted(scores)) or 'no process stream'}; set select.stream"
        )

    def consistency(place: int, sign: float) -> tuple[float, ...]:
        """Smaller goes first; without a process reward, first of all."""
        found = scores[stream].get(place)
        if found is None:
            return (0.0,)
        steps = rows[place].num_steps
        single_or_many = steps == 1 or (most_steps is not None and steps >= most_steps)
        return 1.0, sign * (getattr(found, aggregate) - penalty * single_or_many)

    def wrong(place: int) -> tuple[float, ...]:
        return consistency(place, -1.0) if negatives == "lowest" else _drawn(rows[place], seed)

    return _kept(rows, keep, lambda place: consistency(place, 1.0), wrong)


def removals(right: int, wrong: int, keep: int) -> tuple[int, int]:
    """How many right and wrong rollouts go so that ``keep`` stay and ``k+ * k-`` is as large as it can be.

    ``removed+ = clip(ceil((n+ - n- + n - m) / 2), 0, n - m)``, and no more than there are of either kind.

    >>> removals(5, 3, 4), removals(7, 1, 4), removals(1, 7, 4), removals(4, 4, 4)
    ((3, 1), (4, 0), (0, 4), (2, 2))
    """
    surplus = max(0, right + wrong - keep)
    even = -((wrong - right - surplus) // 2)  # ceil((right - wrong + surplus) / 2)
    gone = min(max(even, 0, surplus - wrong), surplus, right)
    return gone, surplus - gone


def _kept(rows: Sequence[Row], keep: int, right_key: Key, wrong_key: Key) -> list[bool]:
    """In each group the rows with the smallest keys go, as many of each kind as :func:`removals` says."""
    if keep < 1:
        raise ConfigError(f"select.keep is {keep}; expected at least 1 rollout of each group")
    stays: set[int] = set()
    for right, wrong in _groups(rows):
        gone = removals(len(right), len(wrong), keep)
        for places, number, key in ((right, gone[0], right_key), (wrong, gone[1], wrong_key)):
            ordered = sorted(places, key=lambda place: (key(place), -rows[place].sample))
            stays |= set(ordered[number:])
    return [place in stays for place in range(len(rows))]


def _groups(rows: Sequence[Row]) -> Iterator[tuple[list[int], list[int]]]:
    """Places of the right and of the wrong rollouts of each accepted group."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for place, row in enumerate(rows):
        if row.train and row.outcome is not None:
            found.setdefault(row.group, ([], []))[row.outcome <= 0.5].append(place)
    yield from found.values()


def _drawn(row: Row, seed: int) -> tuple[float, ...]:
    """A number that depends on the rollout alone, not on the order of rows; another one for every policy version."""
    return (random.Random(f"rows/{seed}/{row.prompt_id}/{row.version}/{row.sample}").random(),)
