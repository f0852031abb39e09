"""Verifiers of worked solutions, single answers, step forms and code."""

from __future__ import annotations

import json
import os
import time

import pytest

from rlprm.verify.pool import VerifierPool, check_canaries
from rlprm.verify.python_blocks import compiles, runs
from rlprm.verify.single_answer import verify as single
from rlprm.verify.step_form import verify as form
from rlprm.verify.worked_steps import CANARIES
from rlprm.verify.worked_steps import verify as worked

MATH = {"otherwise": "rlprm.verify.math.verify", "options": {"anchor": "any"}}
TEXT = {**MATH, "fill": "text", "order": "share"}


def block(code):
    return f"```python\n{code}\n```\n"


def of_steps(check, *steps, **settings):
    return check("", json.dumps(steps), "", **settings)[2]


@pytest.mark.parametrize(
    ("gold", "response", "expected"),
    [
        ("fill\n3+5=1", "3 + 5 = 1\n", 1.0),
        ("fill\n3+5=1", "2. 3+5=1", 1.0),
        ("fill\n3+5=1", "3+5=1\n1*2=2", 0.0),  # a surplus line
        ("fill\na\nb", "b\na", 0.0),
        ("fill\na\nb", "a", 0.0),
        ("fill\na", "a b\n</think>\nA", 1.0),
        ("order\na\nb\nc", "a\nb\nc", 1.0),
        ("order\na\nb\nc", "c\nb\na", 1 / 3),
        ("order\na\nb\nc", "a\nb\nc\nd", 3 / 4),
        ("order\na\nb\nc", "", 0.0),
        ("12", "The answer is 12.", 1.0),
        ("12", "The answer is 13.", 0.0),
    ],
)
def test_worked_steps(gold, response, expected):
    assert worked(gold, response, "", **TEXT)[0] == pytest.approx(expected)


def test_worked_steps_by_number_and_all_or_nothing():
    rules = {**MATH, "fill": "last_number", "order": "exact"}
    gold = "fill\nShe has 16 - 7 = 9 eggs left"
    assert worked(gold, "So 16-3-4 = 9.0", "", **rules)[0] == 1.0
    assert worked(gold, "So 16-3-4 = 8", "", **rules)[0] == 0.0
    assert worked("fill\nno number", "none here", "", **rules)[0] == 0.0
    assert worked("order\na\nb\nc", "a\nc\nb", "", **rules)[0] == 0.0


def test_canaries_hold_and_the_other_task_keeps_its_step_labels():
    for gold, response, expected in CANARIES:
        assert worked(gold, response, "", **TEXT)[0] == expected
    chain = {"otherwise": "rlprm.data.tasks.chain_arithmetic.verify", "options": {}, "fill": "text", "order": "share"}
    assert worked("2 mod 7", "3+5=4\n4*2=1", "3+5*2\n", **chain)[2] == (0, 1)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}.", 1.0),
        (r"so $\boxed{a\}b}$", 1.0),
        (r"\[\boxed{4}\]</s>", 1.0),
        (r"\boxed{4} \boxed{4}", 0.0),
        (r"\boxed{4}. Now another problem: 1+1", 0.0),
        (r"\boxed{4", 0.0),
        (r"\boxed{ }", 0.0),
        ("4", 0.0),
    ],
)
def test_single_answer(response, expected):
    assert single("", response, "", pattern=None)[0] == expected


def test_single_answer_by_pattern():
    assert single("", "#### 4\n", "", pattern=r"#### \d+")[0] == 1.0
    assert single("", "#### 4\n#### 5", "", pattern=r"#### \d+")[0] == 0.0


def test_form_of_steps():
    assert of_steps(form, " 1+1=2\n", "1+1=2 x", "", pattern=r"\d\+\d=\d") == (1, 0, 0)
    with pytest.raises(ValueError, match="JSON list of texts"):
        form("", '{"a": 1}', "", pattern="a")


def test_code_compiles_or_not_and_may_cross_steps():
    assert of_steps(compiles, block("x = 1"), "text\n", block("x = ("), "~~~") == (1, -1, 0, -1)
    assert of_steps(compiles, "```py\nx = 1\n", "y = 2\n```\n") == (-1, 1)
    assert of_steps(compiles, "```python\nx = 1\n") == (-1,)  # never closed: no block yet
    # two blocks in a step: both must be fine
    assert of_steps(compiles, block("x = (") + block("x = 1")) == (0,)


def test_code_runs_after_what_ran_before_it(tmp_path):
    limits = {"seconds": 5.0, "memory_mb": 512}
    found = of_steps(
        runs, block("x = 2"), block("x = x / 0"), block("assert x == 2"), block("import sys\nsys.exit(0)"), **limits
    )
    assert found == (1, 0, 1, 0)
    # it sees no environment and its folder is gone afterwards
    os.environ["RLPRM_SECRET_FOR_TEST"] = "1"
    try:
        seen = "import os\nassert 'RLPRM_SECRET_FOR_TEST' not in os.environ\n"
        seen += f"open({str(tmp_path / 'where')!r}, 'w').write(os.getcwd())"
        assert of_steps(runs, block(seen), **limits) == (1,)
    finally:
        del os.environ["RLPRM_SECRET_FOR_TEST"]
    assert not os.path.exists((tmp_path / "where").read_text())


def test_code_that_hangs_eats_memory_or_leaves_children_is_stopped(tmp_path):
    begin = time.monotonic()
    assert of_steps(runs, block("while True: pass"), seconds=1.0, memory_mb=512) == (0,)
    assert time.monotonic() - begin < 4
    assert of_steps(runs, block("x = bytearray(10**9)"), seconds=5.0, memory_mb=256) == (0,)
    mark = tmp_path / "child"
    forks = f"import os, time\nif os.fork() == 0:\n    time.sleep(1.5)\n    open({str(mark)!r}, 'w')\n    os._exit(0)\n"
    assert of_steps(runs, block(forks), seconds=5.0, memory_mb=512) == (1,)
    time.sleep(2)
    assert not mark.exists()  # the child was killed with its parent's group


def test_code_rules_work_in_the_pool_and_their_canaries_hold():
    for rule in ("rlprm.verify.python_blocks.compiles",):
        with VerifierPool(rule, workers=1, timeout_s=20.0, memory_mb=1024) as pool:
            assert check_canaries(pool) == 2
            assert pool.judge_many([("", json.dumps([block("x = 1"), "a"]), "")])[0].steps == (1, -1)
