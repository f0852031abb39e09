"""Plain numbers in answers, read exactly: integers, decimals, fractions, mixed numbers, percent, number bases."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 1000  # longer numerals are left to the algebra system and the pool's clock
DECIMALS = Fraction(1, 10**6)
RELATIVE = Fraction(1, 10**5)

_DIGITS = r"(?:\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"([-+]?){_DIGITS}(?:[eE][-+]?\d{{1,3}})?")
_SLASH = re.compile(rf"([-+]?{_DIGITS})/({_DIGITS})")
_FRAC = re.compile(r"([-+]?)(\d*)\\[dtc]?frac(?:\{([-+]?\d+)\}|(\d))(?:\{(\d+)\}|(\d))")
_BASE = re.compile(r"([-+]?[0-9A-Za-z]+)_(?:\{(\d{1,2})\}|(\d))")
_COMMAS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_SPACES = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")
_PERCENT = re.compile(r"\s*(?:\\?%|\\?percent\b|per cent|pct\b)\s*$", re.IGNORECASE)
_UNIT = re.compile(r"(?:\\(?:text|mathrm|textrm|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?|\^\{?\\circ\}?|\\circ|°)\s*$")
_CURRENCY = re.compile(r"^([-+]?)\s*(?:\\\$|[$€£¥₹])\s*")


@dataclass(frozen=True, slots=True)
class Value:
    """A rational as it was written: ``decimal`` with a point, ``percent`` with the sign, ``base`` 0 if none."""

    value: Fraction
    decimal: bool = False
    percent: bool = False
    base: int = 0


def read(text: str, comma_is_decimal: bool = False) -> Value | None:
    r"""The number that ``text`` is as a whole, units aside; None if it is anything else.

    >>> read("1,234.50").value, read(r"918\frac{1}{2}").value, read("32, 349"), read("12%").percent
    (Fraction(2469, 2), Fraction(1837, 2), None, True)
    >>> read("2,74"), read("2,74", comma_is_decimal=True).value
    (None, Fraction(137, 50))
    """
    if len(text) > MAX_DIGITS:
        return None
    bare = _CURRENCY.sub(r"\1", text.strip())
    while (shorter := _UNIT.sub("", bare).strip()) != bare and shorter:
        bare = shorter
    without = _PERCENT.sub("", bare)
    percent = without != bare
    plain = without.strip().replace(r"\!", "").replace("{,}", ",").replace(r"\,", " ")
    if _COMMAS.fullmatch(plain) or (re.fullmatch(r"[-+]?\d{1,3}(?:, \d{3})+", plain) and r"\!" in without):
        plain = plain.replace(",", "").replace(" ", "")
    elif _SPACES.fullmatch(plain):
        plain = plain.replace(" ", "")
    elif comma_is_decimal and _DECIMAL_COMMA.fullmatch(plain):
        plain = plain.replace(",", ".")
    return _read_plain(re.sub(r"^([-+])\s+", r"\1", plain), percent)


def _read_plain(plain: str, percent: bool) -> Value | None:
    if _PLAIN.fullmatch(plain):
        return Value(Fraction(plain), "." in plain, percent)
    if match := _SLASH.fullmatch(plain):
        top, bottom = Fraction(match[1]), Fraction(match[2])
        return Value(top / bottom, False, percent) if bottom else None
    if match := _FRAC.fullmatch(plain):
        top, bottom = int(match[3] or match[4]), int(match[5] or match[6])
        if not bottom or (match[2] and top < 0):
            return None
        sign = -1 if match[1] == "-" else 1
        return Value(sign * (int(match[2] or 0) + Fraction(top, bottom)), False, percent)
    if match := _BASE.fullmatch(plain):
        base = int(match[2] or match[3])
        try:
            # The digits as written are kept as the value when no base is to be compared with.
            return Value(Fraction(int(match[1], base)), False, percent, base)
        except ValueError:
            return None
    return None


def equal(gold: Value, answer: Value) -> bool:
    """Are two numbers the same under the policy of :mod:`rlprm.verify.math`?

    >>> equal(read("1/3"), read("0.333333")), equal(read("1/3"), read("0.33")), equal(read("5"), read("5.001"))
    (True, False, False)
    >>> equal(read("10%"), read("0.1")), equal(read("0.05"), read("5")), equal(read("204_5"), read("204"))
    (True, False, True)
    """
    if bool(gold.base) != bool(answer.base):
        based, plain = (gold, answer) if gold.base else (answer, gold)
        return plain.value.denominator == 1 and _digits(based) == str(plain.value.numerator)
    if close(gold, answer):
        return True
    if gold.percent != answer.percent:
        hundredth = Fraction(1, 100)
        scaled = [Value(v.value * hundredth if v.percent else v.value, v.decimal) for v in (gold, answer)]
        return close(scaled[0], scaled[1])
    return False


def close(gold: Value, answer: Value) -> bool:
    """Equal, or a decimal that stands for a rational without a finite decimal form."""
    if gold.value == answer.value:
        return True
    if gold.decimal == answer.decimal:
        return False
    exact = answer if gold.decimal else gold
    if _finite(exact.value):
        return False
    return _near(gold.value, answer.value)


def _near(a: Fraction, b: Fraction) -> bool:
    return abs(a - b) <= min(DECIMALS, RELATIVE * max(abs(a), abs(b)))


def _finite(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _digits(based: Value) -> str:
    digits, rest = "", abs(based.value.numerator)
    while rest:
        rest, digit = divmod(rest, based.base)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return ("-" if based.value < 0 else "") + (digits or "0")
