"""Tasks out of worked solutions: seeded, verifiable, and never given away by the prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlprm.data.tasks.chain_arithmetic import build_tokenizer
from rlprm.data.tasks.masked_steps import WorkedProblems, check_kind, worked_jsonl
from rlprm.errors import ConfigError
from rlprm.verify.worked_steps import verify

CHAIN = {"modulus": 7, "operations": [4, 4], "operators": "+-*", "split": "train", "size": 50, "seed": 1}
RULES = {
    "otherwise": "rlprm.data.tasks.chain_arithmetic.verify",
    "options": {},
    "fill": "text",
    "order": "share",
}
TEXT = {
    "question": "question",
    "solution": "answer",
    "end": "^####",
    "remove": "<<[^<>]*>>",
    "format": "{question}|{steps}|",
    "mask": "[?]",
    "seed": 0,
}
GSM8K = Path(__file__).resolve().parents[3] / "data/gsm8k_small/train.jsonl"


def test_hidden_lines_are_the_gold_and_put_back_they_are_the_solution():
    task = WorkedProblems(**CHAIN, kind="fill", hide=2)
    for index in range(len(task)):
        question, gold = task[index]
        expression, *shown = question.removesuffix("\n\n").split("\n")
        hidden = gold.split("\n")[1:]
        assert gold.startswith("fill\n")
        assert shown.count("=") == len(hidden) == 2
        filled = iter(hidden)
        lines = "\n".join(next(filled) if line == "=" else line for line in shown)
        answer = lines.rpartition("=")[2]
        outcome, _, steps = verify(f"{answer} mod 7", lines, f"{expression}\n", **RULES)
        assert (outcome, set(steps)) == (1.0, {1})


def test_shuffled_lines_are_never_in_order_and_the_gold_is():
    task = WorkedProblems(**CHAIN, kind="order", hide=None)
    for index in range(len(task)):
        question, gold = task[index]
        shown, right = question.removesuffix("\n\n").split("\n")[1:], gold.split("\n")[1:]
        assert sorted(shown) == sorted(right)
        assert shown != right
        assert verify(gold, "\n".join(right) + "\n", question, **RULES)[0] == 1.0
        assert verify(gold, "\n".join(shown), question, **RULES)[0] < 1.0


def test_tasks_repeat_and_the_alphabet_of_the_embedded_task_spells_them():
    task, again = (WorkedProblems(**CHAIN, kind="fill", hide=1) for _ in range(2))
    assert [task[i] for i in range(5)] == [again[i] for i in range(5)]
    tokenizer = build_tokenizer()
    for kind, hide in (("fill", 1), ("order", None)):
        question, _ = WorkedProblems(**CHAIN, kind=kind, hide=hide)[0]
        assert tokenizer.decode(tokenizer(question)["input_ids"]) == question


def test_gsm8k_solutions_become_both_tasks():
    filled = worked_jsonl(str(GSM8K), **TEXT, kind="fill", hide=1)
    ordered = worked_jsonl(str(GSM8K), **TEXT, kind="order", hide=None)
    first = json.loads(GSM8K.read_text(encoding="utf-8").splitlines()[0])
    assert filled[0].question.startswith(first["question"])
    assert len(filled) == len(ordered) == 16
    for row in filled:
        if row.gold is not None:
            assert "<<" not in row.question + row.gold
            assert "####" not in row.question
            assert row.question.count("[?]") == 1
            assert row.gold.split("\n")[1] not in row.question.partition("|")[2].split("\n")
    assert any(row.gold is not None for row in filled)


def test_solutions_with_too_few_steps_make_no_prompt(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"question": "1+1?", "answer": "1+1=2\\n#### 2"}\n{"question": "q", "answer": "a\\n\\nb  c\\n#### 2\\nlater"}\n'
    )
    rows = worked_jsonl(str(file), **TEXT, kind="order", hide=None)
    assert [row.gold for row in rows] == [None, "order\na\nb c"]
    assert rows[1].question == "q|b c\na|"


@pytest.mark.parametrize(
    ("kind", "hide", "message"),
    [
        ("fill", None, "number of steps to hide"),
        ("fill", 4, "too few for kind fill"),
        ("order", 1, "hides nothing"),
        ("swap", None, "fill or order"),
    ],
)
def test_kinds_that_cannot_be_are_refused(kind, hide, message):
    with pytest.raises(ConfigError, match=message):
        check_kind(kind, hide, 4)


def test_problems_too_short_for_the_task_are_refused():
    with pytest.raises(ConfigError, match="the shortest problem has 4 steps"):
        WorkedProblems(**CHAIN, kind="fill", hide=4)


def test_formats_without_both_places_are_refused(tmp_path):
    for change, message in (({"format": "{question}"}, "each exactly once"), ({"end": "("}, "no regular expression")):
        with pytest.raises(ConfigError, match=message):
            worked_jsonl(str(GSM8K), **TEXT | change, kind="order", hide=None)
