"""Has each step of a response the agreed form? The response is given as a JSON list of its steps' texts."""

from __future__ import annotations

import json
import re

CANARIES = []  # the form is an option, so no pair holds for all of them


def verify(gold: str, response: str, prompt: str, *, pattern: str) -> tuple[float, str, tuple[int, ...]]:
    r"""1 per step whose whole text, white space at both ends aside, ``pattern`` matches, else 0; the outcome is all of them.

    ``gold`` and ``prompt`` are not read. Patterns are searched by backtracking: one that can match the same text in many
    ways may not end, and is then killed with its process and counted as absent.

    >>> verify("", '["1+1=2\\n", "so 3"]', "", pattern=r"\d+\+\d+=\d+")
    (0.0, '1 of 2 steps have the form', (1, 0))

    Raises:
        ValueError: the response is no JSON list of texts, or ``pattern`` is no regular expression.
    """
    labels = tuple(int(re.fullmatch(pattern, step.strip()) is not None) for step in steps_of(response))
    return float(all(labels)), f"{sum(labels)} of {len(labels)} steps have the form", labels


def steps_of(response: str) -> list[str]:
    """The texts of a JSON list.

    >>> steps_of('["a", "b"]')
    ['a', 'b']

    Raises:
        ValueError: anything else.
    """
    steps = json.loads(response)
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise ValueError(f"the response is {response[:60]!r}; expected a JSON list of texts, one per step")
    return steps
