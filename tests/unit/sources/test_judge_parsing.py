"""Only the last line, under its own marker, with exactly the entries that were asked for, is a verdict."""

from __future__ import annotations

import pytest

from rlprm.sources.judge_parsing import RIGHT_OR_WRONG, YES_OR_NO, Form, Points, Share, form_of

M = "3fa9c1d2ab"
STEPS = Form(values=RIGHT_OR_WRONG, steps=3, overall=False)
BOTH = Form(values=RIGHT_OR_WRONG, steps=2, overall=True)
WHOLE = Form(values=RIGHT_OR_WRONG, steps=0, overall=False)
RUBRIC = Form(values=Points(1, 7), steps=0, overall=False)
GRADES = Form(values=Points(0, 5), steps=2, overall=False)
QUALITY = Form(values=Share(), steps=0, overall=False)


@pytest.mark.parametrize(
    ("form", "reply", "expected"),
    [
        (STEPS, f"verdict {M}: 1=right 2=wrong 3=right", (1.0, 0.0, 1.0)),
        (STEPS, f"Step 2 is off.\n\nverdict {M}: 1=right, 2=wrong; 3=right.\n  ", (1.0, 0.0, 1.0)),
        (STEPS, f"**Verdict {M}: 1=Right 2=WRONG 3=right**", (1.0, 0.0, 1.0)),
        (STEPS, f"`verdict {M} : 1 = right 2 = right 3 = right`", (1.0, 1.0, 1.0)),
        # an earlier line says something else: it was a draft
        (STEPS, f"verdict {M}: 1=wrong 2=wrong 3=wrong\nNo.\nverdict {M}: 1=right 2=right 3=right", (1.0, 1.0, 1.0)),
        (BOTH, f"x\r\nverdict {M}: 1=right 2=right overall=wrong", (1.0, 1.0, 0.0)),
        (WHOLE, f"verdict {M}: wrong", (0.0,)),
        (RUBRIC, f"verdict {M}: 7", (1.0,)),
        (RUBRIC, f"verdict {M}: 1", (0.0,)),
        (GRADES, f"verdict {M}: 1=5 2=2", (1.0, 0.4)),
        (QUALITY, f"verdict {M}: 0.75", (0.75,)),
        (QUALITY, f"verdict {M}: 1", (1.0,)),
    ],
)
def test_a_verdict_line_is_read(form, reply, expected):
    assert form.read(M, reply) == expected


@pytest.mark.parametrize(
    ("form", "reply"),
    [
        (STEPS, ""),
        (STEPS, "   \n\n"),
        (STEPS, "All steps are right."),
        (STEPS, f"verdict {M}:"),
        (STEPS, f"verdict {M}: 1=right 2=wrong"),  # too few
        (STEPS, f"verdict {M}: 1=right 2=wrong 3=right 4=right"),  # too many
        (STEPS, f"verdict {M}: 1=right 3=right 2=wrong"),  # another order
        (STEPS, f"verdict {M}: 1=right 1=right 3=right"),  # one twice
        (STEPS, f"verdict {M}: 0=right 1=right 2=right"),  # counted from 0
        (STEPS, f"verdict {M}: right wrong right"),  # unnumbered
        (STEPS, f"verdict {M}: 1=right 2=maybe 3=right"),  # not an answer
        (STEPS, f"verdict {M}: 1=right 2=<right|wrong> 3=right"),  # the form itself
        (STEPS, f"verdict {M}: 1=right 2=wrong 3=right overall=wrong"),  # nobody asked
        (STEPS, "verdict: 1=right 2=wrong 3=right"),  # no marker
        (STEPS, "verdict ffffffffff: 1=right 2=right 3=right"),  # another marker
        (STEPS, f"verdict {M}: 1=right 2=wrong 3=right\nI hope this helps!"),  # not the last line
        (STEPS, f"so verdict {M}: 1=right 2=wrong 3=right"),  # inside a sentence
        (STEPS, f"verdict {M}: 1=right\n2=wrong\n3=right"),  # over several lines
        (BOTH, f"verdict {M}: 1=right 2=right"),  # overall is missing
        (WHOLE, f"verdict {M}: right wrong"),
        (WHOLE, f"verdict {M}: not wrong"),
        (RUBRIC, f"verdict {M}: 8"),
        (RUBRIC, f"verdict {M}: 0"),
        (RUBRIC, f"verdict {M}: -3"),
        (RUBRIC, f"verdict {M}: 6.5"),
        (RUBRIC, f"verdict {M}: 7/7"),
        (RUBRIC, f"verdict {M}: seven"),
        (RUBRIC, f"verdict {M}: " + "9" * 5000),
        (GRADES, f"verdict {M}: 1=6 2=1"),
        (QUALITY, f"verdict {M}: 1.01"),
        (QUALITY, f"verdict {M}: nan"),
        (QUALITY, f"verdict {M}: 75%"),
        (QUALITY, f"verdict {M}: -0.5"),
        (QUALITY, f"verdict {M}: 1e-3"),
    ],
)
def test_anything_else_is_no_verdict(form, reply):
    assert form.read(M, reply) is None


def test_the_place_of_a_single_word_is_that_of_the_last_line():
    form = Form(values=YES_OR_NO, steps=0, overall=False)
    reply = f"verdict {M}: no\nOn second thought:\n**verdict {M}: yes**"
    begin, end = form.span(M, reply)
    assert (reply[begin:end], begin) == ("yes", len(reply) - 5)
    assert form.span(M, f"verdict {M}: perhaps") is None


@pytest.mark.parametrize("form", [STEPS, BOTH, WHOLE, RUBRIC, GRADES, QUALITY])
def test_a_program_reads_from_the_prompt_which_line_is_wanted(form):
    assert form_of(form.line(M)) == (M, form)


def test_a_line_that_is_no_form_is_not_taken_for_one():
    assert form_of("Tell me whether it is right.") is None
    assert form_of(f"verdict {M}: 1=right") is None
