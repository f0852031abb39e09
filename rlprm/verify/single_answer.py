r"""Exactly one final answer in the required form, and nothing after it (the constraint under which SPARK pays a verdict).

Without it a policy learns to append a second answer, or a solved problem of its own choice, that a judge likes better.
"""

from __future__ import annotations

import re

CANARIES = []  # the form is an option, so no pair holds for all of them
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is consumed with its backslash
# what closes the sentence or the formula that holds the answer
_CLOSING = re.compile(r"(?:[\s$.*]|\\\)|\\\]|</s>|<\|(?:im_end|endoftext|eot_id|end_of_text)\|>)*")


def verify(gold: str, response: str, prompt: str, *, pattern: str | None) -> tuple[float, str]:
    r"""1 iff the answer occurs once and only white space, ``$``, ``.``, ``*``, ``\)``, ``\]`` or an end marker follow it.

    ``pattern`` null: the answer is one ``\boxed{}`` that is closed and not empty. Otherwise it is what the regular
    expression matches. ``gold`` and ``prompt`` are not read: whether the answer is right is another reward's matter.

    >>> verify("", "So $\\boxed{4}$.", "", pattern=None)
    (1.0, 'one answer, at the end')
    >>> verify("", "\\boxed{4} or \\boxed{5}", "", pattern=None)[1], verify("", "\\boxed{4} Next, 1+1", "", pattern=None)[1]
    ('2 answers, expected one', "'Next, 1+1' follows the answer")

    Raises:
        ValueError: ``pattern`` is no regular expression.
    """
    spans = [match.span() for match in re.finditer(_BOX if pattern is None else pattern, response)]
    if len(spans) != 1:
        return 0.0, f"{len(spans)} answers, expected one"
    begin, end = spans[0]
    if pattern is None:
        begin, end = end, _close(response, end)
        if end < 0:
            return 0.0, "the box is never closed"
        if not response[begin : end - 1].strip():
            return 0.0, "the box is empty"
    rest = response[end:]
    if _CLOSING.fullmatch(rest) is None:
        return 0.0, f"{rest.strip()[:40]!r} follows the answer"
    return 1.0, "one answer, at the end"


def _close(text: str, begin: int) -> int:
    """Just after the brace that closes the one opened before ``begin``; -1 where there is none."""
    depth = 1
    for match in _BRACE.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return -1
