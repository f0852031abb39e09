"""What can be told of sympy expressions without evaluating them exactly: their size, and whether values differ."""

from __future__ import annotations

import math

from sympy import (
    Add,
    Basic,
    Expr,
    FiniteSet,
    Float,
    Interval,
    MatrixBase,
    Mul,
    Number,
    Pow,
    Product,
    Rational,
    Sum,
    Tuple,
    binomial,
    factorial,
)

PRECISION = 30  # decimal digits
EXACT = 1e-12  # relative difference allowed between two exact expressions
ROUNDED = 1e-5  # and where one side was written as a decimal
HUGE = 1e5  # decimal digits; an exact comparison of longer numbers takes seconds to ages


def contradicts(gold: object, answer: object) -> bool:
    """True where both sides have numeric values and these differ; False where nothing can be said.

    >>> from sympy import Integer, Pow, Rational, pi
    >>> contradicts(Pow(2, -220, evaluate=False), Pow(2, -221, evaluate=False))
    True
    >>> contradicts(pi / 2, Rational(1, 2) * pi)
    False
    """
    golds, found = _elements(gold), _elements(answer)
    if golds is None or found is None or len(golds) != len(found):
        return False
    rest = list(found)
    for one in golds:
        match = next((other for other in rest if not _differ(one, other)), None)
        if match is None:
            return True
        rest.remove(match)
    return False


def _elements(value: object) -> list[Basic] | None:
    if isinstance(value, (FiniteSet, Tuple)):
        return list(value.args)
    if isinstance(value, Interval):
        return [value.start, value.end]
    if isinstance(value, MatrixBase):
        return list(value.flat())
    return [value] if isinstance(value, Expr) else None


def _differ(a: Basic, b: Basic) -> bool:
    if not isinstance(a, Expr) or not isinstance(b, Expr) or a.free_symbols or b.free_symbols:
        return False
    x, y = a.evalf(PRECISION), b.evalf(PRECISION)
    parts = [part for value in (x, y) for part in value.as_real_imag()]
    # A part that is no number (unevaluated, infinite) or has lost all its digits (precision 1) says nothing.
    if not all(part.is_number and part.is_finite and getattr(part, "_prec", 53) != 1 for part in parts):
        return False
    size = max(abs(x), abs(y))
    return bool(size > 0 and abs(x - y) > (ROUNDED if a.has(Float) or b.has(Float) else EXACT) * size)


def is_huge(answer: object, gold: object) -> bool:
    """Would comparing ``answer`` exactly take numbers far longer than :data:`HUGE` digits and than those of ``gold``?

    >>> from sympy import Pow
    >>> tower = Pow(9, Pow(9, Pow(9, 9, evaluate=False), evaluate=False), evaluate=False)
    >>> is_huge(tower, Pow(2, 100)), is_huge(Pow(2, -221, evaluate=False), Pow(2, -220)), is_huge(tower, tower)
    (True, False, False)
    """
    return digits(answer) > max(HUGE, 10 * digits(gold))


def digits(value: object) -> float:
    """Rough upper bound on the decimal digits that come up when ``value`` is evaluated exactly; symbols count one.

    >>> from sympy import Integer, factorial
    >>> digits(Integer(1000)), digits(factorial(100, evaluate=False))
    (4.0, 300.0)
    """
    if isinstance(value, Rational):
        # From the bit length, because turning a long integer into text is slow itself.
        return float(max(1, math.ceil(max(abs(value.p).bit_length(), value.q.bit_length()) * math.log10(2))))
    if not isinstance(value, Basic) or isinstance(value, Number) or not value.args:
        return 1.0
    parts = [digits(part) for part in value.args]
    if isinstance(value, Pow):
        return parts[0] * _ceiling(parts[1], value.args[1])
    if isinstance(value, (factorial, binomial)):
        return parts[0] * _ceiling(parts[0], value.args[0])
    if isinstance(value, (Sum, Product)):
        # Terms are evaluated one by one where no closed form is found.
        return max(_ceiling(digits(end), end) for limits in value.limits for end in limits[1:]) * parts[0]
    if isinstance(value, Mul):
        return sum(parts)
    return max(parts) + (1.0 if isinstance(value, Add) else 0.0)


def _ceiling(length: float, value: Basic) -> float:
    """An upper bound on the size of a value of so many digits; exact for a plain number, 1 for what has no value."""
    if isinstance(value, Rational):
        return min(max(1.0, abs(float(value))), 1e300) if length < 300 else math.inf
    if not value.args:
        return 1.0
    return 10.0**length if length < 300 else math.inf
