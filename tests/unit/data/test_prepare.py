"""Records become rows; what is left out is counted and says why."""

from __future__ import annotations

from typing import Any

import pytest

from rlprm.data.prepare import Prepared, Reading, convert, key, without_overlap, without_repeats
from rlprm.errors import ConfigError, DataError
from rlprm.verify.answers import gold_answer, last_boxes


def reading(**changes: Any) -> Reading:
    settings: dict[str, Any] = {
        **{"question": "problem", "answer": "answer", "solution": None, "gold": "text", "gold_pattern": None},
        **{"gold_remove": "", "missing_gold": "drop", "question_remove": [], "only_column": None},
        "only_values": [],
    }
    return Reading(**{**settings, **changes})


def converted(records: list[dict[str, Any]], **changes: Any) -> Prepared:
    pairs = [(f"f:{number}", record) for number, record in enumerate(records, start=1)]
    return convert(pairs, reading(**changes), boxed=last_boxes, readable=lambda gold: bool(gold_answer(gold)))


def test_the_last_box_of_a_solution_is_the_gold():
    solution = r"First \boxed{1}. Then \frac12 of it, so \boxed{\frac{1}{2}}."
    made = converted([{"problem": "p", "answer": solution}], gold="boxed", solution="answer")
    assert made.rows == [{"id": "0", "question": "p", "answer": r"\frac{1}{2}", "solution": solution}]


def test_nested_columns_of_a_chat_are_read():
    record = {"prompt": [{"content": "s"}, {"content": "1+1?"}], "reward_model": {"ground_truth": "2"}}
    made = converted([record], question="prompt.1.content", answer="reward_model.ground_truth")
    assert made.rows == [{"id": "0", "question": "1+1?", "answer": "2"}]


@pytest.mark.parametrize("answer", [None, "", "  ", "$$"])
def test_a_row_without_gold_is_counted_or_refused(answer):
    records = [{"problem": "p", "answer": answer}, {"problem": "q", "answer": "1"}]
    made = converted(records)
    assert [row["id"] for row in made.rows] == ["1"]
    assert made.dropped == {"no gold answer": 1}
    with pytest.raises(DataError, match=r"f:1: column 'answer' holds no gold answer .* set missing_gold to drop"):
        converted(records, missing_gold="refuse")


def test_what_is_no_question_or_of_another_kind_is_counted():
    records = [
        {"problem": None, "answer": "1", "ability": "math"},
        {"problem": "sort", "answer": "[]", "ability": "code"},
        {"problem": "1?", "answer": "1", "ability": "math"},
    ]
    made = converted(records, only_column="ability", only_values=["math"])
    assert (len(made.rows), made.read) == (1, 3)
    assert made.dropped == {"no question": 1, "ability is code": 1}


def test_a_column_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(DataError, match=r"f:1 has no column 'answer'; columns found: gold, problem"):
        converted([{"problem": "p", "gold": "1"}])


def test_halves_of_surrogate_pairs_are_taken_out():
    assert converted([{"problem": "a\ud800b", "answer": "1"}]).rows[0]["question"] == "ab"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question_remove": ["("]}, "question_remove '\\(' is not a regular expression"),
        ({"gold_pattern": "x"}, "has 0 groups; expected exactly one"),
        ({"only_values": ["math"]}, "only_column is None and only_values"),
        ({"gold": "boxed", "gold_pattern": "(x)"}, "gold is boxed and gold_pattern"),
    ],
)
def test_a_reading_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        reading(**changes)


def test_repeats_and_contradictions_are_counted_apart():
    rows = [{"question": q, "answer": a} for q, a in [("a?", "1"), ("A ?", "1"), ("b", "1"), ("b.", "2"), ("c", "3")]]
    made = without_repeats(Prepared(rows, 5, {"no question": 2}))
    assert [row["question"] for row in made.rows] == ["a?", "c"]
    assert made.dropped == {"no question": 2, "repeated": 1, "contradictory answers": 2}


def test_questions_of_evaluation_sets_are_taken_out_whatever_their_spacing():
    rows = [{"question": "What is $x+1$?", "answer": "2"}, {"question": "What is $x-1$?", "answer": "0"}]
    made = without_overlap(Prepared(rows, 2, {}), {"exam": frozenset({key("what is  $ x + 1 $")})})
    assert [row["answer"] for row in made.rows] == ["0"]
    assert made.dropped == {"also in exam": 1}
