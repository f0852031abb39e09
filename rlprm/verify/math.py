r"""Maths answers: is the response's final answer equal to the gold answer?

The policy, in the order in which it is applied:

*Which answer counts.* The response is cut at the first end-of-turn marker, an echo of the prompt at its start is
dropped, and after a ``</think>`` only what follows it is read. Then the first rule that finds something wins: (1) the
last ``\boxed{}`` (boxes joined by nothing but "and", "or", a comma are one list; a box cut off before it closes is no
answer); (2) the text after the last ``####``; (3) the line after the last "answer is", "answer:" or "A:"; (4) a
response that is one bare expression; (5) the last formula or number. ``anchor="boxed"`` stops after (1),
``anchor="marked"`` after (3). Gold answers may be bare, ``#### 42``, ``\boxed{42}`` or text with ``$...$``.

*Numbers* are compared exactly, as rationals: 0.5 = 1/2 = ``\frac{1}{2}``, 5 is not 5.0000001. A decimal may stand for a
value that has no finite decimal form (1/3, pi) when it agrees to 6 decimals and to a relative 1e-5. Thousands: 1,234
and 1 234 and ``1{,}234`` are 1234, "32, 349" with a space is a list. In the response alone, "2,74" may be a decimal
comma.
*Percent, currency and units* do not change the number: 10 % = 10 = $10 = 10 cm. If the sign is written on one side
only, 10 % is also 0.10; 0.05 is never 5. Two different units are not converted, and not compared.
*Number bases*: ``204_5`` equals 204 (the base is implied by the question) but not ``204_6``.
*Several values*: "5 or 6", "5, 6" for the gold answer 5 is a hedge and wrong, "1/2 or 0.5" for 1/2 is right. Lists are
sets: order does not matter; tuples and intervals keep theirs.
*Words* are compared without case, ``\text{}``, brackets and full stop; single letters (choices, variables) keep theirs.
*Equations*: ``x = 5`` equals 5; of ``a = b = 5`` the last counts; what follows ``\approx`` is dropped.
*Digits* of every script (full width, Arabic-Indic) are digits. An empty answer is wrong, and so is one more than 1,000
characters longer or 25 brackets deeper than the gold answer, or a number of more than 10^5 digits where the gold answer
is much shorter.

What ``math_verify`` accepts is checked once more numerically with 30 digits, relative to the size of the value, because
its own comparison rounds to 6 decimals absolutely (2^-221 = 2^-220). No text is ever evaluated as code: of its parsers
only the LaTeX grammar is used. There is no time limit in here: some answers take for ever, which is what
:class:`rlprm.verify.pool.VerifierPool` is for.
"""

from __future__ import annotations

import functools
import logging

from math_verify import LatexExtractionConfig, parse
from math_verify import verify as equivalent

from rlprm.verify import answers, numbers, numeric

CANARIES = [
    ("42", r"so \boxed{42}", 1.0),
    ("#### 1,234", r"\boxed{1234}", 1.0),
    (r"\frac{\sqrt{3}}{3}", r"\boxed{\frac{1}{\sqrt{3}}}", 1.0),
    ("5", r"\boxed{5 \text{ or } 6}", 0.0),
    (r"2^{-220}", r"\boxed{2^{-221}}", 0.0),
    ("42", "", 0.0),
]
ROOM = 1000  # characters an answer may be longer than the gold one
DEPTH = 25  # brackets an answer may be nested deeper than the gold one; the parser's time grows exponentially with it


def verify(gold: str, response: str, prompt: str, *, anchor: str = "any") -> tuple[float, str]:
    r"""1 iff the final answer of ``response`` equals ``gold`` under the written policy of this module.

    >>> verify("#### 1,234", r"It is \boxed{1234}.", "")
    (1.0, "'1234' equals the gold answer")
    >>> verify("5", "The answer is 5 or 6.", "")
    (0.0, "'5 or 6' offers 2 values, the gold answer has one")

    Raises:
        ValueError: ``anchor`` is not any, marked or boxed, or the gold answer is empty.
    """
    wanted = answers.gold_answer(gold)
    if not wanted:
        raise ValueError(f"the gold answer {gold[:80]!r} holds no answer; correct or drop this row of the data")
    found = answers.final_answer(response, prompt, anchor)
    if not found:
        return 0.0, "no answer found"
    if len(found) > len(wanted) + ROOM:
        return 0.0, f"an answer of {len(found)} characters is not compared"
    if answers.depth(found) > answers.depth(wanted) + DEPTH:
        return 0.0, "an answer nested so deeply is not compared"
    shown = repr(found if len(found) <= 80 else found[:77] + "...")
    offered = _alternatives(wanted, found)
    if len(offered) > 1:
        # The same value written twice ("15 39/40 or 639/40") commits to it; anything else is a hedge.
        if len(offered) <= 4 and all(_equal(wanted, value) for value in offered):
            return 1.0, f"{shown} equals the gold answer, in each of {len(offered)} ways"
        return 0.0, f"{shown} offers {len(offered)} values, the gold answer has one"
    if _equal(wanted, found):
        return 1.0, f"{shown} equals the gold answer"
    return 0.0, f"{shown} differs from the gold answer"


def _alternatives(wanted: str, found: str) -> list[str]:
    """The values the response offers where the gold answer is one value; one entry if it is as definite as the gold."""
    if answers.is_several(wanted) or numbers.read(found, comma_is_decimal=True) is not None:
        return [found]
    return answers.values(found)


def _equal(wanted: str, found: str) -> bool:
    plainly = _plainly_equal(wanted, found)
    return _symbolically_equal(wanted, found) if plainly is None else plainly


def _plainly_equal(wanted: str, found: str) -> bool | None:
    """The verdict where both sides are plain numbers or words; None if it takes algebra to tell."""
    gold, answer = numbers.read(wanted), numbers.read(found, comma_is_decimal=True)
    if gold is not None and answer is None:
        answer = numbers.read(found.rpartition("=")[2])
    if gold is not None and answer is not None:
        return numbers.equal(gold, answer)
    gold_word, word = answers.word(wanted), answers.word(found)
    if gold_word and word:
        if gold_word == word:
            return True
        if answers.is_prose(wanted) or answers.is_prose(found):
            return False
    return True if answers.squeeze(wanted) == answers.squeeze(found) else None


def _symbolically_equal(wanted: str, found: str) -> bool:
    gold, answer = _parse(wanted), _parse(found)
    # Formulas against formulas; the text that the parser appends as a fallback is compared by the caller already.
    pairs = ((g, a) for g in gold for a in answer if not isinstance(g, str) and not isinstance(a, str))
    # A tower of powers would be evaluated exactly, for ever: an answer so much longer than the gold one is not it.
    return any(
        not numeric.is_huge(a, g)
        and equivalent(g, a, timeout_seconds=None, raise_on_error=True)
        and not numeric.contradicts(g, a)
        for g, a in pairs
    )


@functools.lru_cache(maxsize=256)
def _parse(answer: str) -> tuple[object, ...]:
    """Sympy readings of one answer; cached, because the responses of a group share their gold answer."""
    # It warns once per process that no time limit is set: the pool has one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    return tuple(parse(rf"$\boxed{{{answers.for_parser(answer)}}}$", config, parsing_timeout=None, raise_on_error=True))
