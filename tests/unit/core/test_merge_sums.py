"""Sums of streams, by hand; what is absent stays absent."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rlprm.core.merge import gate_by, posterior_gate, separate
from rlprm.core.merge_sums import add_outcome, in_turn, sum_of
from rlprm.errors import ConfigError
from rlprm.records import Stream
from tests.unit.core.worked import close, off_response, on_response, shard_of


def at_ends(shard, values):
    """One value a response at its last token; None: absent."""
    rewards = torch.full(shard.tokens.shape, torch.nan)
    present = torch.zeros(shard.tokens.shape, dtype=torch.bool)
    for row, value in enumerate(values):
        if value is not None:
            end = int(shard.response_mask[row].nonzero().max())
            rewards[row, end], present[row, end] = value, True
    return Stream(rewards=rewards, present=present)


def test_capo_pays_plus_two_plus_one_zero_and_minus_one():
    # right response: right step +2, wrong step 2 - 1 = +1; wrong response: right step 0, wrong step -1
    shard = shard_of([4, 4], [1.0, 0.0], steps=[[0, 0, 1, 1]] * 2)
    process = Stream(rewards=on_response(shard, [[0.0, 0.0, -1.0, -1.0]] * 2), present=shard.response_mask)
    merged = add_outcome({"process": process}, shard, stream="process", weight=2.0)["process"]
    close(off_response(merged.rewards, shard), [[2.0, 2.0, 1.0, 1.0], [0.0, 0.0, -1.0, -1.0]])
    assert torch.equal(merged.present, shard.response_mask)


def test_neither_an_absent_outcome_nor_an_absent_verdict_is_a_reward():
    shard = shard_of([2, 2], [None, 1.0])
    present = shard.response_mask.clone()
    present[1, 2] = False
    process = Stream(rewards=on_response(shard, [[0.0, -1.0], [0.0, torch.nan]]), present=present)
    merged = add_outcome({"process": process}, shard, stream="process", weight=2.0)["process"]
    assert merged.present.tolist() == [[False, False, False], [False, True, False]]
    assert merged.rewards.tolist() == [[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]


def test_spark_step_augmented_reward():
    # 0.6 y + 0.4 k/n: y 1 with 3 of 4 steps right: 0.9; y 0 with 1 of 2: 0.2; the third has no verdict on its steps
    shard = shard_of([4, 2, 1], [1.0, 0.0, 1.0])
    steps = Stream(
        rewards=on_response(shard, [[1.0, 1.0, 0.0, 1.0], [1.0, 0.0], [torch.nan]]),
        present=shard.response_mask & torch.tensor([True, True, False])[:, None],
    )
    streams = {"verdict": at_ends(shard, [1.0, 0.0, 1.0]), "steps": steps}
    merged = sum_of(streams, shard, names=["verdict", "steps"], weights=[0.6, 0.4], into="verdict")
    assert set(merged) == {"verdict"}
    close(off_response(merged["verdict"].rewards, shard), [[0, 0, 0, 0.9], [0, 0.2], [0]])
    assert merged["verdict"].present.sum(1).tolist() == [1, 1, 0]


def test_posterior_grpo_reward_from_merges_in_turn():
    # format + outcome + 1[right] * quality: 1 + 1 + 0.7 = 2.7; wrong: 1 + 0 + 0 = 1; no format: 0 + 1 + 0.4 = 1.4
    shard = shard_of([2, 1, 1, 1], [1.0, 0.0, 1.0, 1.0])
    streams = {
        "outcome": at_ends(shard, [1.0, 0.0, 1.0, 1.0]),
        "process": at_ends(shard, [0.7, 0.9, 0.4, None]),
        "format": at_ends(shard, [1.0, 1.0, 0.0, 1.0]),
    }
    merge = partial(
        in_turn,
        first=partial(posterior_gate, stream="process"),
        second=partial(sum_of, names=["outcome", "process", "format"], weights=[1.0, 1.0, 1.0], into="outcome"),
        third=None,
    )
    merged = merge(streams, shard)["outcome"]
    close(off_response(merged.rewards, shard), [[0, 2.7], [1.0], [1.4], [0.0]])
    assert merged.present.any(1).tolist() == [True, True, True, False]  # the judge failed on the last


def test_a_third_merge_comes_last():
    shard = shard_of([1, 1], [1.0, 1.0])
    streams = {"a": at_ends(shard, [0.5, 0.5]), "b": at_ends(shard, [0.5, 0.5]), "format": at_ends(shard, [1.0, 0.0])}
    add = partial(sum_of, names=["a", "b"], weights=[1.0, 1.0], into="a")
    merged = in_turn(
        streams, shard, first=separate, second=add, third=partial(gate_by, gated=["a"], by="format")
    )  # fmt: skip
    close(off_response(merged["a"].rewards, shard), [[1.0], [0.0]])
    assert set(merged) == {"a"}


def test_sums_that_cannot_be_are_refused():
    shard = shard_of([1], [1.0])
    streams = {"a": at_ends(shard, [1.0]), "b": at_ends(shard, [1.0])}
    for names, weights, into in (
        (["a", "b"], [1.0], "a"),
        (["a", "a"], [1.0, 1.0], "a"),
        (["a"], [1.0], "b"),
        ([], [], "a"),
    ):
        with pytest.raises(ConfigError, match=r"expected"):
            sum_of(streams, shard, names=names, weights=weights, into=into)
    with pytest.raises(ConfigError, match="names the stream 'c'"):
        sum_of(streams, shard, names=["a", "c"], weights=[1.0, 1.0], into="a")
    with pytest.raises(ConfigError, match="names the stream 'c'"):
        add_outcome(streams, shard, stream="c", weight=1.0)
