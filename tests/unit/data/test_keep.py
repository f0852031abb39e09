from __future__ import annotations

import pytest

from rlprm.data.keep import accuracy_band, everything, mixed
from tests.unit.made import verified


def group(*outcomes):
    return [verified((1,), outcome, sample=number) for number, outcome in enumerate(outcomes)]


@pytest.mark.parametrize(
    ("outcomes", "kept"),
    [
        ((1.0, 0.0), True),
        ((1.0, 1.0, 1.0, 0.0), True),  # an accuracy of 0.75; a band of 0.8 keeps it, one of 0.7 does not
        ((1.0, 1.0), False),
        ((0.0, 0.0), False),
        ((0.5, 0.5), False),  # graded: in the middle of any band, and nothing to compare
        ((0.5, 0.6, None), True),
        ((1.0, None), False),
        ((None, None), False),
        ((), False),
    ],
)
def test_mixed_keeps_what_can_be_compared(outcomes, kept):
    assert mixed(group(*outcomes)) is kept


def test_no_band_says_what_mixed_says_of_graded_outcomes():
    assert accuracy_band(group(0.5, 0.5), low=0.01, high=0.99)
    assert everything(group(0.5, 0.5))
    assert not mixed(group(0.5, 0.5))
