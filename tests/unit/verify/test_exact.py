from __future__ import annotations

import pytest

from rlprm.verify.exact import verify


@pytest.mark.parametrize(
    ("gold", "response", "options", "outcome"),
    [
        ("7", "7", {}, 1.0),
        ("7", " 7\n", {}, 1.0),
        ("7", " 7\n", {"strip": False}, 0.0),
        ("7", "17", {}, 0.0),
        ("7", "", {}, 0.0),
        ("", "", {}, 0.0),
        ("", "  ", {"pattern": "( +)"}, 0.0),
        ("Paris", "paris", {}, 0.0),
        ("Paris", "paris", {"casefold": True}, 1.0),
        ("a b", "ab", {"spaces": False}, 1.0),
        ("caf\u00e9", "cafe\u0301", {}, 1.0),  # composed and decomposed forms of one word
        ("2", "A: 1\nA: 2", {"pattern": r"A: (\d)"}, 1.0),
        ("2", "A: 1\nA: 2", {"pattern": r"A: (\d)", "which": "first"}, 0.0),
        ("2", "A: 1\nA: 2", {"pattern": r"A: (\d)", "which": "only"}, 0.0),
        ("2", "A: 2", {"pattern": r"A: (\d)", "which": "only"}, 1.0),
        ("2", "no answer, 2", {"pattern": r"A: (\d)"}, 0.0),
        ("42", "x 42 y", {"pattern": r"\d+"}, 1.0),
    ],
)
def test_exact(gold, response, options, outcome):
    assert verify(gold, response, "", **options)[0] == outcome


def test_unknown_choice():
    with pytest.raises(ValueError, match="which is 'any'"):
        verify("7", "7", "", which="any")
