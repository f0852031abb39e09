"""Labelled solutions: exact labels of the embedded task, and files with columns of any name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlprm.data.labelled import chain_arithmetic, jsonl
from rlprm.data.tasks.chain_arithmetic import split_of
from rlprm.errors import ConfigError, DataError

TASK: dict[str, Any] = {
    "modulus": 7, "operations": [6, 6], "operators": "+-*", "split": "train", "size": 400, "seed": 0,
    "misconceptions_seed": 0, "share": 0.0, "probability": 0.0, "mistakes": 0.0, "slips": 0.0,
}  # fmt: skip


def wrong(**changes: Any) -> float:
    labels = [label for each in chain_arithmetic(**{**TASK, **changes}) for label in each.labels]
    assert set(labels) <= {0, 1}
    return labels.count(0) / len(labels)


def test_without_mistakes_every_step_is_right():
    assert wrong() == 0.0


def test_each_kind_of_mistake_has_its_share():
    # 2400 lines: half a standard deviation of a share is at most 0.005
    assert wrong(mistakes=0.3) == pytest.approx(0.3, abs=0.03)
    assert wrong(slips=0.2) == pytest.approx(0.2, abs=0.03)
    assert wrong(share=0.45, probability=0.65) == pytest.approx(0.45 * 0.65, abs=0.05)
    assert wrong(share=0.45, probability=0.65, mistakes=1.0) == 1.0


def test_steps_are_lines_of_the_response_and_repeat():
    first, second = (chain_arithmetic(**{**TASK, "mistakes": 0.5, "size": 5}) for _ in range(2))
    assert first == second
    for each in first:
        assert len(each.steps) == len(each.labels) == 6
        assert [step.endswith("\n") for step in each.steps] == [True] * 5 + [False]


def test_a_wrong_value_is_carried_on():
    for each in chain_arithmetic(**{**TASK, "mistakes": 0.5, "size": 50}):
        for before, after in zip(each.steps[:-1], each.steps[1:], strict=True):
            assert after[0] == before.strip()[-1]


def test_splits_share_no_problem():
    for split in ("train", "test"):
        assert {split_of(each.question) for each in chain_arithmetic(**{**TASK, "split": split, "size": 30})} == {split}


@pytest.mark.parametrize("name", ["probability", "mistakes", "slips"])
def test_chances_outside_their_range_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is 1.5; expected a chance"):
        chain_arithmetic(**{**TASK, name: 1.5})


def file(where: Path, *records: Any) -> str:
    path = where / "solutions.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def read(path: str, **names: str):
    return jsonl(path=path, **{"question": "problem", "steps": "steps", "label": "label", **names})


def test_processbench_names_the_first_wrong_step(tmp_path: Path):
    rows = [{"problem": "q", "steps": ["a", "b", "c"], "label": label} for label in (1, -1, 0)]
    found = read(file(tmp_path, *rows))
    assert [each.labels for each in found] == [(1, 0, -1), (1, 1, 1), (0, -1, -1)]
    assert (found[0].question, found[0].steps) == ("q", ("a", "b", "c"))


def test_a_label_per_step(tmp_path: Path):
    rows = [
        {"prompt": "q", "completions": ["a", "b"], "labels": labels} for labels in ([True, False], [1, -1], [None, 0])
    ]
    found = read(file(tmp_path, *rows), question="prompt", steps="completions", label="labels")
    assert [each.labels for each in found] == [(1, 0), (1, -1), (-1, 0)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"problem": 3, "steps": ["a"], "label": 0}, "column 'problem' holds no text"),
        ({"problem": "q", "steps": "a", "label": 0}, "column 'steps' holds no list of texts"),
        ({"problem": "q", "steps": [], "label": -1}, "column 'steps' holds no list of texts"),
        ({"problem": "q", "steps": ["a"]}, r"there is no column 'label' \(columns: problem, steps\)"),
        ({"problem": "q", "steps": ["a"], "label": 1}, "column 'label' holds 1 for 1 steps"),
        ({"problem": "q", "steps": ["a"], "label": -2}, "column 'label' holds -2 for 1 steps"),
        ({"problem": "q", "steps": ["a"], "label": True}, "column 'label' holds True for 1 steps"),
        ({"problem": "q", "steps": ["a", "b"], "label": [1]}, r"column 'label' holds \[1\] for 2 steps"),
        ({"problem": "q", "steps": ["a"], "label": ["good"]}, r"column 'label' holds \['good'\] for 1 steps"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, record, message):
    good = {"problem": "q", "steps": ["a"], "label": 0}
    with pytest.raises(DataError, match=rf"solutions.jsonl:2: {message}"):
        read(file(tmp_path, good, record))


def test_a_file_without_solutions_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="holds no solution"):
        read(file(tmp_path))
