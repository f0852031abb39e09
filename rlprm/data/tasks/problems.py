"""The embedded task as a data source: prompts with gold answers, and warm-up texts with planted misconceptions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlprm.data.tasks.chain_arithmetic import ChainArithmetic, Split, write_model_folder


class Problems:
    """``size`` problems of one split, indexable: (prompt, gold).

    >>> problems = Problems(modulus=7, operations=[2, 2], operators="+-*", split="train", size=3, seed=0)
    >>> len(problems), problems[0] == problems[0]
    (3, True)
    """

    def __init__(
        self, *, modulus: int, operations: Sequence[int], operators: str, split: Split, size: int, seed: int
    ) -> None:
        fewest, most = operations
        self._task = ChainArithmetic(modulus=modulus, operations=(fewest, most), operators=operators)
        self._split: Split = split
        self._size = size
        self._seed = seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[str, str]:
        if not 0 <= index < self._size:
            raise IndexError(index)
        problem = self._task.problem(seed=self._seed, index=index, split=self._split)
        return problem.prompt, problem.gold


def warm_up(
    *,
    modulus: int,
    operations: Sequence[int],
    operators: str,
    size: int,
    seed: int,
    misconceptions_seed: int,
    share: float,
    probability: float,
) -> list[tuple[str, str]]:
    """``size`` (prompt, response) texts; a ``share`` of all facts is answered wrongly with ``probability``."""
    fewest, most = operations
    task = ChainArithmetic(modulus=modulus, operations=(fewest, most), operators=operators)
    beliefs = task.misconceptions(seed=misconceptions_seed, share=share)
    return list(task.sft(seed=seed, count=size, beliefs=beliefs, probability=probability))


def initial_model(folder: str, *, seed: int, hidden: int, layers: int, heads: int, mlp: int, context: int) -> None:
    """A randomly initialised model with the task's tokenizer, written to ``folder``."""
    write_model_folder(Path(folder), seed, hidden=hidden, layers=layers, heads=heads, mlp=mlp, context=context)
