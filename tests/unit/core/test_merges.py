from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlprm.core.merge import gate_by, hierarchical, zero_last
from rlprm.core.merge_outcome import renorm, thought_penalty
from rlprm.core.merge_response import aggregate, blend
from rlprm.errors import ConfigError
from rlprm.records import Stream
from tests.unit.core.worked import close, example, off_response, on_response, process_stream, shard_of

NOT = torch.nan  # no reward here


def stream_of(shard, rows):
    rewards = on_response(shard, rows)
    return Stream(rewards=rewards, present=rewards.isfinite())


def last(shard, values):
    """One entry per response, at its last token; None: absent."""
    rows = [
        [NOT] * (int(length) - 1) + [NOT if value is None else value]
        for length, value in zip(shard.response_mask.sum(1), values, strict=True)
    ]
    return stream_of(shard, rows)


def told(stream, shard):
    """The stream's rewards; NaN where it has none. What lies under absent entries is nobody's business."""
    rewards = torch.where(stream.present, stream.rewards, torch.zeros_like(stream.rewards))
    return off_response(rewards, shard), [
        stream.present[row, shard.response_mask[row]].tolist() for row in range(len(shard))
    ]


def test_zero_last_keeps_the_entry():
    shard = example()
    cut, present = told(zero_last({"process": process_stream(shard)}, shard, stream="process")["process"], shard)
    close(cut, [[0.2, 0.0], [0.1, 0.3, 0.0], [0.0]])
    assert all(all(row) for row in present)


def test_zero_last_makes_nothing_of_an_absent_reward():
    shard = shard_of([2], [1.0])
    found = zero_last({"process": stream_of(shard, [[0.5, NOT]])}, shard, stream="process")["process"]
    assert told(found, shard) == ([[0.5, 0.0]], [[True, False]])


# -- ReNorm ----------------------------------------------------------------------------------------------------------


def test_renorm_golden():
    # mu 1, r_p 0.2 and 0.9 before the last step: wrong -0.8, -0.1; right 0.2, 0.9; the last step's own reward is gone
    shard = shard_of([3, 3, 3], [0.0, 1.0, None])
    streams = {"process": stream_of(shard, [[0.2, 0.9, 0.4]] * 3), "outcome": last(shard, [0.0, 1.0, None])}
    found = renorm(streams, shard, stream="process", mu=1.0)
    rewards, present = told(found["process"], shard)
    close(rewards, [[-0.8, -0.1, 0.0], [0.2, 0.9, 0.0], [0.0, 0.0, 0.0]])
    assert present == [[True, True, False], [True, True, False], [False, False, False]]
    assert found["outcome"] is streams["outcome"]


def test_renorm_does_not_shift_what_the_judge_left_out():
    shard = shard_of([3], [0.0])
    found = renorm({"process": stream_of(shard, [[NOT, 0.9, 0.4]])}, shard, stream="process", mu=1.0)["process"]
    assert told(found, shard)[1] == [[False, True, False]]


# -- TP-GRPO ---------------------------------------------------------------------------------------------------------


def test_wrong_steps_of_right_responses_pay_for_the_groups_accuracy():
    # outcomes 1, 0, 1 and none: accuracy 2/3, penalty 0.3 * 2/3 = 0.2
    shard = shard_of([3, 2, 2, 2], [1.0, 0.0, 1.0, None], steps=[[0, 0, 1], [0, 1], [0, 1], [0, 1]])
    verdicts = stream_of(shard, [[NOT, 1.0, 0.0], [0.0, 1.0], [NOT, 0.0], [0.0, 0.0]])
    found = thought_penalty({"process": verdicts}, shard, stream="process", alpha=0.3, right_above=0.5)["process"]
    rewards, present = told(found, shard)
    close(rewards, [[0.0, 0.0, -0.2], [0.0, 0.0], [0.0, -0.2], [0.0, 0.0]])
    assert present == [[False, True, True], [True, True], [False, True], [False, False]]


def test_accuracy_is_that_of_the_trained_responses_of_the_group():
    # the second response is not trained on: accuracy 1; the fourth is another group's: 1/2 there
    shard = shard_of([1, 1, 1, 1], [1.0, 0.0, 1.0, 0.0], groups=[3, 3, 8, 8])
    trained = replace(shard, train=torch.tensor([True, False, True, True]))
    verdicts = stream_of(shard, [[0.0]] * 4)
    found = thought_penalty({"process": verdicts}, trained, stream="process", alpha=1.0, right_above=0.5)["process"]
    close(told(found, shard)[0], [[-1.0], [0.0], [-0.5], [0.0]])


def test_a_penalty_below_zero_is_refused():
    shard = example()
    with pytest.raises(ConfigError, match=r"alpha is -0\.1"):
        thought_penalty({"process": process_stream(shard)}, shard, stream="process", alpha=-0.1, right_above=0.5)


# -- gate by another stream ------------------------------------------------------------------------------------------


def test_gate_by_another_stream():
    shard = shard_of([2, 3, 1, 1], [1.0, 0.0, 1.0, 1.0])
    streams = {
        "process": stream_of(shard, [[0.2, -0.1], [0.1, 0.3, -0.2], [0.4], [NOT]]),
        "verdict": last(shard, [1.0, 0.0, 1.0, 1.0]),
        "format": last(shard, [1.0, 0.0, None, 0.5]),
    }
    found = gate_by(streams, shard, gated=["process", "verdict"], by="format")
    assert set(found) == {"process", "verdict"}
    rewards, present = told(found["process"], shard)
    close(rewards, [[0.2, -0.1], [0.0, 0.0, 0.0], [0.0], [0.0]])
    assert present == [[True, True], [True, True, True], [False], [False]]  # closed pays 0, an absent gate nothing
    close(told(found["verdict"], shard)[0], [[0.0, 1.0], [0.0, 0.0, 0.0], [0.0], [0.0]])
    assert told(found["verdict"], shard)[1] == [[False, True], [False, False, True], [False], [True]]


@pytest.mark.parametrize(("gated", "by"), [([], "process"), (["process"], "process")])
def test_gate_by_refuses_what_gates_nothing_or_itself(gated, by):
    shard = example()
    with pytest.raises(ConfigError, match="name at least one stream"):
        gate_by({"process": process_stream(shard)}, shard, gated=gated, by=by)


# -- hierarchical ----------------------------------------------------------------------------------------------------


def paid(levels, weights, difficulty=1.0, into="content"):
    """What one response is paid, or None; each level's value as (name, value)."""
    shard = shard_of([2], [1.0])
    streams = {name: last(shard, [value]) for name, value in levels}
    found = hierarchical(
        streams, shard, levels=[name for name, _ in levels], weights=weights, difficulty=difficulty, into=into
    )
    assert set(found) == {into}
    rewards, present = told(found[into], shard)
    assert present[0][0] is False
    assert rewards[0][0] == 0.0
    return rewards[0][1] if present[0][1] else None


@pytest.mark.parametrize(
    ("form", "kind", "content", "expected"),
    [
        (1.0, 1.0, 0.8, 0.5 + 0.3 + 10 * 0.2 * 0.8),
        (1.0, 0.9, 0.8, 0.5 + 0.3 * 0.9),  # the kind is not in full: the content is not read
        (0.5, 1.0, 1.0, 0.25),
        (0.0, None, None, 0.0),  # what is not reached may be unknown
        (1.0, None, 1.0, None),  # what is reached may not
        (1.0, 1.0, None, None),
        (None, 1.0, 1.0, None),
    ],
)
def test_a_level_is_paid_once_all_before_it_are_full(form, kind, content, expected):
    found = paid([("format", form), ("kind", kind), ("content", content)], [0.5, 0.3, 0.2], 10.0)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-6))


def test_levels_need_a_weight_each_and_a_place():
    with pytest.raises(ConfigError, match="each level once, with its weight"):
        paid([("format", 1.0), ("content", 1.0)], [0.5])
    with pytest.raises(ConfigError, match="expected one of them"):
        paid([("format", 1.0), ("content", 1.0)], [0.5, 0.5], into="outcome")


# -- one number of a response ----------------------------------------------------------------------------------------


def five_steps():
    """Steps 0.5, -0.2 (as 0.1 - 0.3), one without a reward, 0.8; and a response without any."""
    shard = shard_of([5, 2], [1.0, 0.0], steps=[[0, 1, 1, 2, 3], [0, 1]])
    return shard, stream_of(shard, [[0.5, 0.1, -0.3, NOT, 0.8], [NOT, NOT]])


@pytest.mark.parametrize(
    ("how", "expected"),
    [("mean", 1.1 / 3), ("min", -0.2), ("sum", 1.1), ("last", 0.8), ("product", 0.5 * -0.2 * 0.8)],
)
def test_aggregate_of_rewarded_steps(how, expected):
    shard, stream = five_steps()
    rewards, present = told(aggregate({"process": stream}, shard, stream="process", how=how)["process"], shard)
    close(rewards, [[0.0, 0.0, 0.0, 0.0, expected], [0.0, 0.0]])
    assert present == [[False] * 4 + [True], [False, False]]


def test_last_is_the_last_rewarded_step():
    shard = shard_of([3], [1.0])
    stream = stream_of(shard, [[0.5, 0.25, NOT]])
    assert told(aggregate({"a": stream}, shard, stream="a", how="last")["a"], shard)[0] == [[0.0, 0.0, 0.25]]


def test_blend_golden():
    # mean 1.1/3 plus 0.5 * 0.8 = 0.766667; 0.25 * 1 + 0.75 * 0.766667 = 0.825; the second has no step to blend with
    shard, stream = five_steps()
    streams = {"process": stream, "outcome": last(shard, [1.0, 0.0])}
    found = blend(streams, shard, stream="process", into="outcome", share=0.75, how="mean", alpha=0.5)
    assert set(found) == {"outcome"}
    rewards, present = told(found["outcome"], shard)
    close(rewards, [[0.0, 0.0, 0.0, 0.0, 0.825], [0.0, 0.0]])
    assert present == [[False] * 4 + [True], [False, False]]


def test_blend_without_a_verdict_is_absent():
    shard, stream = five_steps()
    streams = {"process": stream, "outcome": last(shard, [None, 0.0])}
    found = blend(streams, shard, stream="process", into="outcome", share=0.5, how="min", alpha=0.0)
    assert not bool(found["outcome"].present.any())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"into": "process"}, "into itself"),
        ({"share": 1.5}, r"share is 1\.5"),
        ({"stream": "judge"}, "names the stream"),
    ],
)
def test_blend_refuses(changed, message):
    shard, stream = five_steps()
    settings = {"stream": "process", "into": "outcome", "share": 0.5, "how": "mean", "alpha": 0.0, **changed}
    with pytest.raises(ConfigError, match=message):
        blend({"process": stream, "outcome": last(shard, [1.0, 0.0])}, shard, **settings)
