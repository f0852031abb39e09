"""Verify tasks made from worked solutions (masked and shuffled steps), and every other task by its own verifier.

A gold that begins with the line ``fill`` or ``order`` lists the expected steps, one a line, as
:mod:`rlprm.data.tasks.masked_steps` writes it. Any other gold goes to the verifier that the run would have without
these tasks, so one run can mix them.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

_GOLD = re.compile(r"(fill|order)\n(.+)", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
CANARIES = [
    ("fill\n1*2=2", "1*2=2", 1.0),
    ("fill\n1*2=2", "1*2=3", 0.0),
    ("order\n3+5=1\n1*2=2", "3+5=1\n1*2=2\n", 1.0),
    ("order\n3+5=1\n1*2=2", "", 0.0),
]


def verify(
    gold: str,
    response: str,
    prompt: str,
    *,
    otherwise: str,
    options: Mapping[str, Any],
    fill: Literal["text", "last_number"],
    order: Literal["share", "exact"],
) -> tuple[Any, ...] | Any:
    r"""``fill``: 1 iff every expected step is given, in its place; ``order``: the share of places with the right step
    (``share``), or 1 iff all are right (``exact``); else what ``otherwise`` (a dotted path) says under ``options``.

    A response's steps are its lines that are not blank, after ``</think>`` where there is one. Texts are compared without
    case, white space and list numbering; with ``fill`` ``last_number`` a filled step is right when its last number is.
    A missing or surplus line is a wrong place. The paper (MR-RLVR) was not read in full: that order is paid by matching
    places, and a filled step by matching text or value, is this project's reading.

    >>> other = dict(otherwise="rlprm.verify.exact.verify", options={}, fill="text", order="share")
    >>> verify("fill\n1*2=2", "1 * 2 = 2", "", **other), verify("7", "7", "", **other)
    ((1.0, '1 of 1 steps filled'), (1.0, "'7' equals the gold answer"))
    >>> verify("order\na\nb\nc\nd", "a\nc\nb\nd", "", **other)
    (0.5, '2 of 4 places right')
    """
    task = _GOLD.fullmatch(gold)
    if task is None:
        return _other(otherwise, json.dumps(options))(gold, response, prompt)
    expected = task[2].split("\n")
    given = [line for line in response.rpartition("</think>")[2].split("\n") if line.strip()]
    read = _last_number if task[1] == "fill" and fill == "last_number" else _normal
    pairs = zip(expected, given, strict=False)
    right = sum(read(wanted) == read(found) != "" for wanted, found in pairs)
    places = max(len(expected), len(given))
    if task[1] == "fill":
        return float(right == places), f"{right} of {places} steps filled"
    return (right / places if order == "share" else float(right == places)), f"{right} of {places} places right"


@functools.cache
def _other(path: str, options: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    return functools.partial(getattr(importlib.import_module(module), name), **json.loads(options))


def _normal(line: str) -> str:
    bare = re.sub(r"^\s*(?:step\s*)?\d+\s*[.):]\s+", "", line, flags=re.IGNORECASE)
    return "".join(bare.casefold().split())


def _last_number(line: str) -> str:
    numbers = _NUMBER.findall(line.replace(",", ""))
    return numbers[-1].removesuffix(".0") if numbers else ""
