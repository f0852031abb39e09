"""Stored rollouts: what a run wrote is read back token by token, and a line that cannot be used is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlprm.data.stored import TokenExample, by_prompt, right_responses, stored, stored_shard
from rlprm.errors import DataError


def line(**changes) -> dict:
    given = {
        "step": 3,
        "group": 0,
        "version": 2,
        "prompt": "1+1\n",
        "response": "1+1=2",
        "outcome": 1.0,
        "truncated": False,
        "train": True,
        "reward": {"process": 0.5},
        "steps": [
            {"text": "a", "label": 1, "span": [0, 2], "reward": {"process": 0.5, "outcome": None}, "parts": {}},
            {"text": "b", "label": None, "span": [2, 3], "reward": {"process": None, "outcome": 1.0}, "parts": {}},
        ],
        "tokens": {"prompt": [5, 6], "response": [7, 8, 1], "logprobs": [-0.5, -0.25, 0.0]},
    }
    return {**given, **changes}


def tokens(prompt: list[int], response: list[int]) -> dict:
    return {"prompt": prompt, "response": response, "logprobs": [-0.5] * len(response)}


def written(folder: Path, *lines: dict) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    return str(folder)


def test_a_row_is_read_back(tmp_path):
    run = written(tmp_path / "run[1]", line())  # a folder's name is no pattern
    (row,) = stored(run)
    assert row.where == f"{run}/rollouts.jsonl:1"
    assert (row.prompt, row.response, row.logprobs) == ((5, 6), (7, 8, 1), (-0.5, -0.25, 0.0))
    assert (row.outcome, row.truncated, row.version, row.step) == (1.0, False, 2, 3)
    assert (row.spans, row.labels) == (((0, 2), (2, 3)), (1, -1))
    assert row.rewards == {"process": (0.5, None), "outcome": (None, 1.0)}


def test_rows_become_the_shard_that_training_saw(tmp_path):
    other = line(tokens=tokens([5, 6], [9]), steps=[], outcome=None, truncated=True)
    third = line(tokens=tokens([4], [7, 8, 2]), outcome=0.0)
    shard = stored_shard(stored([written(tmp_path / "a", line(), other), written(tmp_path / "b", third)]))
    assert shard.tokens.tolist() == [5, 6, 7, 8, 1, 5, 6, 9, 4, 7, 8, 2]
    assert shard.lengths.tolist() == [5, 3, 4]
    assert shard.prompt_lengths.tolist() == [2, 2, 1]
    assert shard.group.tolist() == [0, 0, 1]
    assert shard.step_index.tolist() == [-1, -1, 0, 0, 1, -1, -1, -1, -1, 0, 0, 1]
    assert shard.step_label.tolist() == [-1, -1, 1, 1, -1, -1, -1, -1, -1, 1, 1, -1]
    assert shard.outcome.tolist() == [1.0, 0.0, 0.0]
    assert shard.outcome_present.tolist() == [True, False, True]
    assert shard.truncated.tolist() == [False, True, False]
    assert shard.rollout_logprobs[:5].tolist() == [0.0, 0.0, -0.5, -0.25, 0.0]


def test_a_prompt_is_one_over_steps_and_runs(tmp_path):
    runs = [
        written(tmp_path / "a", line(), line(tokens=tokens([4], [1]), steps=[])),
        written(tmp_path / "b", line(step=9)),
    ]
    assert [[row.step for row in group] for group in by_prompt(stored(runs))] == [[3, 9], [3]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "TypeError"),
        ({"tokens": {"prompt": [5], "response": [7.5], "logprobs": [0.0]}}, "found 7.5, expected a whole number"),
        ({"tokens": {"prompt": [5], "response": [7], "logprobs": [None]}}, "found None, expected a finite number"),
        ({"tokens": {"prompt": [5], "response": [7, 8, 9], "logprobs": [0.0]}}, "do not fit together"),
        ({"tokens": tokens([5], [7])}, "do not fit together"),  # spans beyond the response
        ({"tokens": tokens([], [7, 8, 1])}, "0 prompt tokens"),
        ({"outcome": "right"}, "found 'right', expected a finite number"),
        ({"steps": [{"text": "a"}]}, "KeyError"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, changes, message):
    run = written(tmp_path / "run", line(), line(**changes))
    with pytest.raises(DataError, match=rf"rollouts.jsonl:2 .*{message}"):
        stored(run)


def test_rows_without_token_ids_empty_files_and_other_folders_are_refused(tmp_path):
    old = line()
    del old["tokens"]
    with pytest.raises(DataError, match=r"rollouts.jsonl:1 has no token ids.*tracker.rollout_groups=null"):
        stored(written(tmp_path / "old", old))
    with pytest.raises(DataError, match="is empty"):
        stored(written(tmp_path / "empty"))
    with pytest.raises(DataError, match="expected the folder of a run"):
        stored(str(tmp_path))


def kept(run: str, **changes) -> list[TokenExample]:
    given = {"min_outcome": 1.0, "distinct": True, "per_prompt": None, "truncated": False, "seed": 0}
    return right_responses(runs=run, **{**given, **changes})


def test_right_responses_are_finished_distinct_and_at_most_so_many(tmp_path):
    rows = [
        line(tokens=tokens([5], [1, 0]), steps=[]),
        line(tokens=tokens([5], [1, 0]), steps=[]),  # a copy
        line(tokens=tokens([5], [2, 0]), steps=[]),
        line(tokens=tokens([5], [3, 0]), steps=[], outcome=0.5),
        line(tokens=tokens([5], [4, 0]), steps=[], outcome=None),
        line(tokens=tokens([5], [5, 5]), steps=[], truncated=True),
        line(tokens=tokens([5], []), steps=[]),
        line(tokens=tokens([6], [1, 0]), steps=[]),  # another prompt
    ]
    run = written(tmp_path / "run", *rows)
    responses = [each.response for each in kept(run)]
    assert responses == [(1, 0), (2, 0), (1, 0)]
    assert [each.response for each in kept(run, distinct=False)] == [(1, 0), (1, 0), (2, 0), (1, 0)]
    assert (3, 0) in [each.response for each in kept(run, min_outcome=0.5)]
    assert (5, 5) in [each.response for each in kept(run, truncated=True)]
    few = kept(run, per_prompt=1)
    assert [each.prompt for each in few] == [(5,), (6,)]
    assert kept(run, per_prompt=1) == few
    assert {kept(run, per_prompt=1, seed=seed)[0].response for seed in range(20)} == {(1, 0), (2, 0)}
    with pytest.raises(DataError, match="none of the 8 stored rollouts has an outcome of at least 2"):
        kept(run, min_outcome=2.0)
