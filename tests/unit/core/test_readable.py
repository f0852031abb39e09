from __future__ import annotations

import json

import torch

from rlprm.core.readable import readable
from rlprm.records import Advantages, Shard, Stream

ALPHABET = "_ab=12;34."


def decode(tokens):
    return "".join(ALPHABET[token] for token in tokens)


def example():
    # prompt "a=", response "1;34." in steps "1;" and "34", the dot belongs to none; then a padded second sequence
    tokens = torch.tensor([[1, 3, 4, 6, 7, 8, 9], [2, 3, 5, 0, 0, 0, 0]])
    shard = Shard(
        tokens=tokens,
        attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]).bool(),
        response_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0]]).bool(),
        rollout_logprobs=torch.tensor([[0, 0, -0.5, 0, 0, 0, -1.25], [0.0] * 7]),
        step_index=torch.tensor([[-1, -1, 0, 0, 1, 1, -1], [-1, -1, 0, -1, -1, -1, -1]]),
        step_label=torch.tensor([[-1, -1, 1, 1, 0, 0, -1], [-1] * 7]),
        outcome=torch.tensor([1.0, 0.0]),
        outcome_present=torch.tensor([True, False]),
        greedy_outcome=torch.zeros(2),
        greedy_present=torch.tensor([False, False]),
        group=torch.tensor([4, 5]),
        version=torch.tensor([9, 9]),
        truncated=torch.tensor([False, True]),
        fresh=torch.tensor([True, True]),
        train=torch.tensor([True, True]),
        row=torch.tensor([0, 1]),
    )
    rewards = torch.tensor([[0, 0, 0.25, 0.5, -1.0, 0, 0], [0.0] * 7])
    present = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0] * 7]).bool()
    outcome = torch.zeros(2, 7)
    outcome[0, 6] = 1.0
    streams = {
        "prm": Stream(rewards=rewards, present=present),
        "outcome": Stream(rewards=outcome, present=outcome.bool()),
    }
    prm, rest = torch.tensor([[0, 0, 1.0, 3, -2, -2, 0], [0.0] * 7]), torch.full((2, 7), 0.5)
    return shard, streams, Advantages(total=prm + rest, parts={"prm": prm, "outcome": rest})


def test_a_rollout_reads_step_by_step():
    (row,) = readable(*example(), rows=[0], decode=decode)
    assert row == {
        "group": 4,
        "version": 9,
        "prompt": "a=",
        "response": "1;34.",
        "outcome": 1.0,
        "truncated": False,
        "train": True,
        "reward": {"prm": -0.25, "outcome": 1.0},  # .25 + .5 - 1
        "steps": [
            {
                "text": "1;",
                "label": 1,
                "span": [0, 2],
                "reward": {"prm": 0.75, "outcome": None},
                "advantage": 2.5,  # mean of 1.5 and 3.5
                "parts": {"prm": 2.0, "outcome": 0.5},
            },
            {
                "text": "34",
                "label": 0,
                "span": [2, 4],
                "reward": {"prm": -1.0, "outcome": None},
                "advantage": -1.5,
                "parts": {"prm": -2.0, "outcome": 0.5},
            },
        ],
        "tokens": {"prompt": [1, 3], "response": [4, 6, 7, 8, 9], "logprobs": [-0.5, 0.0, 0.0, 0.0, -1.25]},
    }


def test_absent_unknown_and_padding_stay_apart():
    (row,) = readable(*example(), rows=[1], decode=decode)
    assert (row["prompt"], row["response"]) == ("b=", "2")
    assert row["outcome"] is None
    assert row["truncated"] is True
    assert row["reward"] == {"prm": None, "outcome": None}
    assert row["steps"][0]["label"] is None


def test_a_rollout_that_is_not_finite_is_still_written():
    shard, streams, advantages = example()
    advantages.parts["prm"][0, 2] = torch.nan
    (row,) = readable(shard, streams, advantages, [0], decode)
    assert row["steps"][0]["parts"]["prm"] is None
    json.dumps(row, allow_nan=False)
