"""Exact match of an extracted answer."""

from __future__ import annotations

import re
import unicodedata

CANARIES = [("7", "7", 1.0), ("7", "8", 0.0), ("7", "", 0.0)]


def verify(
    gold: str,
    response: str,
    prompt: str,
    *,
    pattern: str = r"(?s)(.*)",
    which: str = "last",
    strip: bool = True,
    casefold: bool = False,
    spaces: bool = True,
) -> tuple[float, str]:
    r"""1 iff the answer found in ``response`` is the text of ``gold``.

    ``pattern`` is searched in the response; its first group (or the whole match) is the answer. ``which`` match counts:
    ``first``, ``last``, or ``only`` (more than one match is wrong). Both sides are put into Unicode form NFC, then, by
    option, stripped, case-folded, and (``spaces: false``) freed of white space. An empty answer is never right.

    >>> verify("Paris", "Answer: paris ", "", pattern=r"Answer:(.*)", casefold=True)
    (1.0, "'paris' equals the gold answer")
    >>> verify("Paris", "Answer: Paris or Rome", "", pattern=r"Answer:(.*)")[0]
    0.0

    Raises:
        ValueError: ``which`` is none of the three, or ``pattern`` is no regular expression.
    """
    if which not in ("first", "last", "only"):
        raise ValueError(f"which is {which!r}; expected first, last or only")
    # A pattern that can match nothing (such as the default) also matches at the end of the text: that is no answer.
    matches = [match for match in re.finditer(pattern, response) if match.group(0)]
    if not matches:
        return 0.0, "no answer found"
    if which == "only" and len(matches) > 1:
        return 0.0, f"{len(matches)} answers found, expected one"
    match = matches[0] if which == "first" else matches[-1]
    found = _normal(match.group(1 if match.re.groups else 0) or "", strip, casefold, spaces)
    if not found.strip():
        return 0.0, "the answer is empty"
    if found == _normal(gold, strip, casefold, spaces):
        return 1.0, f"{found[:80]!r} equals the gold answer"
    return 0.0, f"{found[:80]!r} differs from the gold answer"


def _normal(text: str, strip: bool, casefold: bool, spaces: bool) -> str:
    composed = unicodedata.normalize("NFC", text)
    stripped = composed.strip() if strip else composed
    folded = stripped.casefold() if casefold else stripped
    return folded if spaces else "".join(folded.split())
