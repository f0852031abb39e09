"""Solutions whose steps are labelled right or wrong: what a process reward model learns from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlprm.data.datasets import json_records
from rlprm.data.tasks.chain_arithmetic import ChainArithmetic, Fact, Split, apply, verify
from rlprm.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A question, the steps of a solution, and a label for each: 1 right, 0 wrong, -1 unknown."""

    question: str
    steps: tuple[str, ...]
    labels: tuple[int, ...]


def chain_arithmetic(
    *,
    modulus: int,
    operations: Sequence[int],
    operators: str,
    split: Split,
    size: int,
    seed: int,
    misconceptions_seed: int,
    share: float,
    probability: float,
    mistakes: float,
    slips: float,
) -> list[Labelled]:
    """``size`` solutions of the embedded task, line by line, with the exact labels of its verifier.

    Written as the task's warmed-up models write: a ``share`` of all facts has one wrong value, which is used with
    ``probability``. Besides, with chance ``mistakes`` a line's value is any wrong one, and with chance ``slips`` the line
    starts from another value than the last one's, or applies another operation than the question asks for. The next line
    goes on from what was written.

    >>> made = chain_arithmetic(modulus=7, operations=[2, 2], operators="+-*", split="train", size=1, seed=0,
    ...                         misconceptions_seed=0, share=0.0, probability=0.0, mistakes=0.0, slips=0.0)
    >>> made[0].labels
    (1, 1)

    Raises:
        ConfigError: a chance outside [0, 1], or a task that cannot be (:class:`ChainArithmetic`).
    """
    for name, chance in (("probability", probability), ("mistakes", mistakes), ("slips", slips)):
        if not 0 <= chance <= 1:
            raise ConfigError(f"{name} is {chance}; expected a chance from 0 to 1")
    fewest, most = operations
    task = ChainArithmetic(modulus=modulus, operations=(fewest, most), operators=operators)
    beliefs = task.misconceptions(seed=misconceptions_seed, share=share)
    made = []
    for index in range(size):
        problem = task.problem(seed=seed, index=index, split=split)
        rng = random.Random(f"labelled/{seed}/{split}/{index}")
        lines, value = [], problem.start
        for operation in problem.operations:
            fact = (value, *operation)
            if rng.random() < slips:
                fact = rng.choice(_neighbours(fact, modulus, operators))
            right = apply(fact, modulus)
            believed = beliefs.get(fact, right) if rng.random() < probability else right
            others = [other for other in range(modulus) if other != right]
            value = rng.choice(others) if rng.random() < mistakes else believed
            lines.append(f"{fact[0]}{fact[1]}{fact[2]}={value}")
        text = "\n".join(lines)
        _, _, labels = verify(problem.gold, text, problem.prompt)
        made.append(Labelled(question=problem.prompt, steps=tuple(text.splitlines(keepends=True)), labels=labels))
    return made


def _neighbours(fact: Fact, modulus: int, operators: str) -> list[Fact]:
    """Facts that differ from this one in one place."""
    value, operator, operand = fact
    return [
        *((other, operator, operand) for other in range(modulus) if other != value),
        *((value, other, operand) for other in operators if other != operator),
        *((value, operator, other) for other in range(1, modulus) if other != operand),
    ]


def jsonl(*, path: str, question: str, steps: str, label: str) -> list[Labelled]:
    """Solutions from a JSON-lines file, by the names of its columns.

    ``steps`` holds a list of texts. ``label`` holds either a list of one label per step (1 or true: right, 0 or false:
    wrong, -1 or null: unknown), or the number of the first wrong step, counted from 0, and -1 where none is wrong, as
    ProcessBench has it (arXiv:2412.06559): steps before it are right, and of those behind it nothing is known.

    Raises:
        DataError: no such file, no row, a missing column, or labels that are not of that kind.
    """
    found = []
    for where, record in json_records(path):
        texts, labels = record.get(steps), record.get(label)
        if not isinstance(record.get(question), str):
            raise DataError(f"{where}: column {question!r} holds no text (columns: {', '.join(record)})")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: column {steps!r} holds no list of texts (columns: {', '.join(record)})")
        if label not in record:
            raise DataError(f"{where}: there is no column {label!r} (columns: {', '.join(record)})")
        found.append(
            Labelled(question=record[question], steps=tuple(texts), labels=_labels(labels, len(texts), where, label))
        )
    if not found:
        raise DataError(f"{path} holds no solution; give a file with one JSON object a line")
    return found


def _labels(given: Any, count: int, where: str, column: str) -> tuple[int, ...]:
    """One label per step.

    >>> _labels(1, 3, "a:1", "label"), _labels(-1, 2, "a:1", "label"), _labels([True, None], 2, "a:1", "label")
    ((1, 0, -1), (1, 1), (1, -1))
    """
    if isinstance(given, int) and not isinstance(given, bool) and -1 <= given < count:
        return (1,) * count if given < 0 else (1,) * given + (0,) + (-1,) * (count - given - 1)
    meaning = {1: 1, 0: 0, -1: -1, None: -1}  # True equals 1 and False 0
    if isinstance(given, list) and len(given) == count and all(each is None or each in meaning for each in given):
        return tuple(meaning[each] for each in given)
    raise DataError(
        f"{where}: column {column!r} holds {given!r:.60} for {count} steps; expected a list of one label (1, 0 or -1) per "
        "step, or the number of the first wrong step (from 0; -1: none is wrong)"
    )
