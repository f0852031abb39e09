from __future__ import annotations

import pytest

from rlprm.verify.format import verify

BOX = {"pattern": r"\\boxed\{(.*?)\}", "whole": False}


@pytest.mark.parametrize(
    ("response", "options", "outcome"),
    [
        ("<think>a</think><answer>1</answer>", {}, 1.0),
        (" <think>a\nb</think>\n<answer>1</answer>\n", {}, 1.0),
        ("<think></think><answer>1</answer>", {}, 0.0),
        ("<think>a</think><answer> </answer>", {}, 0.0),
        ("<think>a</think>", {}, 0.0),
        ("<think>a</think><answer>1</answer> more", {}, 0.0),
        ("<think>a</think><answer>1</answer><answer>2</answer>", {}, 0.0),
        ("<think>a</think><think>b</think><answer>1</answer>", {}, 0.0),
        ("<think>short</think><answer>1</answer>", {"min_chars": 2}, 0.0),
        ("", {}, 0.0),
        (r"so \boxed{1}", BOX, 1.0),
        (r"so \boxed{1} \boxed{2}", BOX, 0.0),
        (r"so \boxed{ }", BOX, 0.0),
        ("so", BOX, 0.0),
        ("a # b", {"pattern": "(?s).*", "once": ["#"]}, 1.0),
        ("a ## b", {"pattern": "(?s).*", "once": ["#"]}, 0.0),
    ],
)
def test_format(response, options, outcome):
    assert verify("", response, "", **options)[0] == outcome
