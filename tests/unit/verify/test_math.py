from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from rlprm.verify import math as maths
from rlprm.verify.pool import VerifierPool, check_canaries

PAIRS = Path(__file__).parents[2] / "data" / "grader_pairs" / "pairs.jsonl"
SQRT = r"\frac{\sqrt{3}}{3}"


@pytest.fixture(scope="module")
def pool():
    with VerifierPool("rlprm.verify.math.verify", workers=1, timeout_s=2.5, memory_mb=1024) as shared:
        shared.judge_many([(SQRT, r"\boxed{\sqrt{3}/3}", "")] * 2)  # the parser's first formula builds its tables
        yield shared


def right(gold: str, response: str, prompt: str = "", anchor: str = "any") -> bool:
    outcome, reason = maths.verify(gold, response, prompt, anchor=anchor)
    assert outcome in (0.0, 1.0)
    assert reason
    return outcome == 1.0


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        ("42", "42"),
        ("42", r"First \boxed{7}, no: \boxed{42}."),
        ("#### 42", "6*7=42\n#### 42"),
        ("He sold 48/2 = 24.\n#### 1,234", "The total is 1234."),
        (r"\boxed{42}", "The answer is 42 apples."),
        ("42", "A: 42"),
        ("42", "**Answer:** 42"),
        ("42", "The answer is:\n\\[ 42 \\]"),
        ("42", "<think>maybe \\boxed{41}</think>It is \\boxed{42}"),
        ("42", "<|im_start|>assistant\n\\boxed{42}<|im_end|>\n<|im_start|>user \\boxed{1}"),
        ("12345", "12,345"),
        ("12345", "12 345"),
        ("12345", r"\boxed{12{,}345}"),
        ("12345", r"\boxed{12,\!345}"),
        ("2.74", "2,74"),
        ("+7", "The answer is +7"),
        ("10", "10%"),
        ("10%", "0.1"),
        ("0.1", r"\boxed{10\%}"),
        ("10", r"\boxed{\$10}"),
        ("10", r"\boxed{10\text{ units}}"),
        ("90", r"\boxed{90^\circ}"),
        ("0.5", r"\boxed{\frac12}"),
        ("1/3", "0.333333"),
        ("918.5", r"\boxed{918\frac{1}{2}}"),
        (SQRT, r"\boxed{\frac{1}{\sqrt{3}}}"),
        (SQRT, r"\boxed{\frac{\sqrt{3}}{3} \approx 0.577}"),
        (r"1-\frac{1}{e}", r"\boxed{1-1/\mathrm{e}}"),
        (r"\{1,2\}", r"\boxed{2, 1}"),
        ("-2,1", r"\boxed{1} and \boxed{-2}"),
        ("6", r"\boxed{6} so \boxed{6}"),
        ("639/40", r"\boxed{15\frac{39}{40}}, or \boxed{\frac{639}{40}}"),
        ("x=5", r"\boxed{5}"),
        ("5", r"\boxed{x=5}"),
        ("2", r"$17 \bmod 5 = 2$"),
        ("204_5", r"\boxed{204}"),
        (r"\text{Evelyn}", "The answer is evelyn."),
        ("C", r"\boxed{\text{(C)}}"),
        ("(1,2)", r"\boxed{\left(1, 2\right)}"),
        ("42", "\uff14\uff12"),  # full width
        ("-42", "The answer is \u2212\u0664\u0662."),  # minus sign, Arabic-Indic digits
        ("1/2", "The answer is \u00bd"),
    ],
)
def test_right_answers_in_many_clothes(gold, response):
    assert right(gold, response)


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        ("42", ""),
        ("42", "   \n"),
        ("42", r"\boxed{}"),
        ("42", "The answer is"),
        ("42", "<answer></answer>"),
        ("42", "I do not know."),
        ("42", r"\boxed{42"),  # cut off: the number may have gone on
        ("42", r"<think>\boxed{42}</think>"),
        ("5", "5 or 6"),
        ("6", "The answer is 5 or 6."),
        ("6", "The answer is 5 apples or 6 apples."),
        ("5", r"\boxed{5 \text{ or } 6}"),
        ("5", r"\boxed{5, 6}"),
        ("5", r"\boxed{5} or \boxed{6}"),
        ("5", "$5$ or $6$"),
        ("B", "A or B or C"),
        ("5", r"\boxed{\pm 5}"),
        ("2^{-220}", r"\boxed{2^{-221}}"),
        ("1/634!", r"\boxed{1/635!}"),
        (r"1+1/\mathrm{e}", r"1-1/\mathrm{e}"),
        (r"1+1/\mathrm{e}", r"\boxed{1-1/\mathrm{e}}"),
        ("5", "5.0000001"),
        ("0.0000001", "0"),
        ("0.05", "5"),
        ("0.05", r"\boxed{0.5\%}"),
        ("1/3", "0.33"),
        (r"\pi", "3.14"),
        (r"\sqrt{2}", "1.41"),
        ("204_5", r"\boxed{204_6}"),
        ("32349", r"\boxed{32, 349}"),
        ("(1,2)", r"\boxed{(2,1)}"),
        ("[0,1)", r"\boxed{(0,1)}"),
        (r"x \ge 5", r"\boxed{x \le 5}"),
        ("odd", r"\boxed{\text{oddd}}"),
        (r"\{2^{-220}, 1\}", r"\boxed{2^{-221}, 1}"),
        ("42", "42 is in the question, the answer is 7"),
    ],
)
def test_wrong_empty_and_hedged_answers(gold, response):
    assert not right(gold, response)


def test_an_echo_of_the_prompt_is_no_answer():
    assert not right("7", "What is 3 + 4, if not 7", prompt="What is 3 + 4, if not 7")
    assert right("7", "What is 3 + 4? 7", prompt="What is 3 + 4?")


def test_anchor_says_how_plainly_an_answer_must_be_marked():
    responses = {"boxed": r"\boxed{7}", "marked": "The answer is 7", "any": "so 7"}
    accepted = {
        anchor: [name for name, text in responses.items() if right("7", text, anchor=anchor)] for anchor in responses
    }
    assert accepted == {"boxed": ["boxed"], "marked": ["boxed", "marked"], "any": ["boxed", "marked", "any"]}
    with pytest.raises(ValueError, match="anchor is 'none'"):
        maths.verify("7", "7", "", anchor="none")


def test_a_gold_field_without_an_answer_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="holds no answer"):
        maths.verify(" ", "7", "")


def test_grader_pairs_of_other_projects():
    """Every shipped pair is judged as its project does, except those marked as a policy of ours: there the opposite."""
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").split("\n") if line]
    assert len(rows) > 100
    assert sum("policy" in row for row in rows) == 5
    wrong = [
        (row["gold"], row["pred"])
        for row in rows
        if right(row["gold"], row["pred"]) != (row["expected"] ^ ("policy" in row))
    ]
    assert wrong == []


def test_canaries(pool):
    assert check_canaries(pool) == len(maths.CANARIES) >= 5


def hostile(seed: int, count: int) -> list[str]:
    """Answers made to break a grader; none of them is 271828 or sqrt(3)/3."""
    rng = random.Random(seed)

    def tower() -> str:
        text = str(rng.randint(7, 99))
        for _ in range(rng.randint(3, 30)):
            text = f"{rng.randint(2, 99)}^{{{text}}}"
        return rf"\boxed{{{text}}}"

    def nested() -> str:
        opening, closing = rng.choice(["{}", "()", "[]", (r"\frac{1}{", "}"), (r"\sqrt{", "}"), (r"\boxed{", "}")])
        depth = rng.choice([30, 300, 3000])
        return rf"\boxed{{{opening * depth}6{closing * rng.choice([depth, depth - 1, 0])}}}"

    def long() -> str:
        piece = rng.choice(
            ["1", "6 ", ".", "answer is ", r"\[", r"\(6", "$", "\n", "#### ", "1,", "-", "1 or ", r"\text{", "<think>"]
        )
        return piece * (rng.randint(10_000, 100_000) // len(piece))

    def factorials() -> str:
        return rf"\boxed{{{rng.randint(10, 10**9)}{'!' * rng.randint(2, 40)}}}"

    def noise() -> str:
        signs = "0123456789+-*/^_=(){}[]$\\,. \n%&#<>|!~'\"\x00\ud800\u202ex"
        alphabet = [*signs, r"\frac", r"\boxed{", r"\text{"]
        return r"\boxed{" + "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 60)))

    def code() -> str:
        attack = rng.choice(
            ['__import__("os").system("touch {}")', "exec(\"open('{}','w')\")", r"\eval{{open('{}', 'w')}}"]
        )
        return rng.choice([r"\boxed{%s}", "The answer is %s", "#### %s", "$%s$"]) % attack.format(CANARY_FILE)

    return [rng.choice([tower, nested, long, factorials, noise, code])() for _ in range(count)]


CANARY_FILE = "/tmp/rlprm_hostile_canary"


def test_hostile_answers_never_pay_never_hang_and_leave_the_pool_whole(pool):
    before = pool.counts
    jobs = [(gold, response, "") for response in hostile(seed=0, count=120) for gold in ("271828", SQRT)]
    verdicts = pool.judge_many(jobs)
    paid = [job for job, verdict in zip(jobs, verdicts, strict=True) if verdict.outcome == 1.0]
    assert paid == []
    assert max(verdict.seconds for verdict in verdicts) < 2.5 + 1.0
    counts = {kind: count - before[kind] for kind, count in pool.counts.items()}
    assert counts["judged"] >= 0.95 * len(jobs), counts
    assert counts["crashes"] == 0, counts
    assert not Path(CANARY_FILE).exists()
    assert pool.submit("5", r"\boxed{5}", "").result().outcome == 1.0


def test_a_numeric_bomb_that_only_the_clock_can_stop_is_a_third_verdict(pool):
    verdict = pool.submit("5", r"\boxed{(x+y+z)^{900}-(x+y)^{900}}", "").result()
    assert (verdict.outcome, verdict.reason) == (None, "timeout after 2.5 s")


def test_the_verifier_needs_no_torch():
    code = (
        "import sys, rlprm.verify.math, rlprm.verify.worker;"
        "print([name for name in ('torch', 'ray', 'vllm') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
