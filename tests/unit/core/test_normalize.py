from __future__ import annotations

import pytest
import torch

from rlprm.core.normalize import RAW, check_axes, is_raw, normalize
from rlprm.core.reduce import Identity
from rlprm.errors import ConfigError
from rlprm.records import Stream
from tests.unit.core.worked import NO_AXES, close, example, off_response, on_response, process_stream, shard_of


def run(shard, stream, **axes):
    values = normalize(stream.rewards, stream.present, shard, Identity(), **{**NO_AXES, **axes})
    assert torch.all(values[~stream.present] == 0)
    return off_response(values, shard)


def at_the_end(shard):
    """The outcome at the last response token."""
    position = torch.arange(shard.tokens.shape[1])
    last = shard.response_mask & (position == torch.where(shard.response_mask, position, -1).amax(1, keepdim=True))
    present = last & shard.outcome_present[:, None]
    return Stream(rewards=torch.where(present, shard.outcome[:, None], torch.nan), present=present)


def outcome(shard, **axes):
    """One number per response."""
    return [sum(row) for row in run(shard, at_the_end(shard), unit="response", **axes)]


def test_return_range_of_the_worked_example():
    # suffix sums: y1 0.1, -0.1; y2 0.2, 0.1, -0.2; y3 0.4 -> largest 0.4; divide by 0.400001
    shard = example()
    found = run(shard, process_stream(shard), scale="return_range", eps=1e-6)
    close(found, [[0.5, -0.25], [0.25, 0.75, -0.5], [1.0]], 3e-6)
    assert found[2][0] == pytest.approx(0.4 / 0.400001, abs=1e-7)


def test_prime_as_released_of_the_worked_example():
    # m = 0.125, 0.166666, 0.999998; B = sum / 2 = 0.645832; r 3/2 - B
    shard = example()
    found = run(shard, process_stream(shard), centre="token_mean_loo_released", scale="local_return_range",
                order="scale_then_centre", eps=1e-6)  # fmt: skip
    close(found, [[0.104166, -1.020831], [-0.270833, 0.479165, -1.395830], [0.854165]])


def test_prime_as_written_of_the_worked_example():
    # means of the others: (0.166666 + 0.999998)/2 = 0.583332, (0.125 + 0.999998)/2 = 0.562499, 0.145833
    shard = example()
    found = run(shard, process_stream(shard), centre="token_mean_loo", scale="return_range",
                order="scale_then_centre", eps=1e-6)  # fmt: skip
    close(found, [[-0.083333, -0.833331], [-0.312499, 0.187499, -1.062498], [0.854165]])


def test_released_identity():
    # r K/(K-1) - B = (r - LOO_i) + (r - m_i)/(K-1): equal to the written form where the response has one token
    shard = example()
    axes = {"scale": "return_range", "order": "scale_then_centre", "eps": 1e-6}
    written = run(shard, process_stream(shard), centre="token_mean_loo", **axes)
    released = run(shard, process_stream(shard), centre="token_mean_loo_released", **axes)
    assert written[2] == pytest.approx(released[2], abs=1e-6)
    assert written[0] != pytest.approx(released[0], abs=1e-3)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        # outcomes 1, 0, 1: mean 2/3, std_b = sqrt((1/9 + 4/9 + 1/9)/2) = 0.577350
        ({"centre": "group", "scale": "group_std", "order": "centre_then_scale", "eps": 1e-6},
         [0.577349, -1.154699, 0.577349]),
        ({"centre": "group"}, [0.333333, -0.666667, 0.333333]),
        ({"centre": "leave_one_out"}, [0.5, -1.0, 0.5]),
        ({"centre": "batch"}, [0.333333, -0.666667, 0.333333]),  # the group is the batch
        ({}, [1.0, 0.0, 1.0]),
    ],
)  # fmt: skip
def test_outcome_presets_of_the_worked_example(axes, expected):
    assert outcome(example(), **axes) == pytest.approx(expected, abs=2e-6)


def test_step_grpo_of_the_worked_example():
    # all six entries: mean 0.7/6 = 0.116667, std_b = 0.231661
    shard = example()
    axes = {"centre": "group", "scale": "group_std", "order": "centre_then_scale", "eps": 1e-6}
    expected = [[0.359720, -0.935272], [-0.071944, 0.791384, -1.366936], [1.223048]]
    close(run(shard, process_stream(shard), **axes), expected, 1e-5)
    close(run(shard, process_stream(shard), unit="step", **axes), expected, 1e-5)


def test_step_index_centring_of_cumulative_rewards():
    # SPRO: cumulative c = [0.2, 0.1], [0.1, 0.4, 0.2], [0.4]; means of those alive 0.233333, 0.25, 0.2
    shard = example()
    cumulative = Stream(rewards=on_response(shard, [[0.2, 0.1], [0.1, 0.4, 0.2], [0.4]]), present=shard.response_mask)
    expected = [[-0.033333, -0.15], [-0.133333, 0.15, 0.0], [0.166667]]
    close(run(shard, cumulative, centre="step_index"), expected)


def test_step_index_group_norm_divides_by_the_spread_at_that_step():
    # step 0: 1 and 3, mean 2, std_b sqrt(2) -> -+0.707107; step 1: one survivor -> 0
    shard = shard_of([2, 1], [1.0, 0.0])
    stream = Stream(rewards=on_response(shard, [[1.0, 9.0], [3.0]]), present=shard.response_mask)
    axes = {"centre": "step_index", "scale": "group_std", "order": "centre_then_scale", "eps": 1e-9}
    close(run(shard, stream, unit="step", **axes), [[-0.707107, 0.0], [0.707107]])


def test_a_step_is_summed_before_statistics_and_kept_at_its_last_present_token():
    # steps of y2: tokens 0-1 and 2; sums 0.4 and -0.2
    shard = shard_of([3], [1.0], steps=[[0, 0, 1]])
    stream = Stream(rewards=on_response(shard, [[0.1, 0.3, -0.2]]), present=shard.response_mask)
    close(run(shard, stream, unit="step"), [[0.0, 0.4, -0.2]])
    close(run(shard, stream, unit="response"), [[0.0, 0.0, 0.2]])
    present = shard.response_mask.clone()
    present[0, 2] = False  # the step's second token
    inner = Stream(rewards=stream.rewards, present=present)
    close(run(shard, inner, unit="step"), [[0.1, 0.0, -0.2]])


def test_group_mean_and_batch_std_in_both_orders():
    # groups {1, 0} and {3, 3}: centred 0.5, -0.5, 0, 0: std_b over the batch sqrt(0.5/3) = 0.408248 -> 1.224745
    # dividing first: std_b(1, 0, 3, 3) = 1.5 -> 1/3 of 0.5 = 0.333333
    shard = shard_of([1, 1, 1, 1], [1.0, 0.0, 3.0, 3.0], groups=[4, 4, 7, 7])
    axes = {"centre": "group", "scale": "batch_std", "eps": 1e-9}
    after = outcome(shard, order="centre_then_scale", **axes)
    before = outcome(shard, order="scale_then_centre", **axes)
    assert after == pytest.approx([1.224745, -1.224745, 0.0, 0.0], abs=1e-6)
    assert before == pytest.approx([0.333333, -0.333333, 0.0, 0.0], abs=1e-6)


def test_leave_one_out_of_tokens_pools_the_other_responses():
    # y1 loses the mean of y2 and y3's four tokens (0.2 + 0.4)/4 = 0.15; y3 that of the first five (0.3/5 = 0.06)
    shard = example()
    found = run(shard, process_stream(shard), centre="leave_one_out")
    assert found[0] == pytest.approx([0.05, -0.25], abs=1e-6)
    assert found[2] == pytest.approx([0.34], abs=1e-6)


@pytest.mark.parametrize("centre", ["leave_one_out", "token_mean_loo", "token_mean_loo_released"])
def test_a_response_without_a_present_sibling_has_no_baseline_and_gets_zero(centre):
    shard = shard_of([2, 1], [1.0, None], groups=[3, 3])
    present = shard.response_mask & shard.outcome_present[:, None]
    stream = Stream(rewards=on_response(shard, [[0.5, 0.7], [9.0]]), present=present)
    close(run(shard, stream, centre=centre), [[0.0, 0.0], [0.0]], 0.0)


def test_equal_outcomes_give_exactly_zero():
    shard = shard_of([1] * 7, [0.7] * 7)
    axes = {"centre": "group", "scale": "group_std", "order": "centre_then_scale", "eps": 1e-6}
    assert outcome(shard, **axes) == [0.0] * 7


def test_a_group_without_spread_is_not_divided_by_eps():
    # batch mean 0.6; the flat group {0.9, 0.9} would become 0.3 / 1e-6 = 3e5
    shard = shard_of([1] * 4, [0.9, 0.9, 0.1, 0.5], groups=[1, 1, 2, 2])
    found = outcome(shard, centre="batch", scale="group_std", order="centre_then_scale", eps=1e-6)
    # {0.1, 0.5}: std_b 0.282843; (0.1 - 0.6) and (0.5 - 0.6) over it
    assert found == pytest.approx([0.0, 0.0, -1.767761, -0.353552], abs=1e-5)


def test_absent_members_take_no_part():
    # the same as the two present ones alone
    axes = {"centre": "group", "scale": "group_std", "order": "centre_then_scale", "eps": 1e-6}
    whole = outcome(shard_of([1, 1, 2], [1.0, 0.0, None]), **axes)
    assert whole == pytest.approx([*outcome(shard_of([1, 1], [1.0, 0.0]), **axes), 0.0])


@pytest.mark.parametrize(("bound", "expected"), [(0.15, 0.15), ("tanh", 0.379949), ("none", 0.4)])
def test_bound_is_last(bound, expected):
    shard = example()
    assert run(shard, process_stream(shard), bound=bound)[2] == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"unit": "word"}, "unit is 'word'"),
        ({"centre": "token_mean_loo", "unit": "response"}, "needs unit token"),
        ({"centre": "step_index", "unit": "response"}, "no step index"),
        ({"scale": "group_std", "eps": 1e-6}, "needs a centre"),
        ({"scale": "batch_std", "centre": "group", "eps": 1e-6}, "order is none"),
        ({"centre": "group", "order": "centre_then_scale"}, "nothing|no scale"),
        ({"eps": 1e-6}, "divides by nothing"),
        ({"scale": "batch_std", "eps": 0.0}, "above 0"),
        ({"bound": "arctan"}, "bound is 'arctan'"),
        ({"bound": -1.0}, "above 0"),
    ],
)
def test_contradictions_are_refused(axes, message):
    # The Literal annotations would stop some of these first under the test hook: the plain function is what runs.
    check = getattr(check_axes, "__wrapped__", check_axes)
    with pytest.raises(ConfigError, match=message):
        check(**{**NO_AXES, **axes})


def test_raw_is_raw():
    shard = example()
    assert is_raw(RAW)
    assert not is_raw(normalize)
    stream = process_stream(shard)
    close(off_response(RAW(stream.rewards, stream.present, shard, Identity()), shard),
          [[0.2, -0.1], [0.1, 0.3, -0.2], [0.4]], 0.0 + 1e-7)  # fmt: skip
