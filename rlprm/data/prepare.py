"""Preparing data: records of a public data set become rows `question`, `answer`; whatever is left out is counted.

Order: columns and gold -> the same question twice -> questions of the evaluation sets. Texts are compared without case,
white space and punctuation (:func:`key`), so a question with another wording is not found.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlprm.data.datasets import Columns, lookup
from rlprm.errors import ConfigError, DataError

KEPT = frozenset("+-*/=<>^_|!")  # punctuation that changes what a formula says


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a record of the source becomes a row. ``boxed`` finds the text of the last box in a worked solution.

    Raises:
        ConfigError: a pattern that does not compile, a gold_pattern without exactly one group, or two settings that
            contradict each other.
    """

    question: str
    answer: str
    solution: str | None  # column of a worked solution, kept beside the answer
    gold: Literal["text", "boxed"]  # all of the answer (or what gold_pattern finds in it), or its last box
    gold_pattern: str | None
    gold_remove: str
    missing_gold: Literal["refuse", "drop"]
    question_remove: Sequence[str]  # regular expressions whose matches are taken out of the question
    only_column: str | None  # rows are kept by what it holds; None: all
    only_values: Sequence[str]  # what it may hold

    def __post_init__(self) -> None:
        for pattern in self.question_remove:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"question_remove {pattern!r} is not a regular expression: {error}") from error
        if self.gold == "boxed" and self.gold_pattern is not None:
            raise ConfigError(f"gold is boxed and gold_pattern {self.gold_pattern!r}; set gold_pattern to null")
        if (self.only_column is None) != (not self.only_values):
            raise ConfigError(
                f"only_column is {self.only_column!r} and only_values {list(self.only_values)}; give both, or null and []"
            )
        self.columns()

    def columns(self) -> Columns:
        """How the answer is read; a row without gold is decided on here, not there."""
        return Columns(
            question=self.question,
            answer=self.answer,
            gold_pattern=self.gold_pattern,
            gold_remove=self.gold_remove,
            missing_gold="drop",
            id=None,
        )

    def needed(self) -> list[str]:
        """Columns to read out of a wide table, dots and all."""
        named = (self.question, self.answer, self.solution, self.only_column)
        return list(dict.fromkeys(column for column in named if column is not None))


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows in the order of the source, how many records were read, and how many were left out for which reason."""

    rows: list[dict[str, str]]
    read: int
    dropped: Mapping[str, int]


def convert(
    records: Iterable[tuple[str, Mapping[str, Any]]],
    reading: Reading,
    *,
    boxed: Callable[[str], str],
    readable: Callable[[str], bool],
) -> Prepared:
    """A row for each ``(where, record)`` that has a question and a gold answer which ``readable`` accepts.

    >>> reading = Reading(
    ...     question="problem",
    ...     answer="answer",
    ...     solution=None,
    ...     gold="text",
    ...     gold_pattern=None,
    ...     gold_remove="",
    ...     missing_gold="drop",
    ...     question_remove=[" Think.$"],
    ...     only_column="kind",
    ...     only_values=["math"],
    ... )
    >>> records = [
    ...     ("f:1", {"problem": "1+1? Think.", "answer": 2, "kind": "math"}),
    ...     ("f:2", {"problem": "Sort.", "answer": "x", "kind": "code"}),
    ... ]
    >>> convert(records, reading, boxed=str, readable=bool)
    Prepared(rows=[{'id': '0', 'question': '1+1?', 'answer': '2'}], read=2, dropped={'kind is code': 1})

    Raises:
        DataError: a column that is not there, a row without gold where ``missing_gold`` is ``refuse``.
    """
    rows: list[dict[str, str]] = []
    dropped: Counter[str] = Counter()
    columns, patterns, read = reading.columns(), [re.compile(each) for each in reading.question_remove], 0
    for index, (where, record) in enumerate(records):
        read += 1
        reason = _unwanted(record, reading, where)
        question = _question(record, reading.question, patterns, where)
        if reason is None and not question:
            reason = "no question"
        gold = None if reason else _gold(record, reading, columns, boxed, where)
        if reason is None and not (gold and readable(gold)):
            if reading.missing_gold == "refuse":
                raise DataError(
                    f"{where}: column {reading.answer!r} holds no gold answer that the verifier can read ({str(gold)[:60]!r}); "
                    "correct gold and gold_pattern of this data set, or set missing_gold to drop, which counts such rows"
                )
            reason = "no gold answer"
        if reason is not None:
            dropped[reason] += 1
            continue
        row = {"id": str(index), "question": question, "answer": str(gold)}
        if reading.solution is not None:
            row["solution"] = _text(lookup(record, reading.solution, where))
        rows.append(row)
    return Prepared(rows, read, dict(dropped))


def without_repeats(prepared: Prepared) -> Prepared:
    """Of equal questions the first stays; none stays where their gold answers differ.

    >>> rows = [{"question": q, "answer": a} for q, a in [("1 + 1?", "2"), ("1+1 ?", "2"), ("0?", "0"), ("0 ?", "1")]]
    >>> without_repeats(Prepared(rows, 4, {}))
    Prepared(rows=[{'question': '1 + 1?', 'answer': '2'}], read=4, dropped={'repeated': 1, 'contradictory answers': 2})
    """
    golds: dict[str, str] = {}
    contradictory: set[str] = set()
    for row in prepared.rows:
        mine = key(row["question"])
        if golds.setdefault(mine, row["answer"]) != row["answer"]:
            contradictory.add(mine)
    kept, seen, dropped = [], set(contradictory), Counter(prepared.dropped)
    for row in prepared.rows:
        mine = key(row["question"])
        if mine in seen:
            dropped["contradictory answers" if mine in contradictory else "repeated"] += 1
            continue
        seen.add(mine)
        kept.append(row)
    return Prepared(kept, prepared.read, dict(dropped))


def without_overlap(prepared: Prepared, held_out: Mapping[str, frozenset[str]]) -> Prepared:
    """Without the questions of the evaluation sets ``held_out`` (name -> keys).

    >>> rows = [{"question": "1+1?", "answer": "2"}, {"question": "1+2?", "answer": "3"}]
    >>> without_overlap(Prepared(rows, 2, {}), {"exam": frozenset({key("1 + 2")})}).dropped
    {'also in exam': 1}
    """
    kept, dropped = [], Counter(prepared.dropped)
    for row in prepared.rows:
        mine = key(row["question"])
        where = next((name for name, keys in held_out.items() if mine in keys), None)
        if where is None:
            kept.append(row)
        else:
            dropped[f"also in {where}"] += 1
    return Prepared(kept, prepared.read, dict(dropped))


def key(question: str) -> str:
    """What two copies of a question share: letters, digits and the signs of formulas.

    >>> key("What is $x + 1$,\\n if x = 2 ?") == key("what is x+1 if x=2")
    True
    >>> key("x+1") == key("x-1")
    False
    """
    text = unicodedata.normalize("NFKC", question).casefold()
    return "".join(character for character in text if character.isalnum() or character in KEPT)


def _unwanted(record: Mapping[str, Any], reading: Reading, where: str) -> str | None:
    if reading.only_column is None:
        return None
    found = _text(lookup(record, reading.only_column, where))
    return None if found in reading.only_values else f"{reading.only_column} is {found[:40]}"


def _question(record: Mapping[str, Any], column: str, patterns: Sequence[re.Pattern[str]], where: str) -> str:
    text = _text(lookup(record, column, where))
    for pattern in patterns:
        text = pattern.sub("", text)
    return text.strip()


def _gold(
    record: Mapping[str, Any], reading: Reading, columns: Columns, boxed: Callable[[str], str], where: str
) -> str | None:
    answer = lookup(record, reading.answer, where)
    return boxed(_text(answer)).strip() if reading.gold == "boxed" else columns.gold(answer, where)


def _text(value: Any) -> str:
    """A missing value is an empty text; half of a surrogate pair, which no file can hold, is taken out."""
    text = "" if value is None else str(value)
    return "".join(character for character in text if not "\ud800" <= character <= "\udfff")
