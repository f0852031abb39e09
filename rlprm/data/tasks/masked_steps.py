"""Verifiable prompts out of worked solutions: fill the hidden steps, put the steps in order (MR-RLVR, arXiv:2511.17473).

The solution of a problem says more than its answer. Hiding some of its steps, or shuffling them, makes tasks whose right
response is known without any judge, so they train beside the problems themselves. The paper was read in its abstract
and summaries only: it trains on these tasks first and on outcomes afterwards, and masks entities inside a step; here
whole steps are hidden and all tasks are mixed by the weights of their data sources.

What is expected is written into the gold, kind first: ``fill`` or ``order``, then a line per expected step.
:mod:`rlprm.verify.worked_steps` reads it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Literal

from rlprm.data.datasets import Row, json_records, lookup, plain_text, unique
from rlprm.data.tasks.chain_arithmetic import ChainArithmetic, Split
from rlprm.errors import ConfigError

Kind = Literal["fill", "order"]
HIDDEN = "="  # stands for a hidden line of the embedded task, whose alphabet has no letter for it


class WorkedProblems:
    """``size`` problems of the embedded task with their exact solution, masked or shuffled: (question, gold).

    ``fill``: ``hide`` lines are replaced by ``=``; the response is those lines. ``order``: all lines, shuffled; the
    response is the lines in order. A blank line ends the question, which sets it apart from a bare expression. All is
    drawn with ``seed``, the index and the kind.

    >>> task = WorkedProblems(modulus=7, operations=[3, 3], operators="+", split="train", size=2, seed=0, kind="fill", hide=1)
    >>> question, gold = task[0]
    >>> print(question.replace("\\n", "|"), gold.replace("\\n", "|"))
    5+5+4+4|5+5=3|=|0+4=4|| fill|3+4=0

    Raises:
        ConfigError: nothing to hide or to order in the shortest problems, or ``hide`` set for ``order``.
    """

    def __init__(
        self,
        *,
        modulus: int,
        operations: Sequence[int],
        operators: str,
        split: Split,
        size: int,
        seed: int,
        kind: Kind,
        hide: int | None,
    ) -> None:
        fewest, most = operations
        check_kind(kind, hide, fewest)
        self._task = ChainArithmetic(modulus=modulus, operations=(fewest, most), operators=operators)
        self._split: Split = split
        self._size, self._seed = size, seed
        self._kind: Kind = kind
        self._hide = hide

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[str, str]:
        if not 0 <= index < self._size:
            raise IndexError(index)
        problem = self._task.problem(seed=self._seed, index=index, split=self._split)
        rng = random.Random(f"worked/{self._kind}/{self._seed}/{index}")
        shown, expected = disturbed(problem.solution.split("\n"), self._kind, self._hide, HIDDEN, rng)
        return problem.prompt + "\n".join(shown) + "\n\n", gold_of(self._kind, expected)


def worked_jsonl(
    path: str,
    *,
    question: str,
    solution: str,
    end: str | None,
    remove: str | None,
    kind: Kind,
    hide: int | None,
    format: str,
    mask: str,
    seed: int,
) -> list[Row]:
    """Rows from JSON lines with a worked solution: one step a line of the column ``solution``, up to the line that
    ``end`` matches; what ``remove`` matches (a calculator's annotations, say) is taken out.

    ``format`` is the prompt's text with ``{question}`` and ``{steps}``; a hidden step shows ``mask``. A solution with
    too few steps makes no prompt: its row has no gold and is counted as such.

    Raises:
        ConfigError: a format without both places, a pattern that does not compile, or as :class:`WorkedProblems`.
        DataError: as :func:`rlprm.data.datasets.jsonl`.
    """
    check_kind(kind, hide, None)
    if format.count("{question}") != 1 or format.count("{steps}") != 1:
        raise ConfigError(f"format {format!r:.60} needs {{question}} and {{steps}}, each exactly once")
    try:
        ending, noise = re.compile(end or r"(?!)"), re.compile(remove or r"(?!)")
    except re.error as error:
        raise ConfigError(f"end {end!r} or remove {remove!r} is no regular expression: {error}; correct it") from error
    least = 2 if hide is None else hide + 1
    rows = []
    for index, (where, record) in enumerate(json_records(path)):
        asked = plain_text(lookup(record, question, where), question, where)
        lines = noise.sub("", plain_text(lookup(record, solution, where), solution, where)).splitlines()
        last = next((number for number, line in enumerate(lines) if ending.search(line)), len(lines))
        steps = [" ".join(line.split()) for line in lines[:last] if line.strip()]
        if len(steps) < least or len(set(steps)) < 2:
            rows.append(Row(id=str(index), question=asked, gold=None, source=where))
            continue
        shown, expected = disturbed(steps, kind, hide, mask, random.Random(f"worked/{kind}/{seed}/{index}"))
        before, _, after = format.partition("{steps}")
        text = before.replace("{question}", asked) + "\n".join(shown) + after.replace("{question}", asked)
        rows.append(Row(id=str(index), question=text, gold=gold_of(kind, expected), source=where))
    return unique(rows, path)


def disturbed(
    steps: Sequence[str], kind: Kind, hide: int | None, mask: str, rng: random.Random
) -> tuple[list[str], list[str]]:
    """(what is shown, what is expected): ``hide`` steps masked, or all steps in another order than the right one.

    >>> disturbed(["a", "b", "c"], "fill", 1, "?", random.Random(0))
    (['a', '?', 'c'], ['b'])
    """
    if kind == "fill":
        assert hide is not None
        hidden = set(rng.sample(range(len(steps)), hide))
        return [mask if number in hidden else step for number, step in enumerate(steps)], [
            steps[number] for number in sorted(hidden)
        ]
    shuffled = list(steps)
    while shuffled == list(steps) and len(set(steps)) > 1:
        rng.shuffle(shuffled)
    return shuffled, list(steps)


def gold_of(kind: Kind, expected: Sequence[str]) -> str:
    """The kind, then a line per expected step."""
    return "\n".join((kind, *expected))


def check_kind(kind: str, hide: int | None, fewest: int | None) -> None:
    """Refuse a kind that is none, and a number of hidden steps that leaves nothing to read or to fill."""
    if kind not in ("fill", "order"):
        raise ConfigError(f"kind is {kind!r}; expected fill or order")
    if kind == "order" and hide is not None:
        raise ConfigError(f"kind is order, which hides nothing, and hide is {hide}; set hide to null")
    if kind == "fill" and (hide is None or hide < 1):
        raise ConfigError(f"kind is fill and hide is {hide}; expected the number of steps to hide, 1 or more")
    if fewest is not None and fewest < (2 if hide is None else hide + 1):
        raise ConfigError(
            f"the shortest problem has {fewest} steps, too few for kind {kind} with hide {hide}; raise operations"
        )
