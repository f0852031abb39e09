"""Format reward: is the response written in the agreed shape? Says nothing about whether it is right."""

from __future__ import annotations

import re

_TEXT = r"((?:(?!</?(?:think|answer)>).)+)"  # no tag inside, so a second pair of tags cannot hide in a part
PATTERN = rf"(?s)\s*<think>{_TEXT}</think>\s*<answer>{_TEXT}</answer>\s*"
CANARIES = []  # the shape is an option, so no pair holds for all of them


def verify(
    gold: str,
    response: str,
    prompt: str,
    *,
    pattern: str = PATTERN,
    whole: bool = True,
    once: tuple[str, ...] | list[str] = (),
    min_chars: int = 1,
) -> tuple[float, str]:
    r"""1 iff the response has the shape of ``pattern``; ``gold`` and ``prompt`` are not read.

    ``whole``: the pattern covers the whole response, otherwise it is found in it exactly once. Each literal in ``once``
    (a tag, say) occurs exactly once. Each group of the pattern holds at least ``min_chars`` characters,
    white space aside, so that empty tags earn nothing.

    >>> verify("", "<think>2+2</think><answer>4</answer>", "")
    (1.0, 'the format holds')
    >>> verify("", "<think> </think><answer>4</answer>", "")
    (0.0, 'part 1 has 0 characters, expected at least 1')
    >>> verify("", "x \\boxed{1} \\boxed{2}", "", pattern=r"\\boxed\{.+?\}", whole=False)
    (0.0, 'the pattern occurs 2 times, expected once')

    Raises:
        ValueError: ``pattern`` is no regular expression.
    """
    if whole:
        match = re.fullmatch(pattern, response)
        if match is None:
            return 0.0, "the response does not have the expected form"
    else:
        matches = list(re.finditer(pattern, response))
        if len(matches) != 1:
            return 0.0, f"the pattern occurs {len(matches)} times, expected once"
        match = matches[0]
    for literal in once:
        if response.count(literal) != 1:
            return 0.0, f"{literal!r} occurs {response.count(literal)} times, expected once"
    for part, text in enumerate(match.groups(), start=1):
        length = len("".join((text or "").split()))
        if length < min_chars:
            return 0.0, f"part {part} has {length} characters, expected at least {min_chars}"
    return 1.0, "the format holds"
