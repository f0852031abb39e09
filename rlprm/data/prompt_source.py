"""Prompts in a seeded, weighted order that can be resumed exactly; and held-out sets.

The whole state of the order is one number per source: how many of its prompts were taken. From it follow the epoch,
the place in that epoch's shuffle and which source is next, so there is no random generator to save.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlprm.data.datasets import Row, unique
from rlprm.data.templates import Render
from rlprm.errors import CheckpointError, DataError
from rlprm.roles import Prompt

SOURCE_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # no "/": it separates the name from the row in ids and metric names


class Source(NamedTuple):
    """A named data set and its share of the prompts, relative to the other sources' weights."""

    name: str
    rows: list[Row]
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """An evaluation set in its fixed order, and what was left out of it."""

    name: str
    prompts: tuple[Prompt, ...]
    num_rows: int  # rows of the data set, before the limit
    num_without_gold: int  # rows within the limit that have no gold answer
    num_too_long: int  # rows within the limit whose prompt is over max_prompt_tokens


class Rendered(NamedTuple):
    """A prompt as it is kept: an array of ids needs 4 bytes a token, a tuple of Python ints up to 40."""

    id: str
    text: str
    question: str
    tokens: array[int]
    gold: str
    source: str

    def prompt(self) -> Prompt:
        return Prompt(
            id=self.id,
            text=self.text,
            question=self.question,
            tokens=tuple(self.tokens),
            gold=self.gold,
            source=self.source,
        )


class Fitting(NamedTuple):
    """The prompts of a data set that can be used, in the order of its rows, and how many were left out and why."""

    prompts: list[Rendered]
    num_without_gold: int
    num_too_long: int


class PromptSource:
    """``take(n)``: the next n prompts; after t in all, each source has given its share ``w t`` to within the number of
    sources minus one (within 1 for two sources), and every row once per pass through its source.

    The next prompt comes from the source that is furthest behind its share (ties: the first named). A source is
    shuffled anew for each of its epochs, by (seed, name, epoch, row id) and nothing else; a source that is used up
    starts its next epoch while the others go on. A batch that crosses the end of an epoch may hold one row twice, so
    number groups by their place in the batch, not by prompt id.

    >>> rows = [Row(id=str(i), question=f"{i}+1=", gold=str(i + 1), source=f"sums:{i}") for i in range(3)]
    >>> def render(question):
    ...     return question, tuple(question.encode())
    >>> source = PromptSource([Source("sums", rows, 1.0)], render, seed=0, max_prompt_tokens=8)
    >>> state = source.state() if source.take(2) else {}
    >>> again = PromptSource([Source("sums", rows, 1.0)], render, seed=0, max_prompt_tokens=8)
    >>> again.restore(state)
    >>> again.take(5) == source.take(5)
    True

    Raises:
        DataError: no sources, equal names, a name with other characters than letters, digits, ``_ . -``, a weight
            that is not above 0, an empty source, a question that cannot be rendered, a source with no prompt left.
    """

    def __init__(self, sources: Sequence[Source], render: Render, *, seed: int, max_prompt_tokens: int) -> None:
        check_sources(sources)
        self._seed = seed
        self._rows = {source.name: source.rows for source in sources}
        self._fitting = {name: fitting(name, rows, render, max_prompt_tokens) for name, rows in self._rows.items()}
        self._prompts = {name: found.prompts for name, found in self._fitting.items()}
        total = math.fsum(source.weight for source in sources)
        self._share = {source.name: source.weight / total for source in sources}
        self._taken = dict.fromkeys(self._rows, 0)
        self._order: dict[str, tuple[int, list[int]]] = {}  # source -> (epoch, its shuffle)
        self._fingerprint: dict[str, Any] = {"seed": seed, "max_prompt_tokens": max_prompt_tokens}
        for name, rows, weight in sources:
            self._fingerprint |= {
                f"{name}.weight": weight,
                f"{name}.rows": digest((row.id, row.question, row.gold) for row in rows),
                f"{name}.prompts": digest((kept.id, kept.text, list(kept.tokens)) for kept in self._prompts[name]),
            }

    def __len__(self) -> int:
        """Different prompts over all sources, those left out not counted."""
        return sum(map(len, self._prompts.values()))

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts."""
        return [self._next() for _ in range(n)]

    def metrics(self) -> dict[str, float]:
        """``data/{source}/num_rows``, ``num_without_gold`` and ``num_too_long`` (left out), ``epoch`` (passes)."""
        return {
            key: float(value)
            for name, rows in self._rows.items()
            for key, value in (
                (f"data/{name}/num_rows", len(rows)),
                (f"data/{name}/num_without_gold", self._fitting[name].num_without_gold),
                (f"data/{name}/num_too_long", self._fitting[name].num_too_long),
                (f"data/{name}/epoch", self._taken[name] / len(self._prompts[name])),
            )
        }

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs, as JSON: prompts taken per source, and the fingerprint of the data."""
        return {"taken": dict(self._taken), "fingerprint": dict(self._fingerprint)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was written: the next prompts are the ones that would have come then.

        Raises:
            CheckpointError: a state of other rows, prompts, weights, seed or length limit; the message names which.
        """
        taken, saved = state.get("taken"), state.get("fingerprint")
        if not isinstance(taken, Mapping) or not isinstance(saved, Mapping):
            raise CheckpointError(f"the data cursor has keys {sorted(state)}; expected taken and fingerprint")
        changes = differences(saved, self._fingerprint)
        if changes:
            raise CheckpointError(
                f"the data are not those of the checkpoint: {'; '.join(changes)}. Resume with the same data, or start "
                "a new run in another folder"
            )
        if set(taken) != set(self._taken) or any(type(count) is not int or count < 0 for count in taken.values()):
            raise CheckpointError(
                f"the data cursor is {dict(taken)}; expected a count per source {sorted(self._taken)}"
            )
        self._taken = {name: taken[name] for name in self._taken}

    def _next(self) -> Prompt:
        total = sum(self._taken.values()) + 1
        name = max(self._share, key=lambda source: self._share[source] * total - self._taken[source])
        epoch, place = divmod(self._taken[name], len(self._prompts[name]))
        if self._order.get(name, (None,))[0] != epoch:
            ids = [kept.id for kept in self._prompts[name]]  # they hold the source's name
            self._order[name] = epoch, shuffled(ids, f"{self._seed}/{epoch}")
        self._taken[name] += 1
        return self._prompts[name][self._order[name][1][place]].prompt()


def held_out(
    name: str, rows: list[Row], render: Render, *, max_prompt_tokens: int, limit: int | None, seed: int
) -> HeldOut:
    """An evaluation set: all rows in their own order, or with a ``limit`` the first that many of a seeded shuffle.

    The limit counts rows before the length filter, so two models with different tokenizers are given the same rows;
    a smaller limit gives a beginning of a larger one.

    Raises:
        DataError: a bad name, no rows, a limit below 1, no prompt left.
    """
    check_sources([Source(name, rows, 1.0)])
    if limit is not None and limit < 1:
        raise DataError(f"held-out set {name!r} has limit {limit}; expected at least 1, or null for all rows")
    chosen = rows if limit is None else [rows[i] for i in shuffled([row.id for row in rows], f"{seed}/{name}")[:limit]]
    found = fitting(name, chosen, render, max_prompt_tokens)
    return HeldOut(
        name=name,
        prompts=tuple(kept.prompt() for kept in found.prompts),
        num_rows=len(rows),
        num_without_gold=found.num_without_gold,
        num_too_long=found.num_too_long,
    )


def fitting(name: str, rows: list[Row], render: Render, max_prompt_tokens: int) -> Fitting:
    """The rendered prompts that have a gold answer and at most ``max_prompt_tokens`` tokens."""
    graded = [row for row in rows if row.gold is not None]
    if not graded:
        raise DataError(f"none of the {len(rows)} rows of {name!r} has a gold answer; check answer and gold_pattern")
    kept, shortest = [], None
    for row in graded:
        try:
            text, tokens = render(row.question)
        except DataError as error:
            raise DataError(f"{row.source}: {error}") from error
        if not tokens:
            raise DataError(f"{row.source}: the prompt has no tokens; expected at least one to continue from")
        if shortest is None or len(tokens) < shortest[0]:
            shortest = len(tokens), row.source
        if len(tokens) <= max_prompt_tokens:
            kept.append(Rendered(f"{name}/{row.id}", text, row.question, array("I", tokens), row.gold, name))
    if not kept and shortest is not None:
        raise DataError(
            f"all {len(graded)} prompts of {name!r} are longer than max_prompt_tokens={max_prompt_tokens}; the "
            f"shortest has {shortest[0]} tokens ({shortest[1]}). Raise max_prompt_tokens or use a shorter template"
        )
    return Fitting(kept, len(rows) - len(graded), len(graded) - len(kept))


def shuffled(ids: Sequence[str], key: str) -> list[int]:
    """Positions of ``ids`` in the order of sha256(key, id): the same on every machine and Python version.

    >>> shuffled(["a", "b", "c"], "seed 0") == shuffled(["a", "b", "c"], "seed 0")
    True
    """
    return sorted(range(len(ids)), key=lambda i: hashlib.sha256(f"{key}\0{ids[i]}".encode()).digest())


def digest(records: Iterable[Any]) -> str:
    """sha256 of the records as JSON lines."""
    total = hashlib.sha256()
    for record in records:
        total.update(json.dumps(record).encode() + b"\n")
    return total.hexdigest()


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; prompts are not named where their rows differ already."""
    changed = [key for key in sorted({*saved, *now}) if saved.get(key) != now.get(key)]
    words = []
    for key in changed:
        name, _, part = key.rpartition(".")
        if key not in now or key not in saved:
            if part == "rows":
                words.append(f"source {name!r} is {'gone' if key not in now else 'new'}")
        elif part == "rows":
            words.append(f"the rows of {name!r} changed")
        elif part == "prompts":
            if f"{name}.rows" not in changed:
                words.append(f"template, tokenizer or length limit give other prompts for {name!r} from the same rows")
        else:
            words.append(f"{key} was {saved[key]!r} and is {now[key]!r}")
    return words or [f"fingerprint keys {changed}"] if changed else []


def check_sources(sources: Sequence[Source]) -> None:
    """Refuse sources that have no usable name, no rows, equal row ids or no positive weight."""
    if not sources:
        raise DataError("no data sources are given; expected at least one")
    names = [source.name for source in sources]
    for name, rows, weight in sources:
        if SOURCE_NAME.fullmatch(name) is None:
            raise DataError(f"data source name {name!r}; expected letters, digits and _ . - only")
        if names.count(name) > 1:
            raise DataError(f"{names.count(name)} data sources are named {name!r}; expected different names")
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(f"data source {name!r} has weight {weight}; expected above 0 (leave out what is not used)")
        unique(rows, name)
