"""The schemes beyond the presets of PRIME and GRPO, each by hand. Axes that are not named are those of RAW."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rlprm.contract.ranks import on_ranks
from rlprm.core.moments import Moments, updated, uses_running
from rlprm.core.normalize import RAW, check_axes, is_raw
from rlprm.core.reduce import Identity
from rlprm.errors import CheckpointError, ConfigError
from rlprm.records import Stream
from tests.unit.core.worked import NO_AXES, close, example, off_response, on_response, process_stream, shard_of

ZSCORE = {"order": "centre_then_scale", "eps": 1e-6}


def run(shard, stream=None, moments=None, **axes):
    """The response entries of the stream (the worked example's, unless given) under these axes."""
    given = stream or process_stream(shard)
    found = partial(RAW, **axes)(given.rewards, given.present, shard, Identity(), moments=moments)
    assert torch.all(found[~given.present] == 0)
    return off_response(found, shard)


def per_response(rewards):
    """One-token responses with these rewards, one group."""
    shard = shard_of([1] * len(rewards), [1.0] * len(rewards))
    return shard, Stream(rewards=on_response(shard, [[each] for each in rewards]), present=shard.response_mask)


# -- subset ----------------------------------------------------------------------------------------------------------


def test_papo_scores_right_responses_against_each_other():
    # right ones 0.8 and 0.5: mean 0.65, std_b 0.212132; 0.15 / 0.212133
    shard = shard_of([1, 1, 1], [1.0, 0.0, 1.0])
    stream = Stream(rewards=on_response(shard, [[0.8], [0.9], [0.5]]), present=shard.response_mask)
    axes = {"unit": "response", "centre": "group", "scale": "group_std", **ZSCORE}
    close(run(shard, stream, subset="correct", **axes), [[0.707103], [0.0], [-0.707103]])
    close(run(shard, stream, subset="incorrect", **axes), [[0.0], [0.0], [0.0]])  # one alone has no spread


def test_a_response_without_a_verdict_is_neither_right_nor_wrong():
    shard = shard_of([1] * 4, [1.0, None, 0.0, 0.5])
    stream = Stream(rewards=on_response(shard, [[1.0], [2.0], [3.0], [4.0]]), present=shard.response_mask)
    close(run(shard, stream, subset="correct"), [[1.0], [0.0], [0.0], [0.0]])
    close(run(shard, stream, subset="incorrect"), [[0.0], [0.0], [3.0], [4.0]])
    # and takes no part in the mean of the wrong ones, 3.5
    close(run(shard, stream, centre="incorrect_mean"), [[-2.5], [-1.5], [-0.5], [0.5]])


# -- centres ---------------------------------------------------------------------------------------------------------


def test_progrs_measures_from_the_wrong_responses():
    # sums 0.1, 0.2, 0.4; the second is wrong
    close(run(example(), unit="response", centre="incorrect_mean"), [[0.0, -0.1], [0.0, 0.0, 0.0], [0.2]])
    right = shard_of([2, 3, 1], [1.0, 1.0, 1.0])
    close(run(right, process_stream(right), unit="response", centre="incorrect_mean"), [[0.0] * 2, [0.0] * 3, [0.0]])


def test_opo_weighs_by_length():
    # outcomes 1, 0, 1 of 2, 3 and 1 tokens: (2 + 1) / 6 = 0.5, where the plain mean is 2/3
    shard = example()
    last = [[torch.nan, 1.0], [torch.nan, torch.nan, 0.0], [1.0]]
    rewards = on_response(shard, last)
    stream = Stream(rewards=rewards, present=rewards.isfinite())
    close(run(shard, stream, unit="response", centre="length_weighted"), [[0.0, 0.5], [0.0, 0.0, -0.5], [0.5]])


def test_opo_leaves_exactly_nothing_of_equal_rewards():
    shard = shard_of([1, 3, 7], [0.7] * 3)
    stream = Stream(rewards=torch.full(shard.tokens.shape, 0.7), present=shard.response_mask)
    found = run(
        shard, Stream(rewards=stream.rewards, present=_last_only(shard)), unit="response", centre="length_weighted"
    )
    assert [sum(row) for row in found] == [0.0, 0.0, 0.0]


def _last_only(shard):
    position = torch.arange(shard.tokens.shape[1])
    return shard.response_mask & (position == torch.where(shard.response_mask, position, -1).amax(1, keepdim=True))


def test_prime_with_grpo_uses_the_token_means():
    # m = 0.05, 0.0666667, 0.4: mean 0.172222, std_b 0.197437
    found = run(example(), centre="token_mean_group", scale="token_mean_std", **ZSCORE)
    close(found, [[0.140691, -1.378771], [-0.365796, 0.647180, -1.885258], [1.153665]], 5e-6)
    # without spread among the means there is nothing to divide by, whatever the tokens do
    shard = shard_of([2, 2], [1.0, 0.0])
    flat = Stream(rewards=on_response(shard, [[0.0, 1.0], [1.0, 0.0]]), present=shard.response_mask)
    close(run(shard, flat, centre="token_mean_group", scale="token_mean_std", **ZSCORE), [[0.0, 0.0], [0.0, 0.0]], 0.0)


def test_spro_compares_prefix_sums_at_the_same_token():
    # cumulative [0.2, 0.1], [0.1, 0.4, 0.2], [0.4]: means of those alive 0.233333, 0.25, 0.2; the last survivor gets 0
    expected = [[-0.033333, -0.15], [-0.133333, 0.15, 0.0], [0.166667]]
    close(run(example(), accumulate="prefix", centre="position"), expected)


def test_position_counts_tokens_and_not_steps_nor_columns():
    # both responses are one step; at token 0: 1 and 3, at token 1: 5 and 9
    shard = shard_of([2, 2], [1.0, 0.0], steps=[[0, 0], [0, 0]], prompt=3)
    stream = Stream(rewards=on_response(shard, [[1.0, 5.0], [3.0, 9.0]]), present=shard.response_mask)
    close(run(shard, stream, centre="position"), [[-1.0, -2.0], [1.0, 2.0]])
    close(run(shard, stream, centre="step_index"), [[-3.5, 0.5], [-1.5, 4.5]])


def test_step_leave_one_out_is_the_mean_step_of_the_others():
    # mean step 0.05, 0.0666667, 0.4: y1 loses 0.233333, y2 0.225, y3 0.0583333
    found = run(example(), unit="step", centre="token_mean_loo")
    close(found, [[-0.033333, -0.333333], [-0.125, 0.075, -0.425], [0.341667]])


# -- scales ----------------------------------------------------------------------------------------------------------


def test_min_max_of_each_response():
    # y2 from -0.2 to 0.3: 0.3/0.5; y3 has one entry, hence no spread
    close(run(example(), scale="min_max"), [[1.0, 0.0], [0.6, 1.0, 0.0], [0.0]])


def test_rank_of_all_entries_of_the_group():
    # sorted -0.2, -0.1, 0.1, 0.2, 0.3, 0.4 onto -1, -0.6, -0.2, 0.2, 0.6, 1
    close(run(example(), scale="rank"), [[0.2, -0.6], [-0.2, 0.6, -1.0], [1.0]])


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.0, 1.0, 0.0], [0.5, 0.5, -1.0]),  # ranks 2.5, 2.5, 1 of 3
        ([0.7, 0.7, 0.7], [0.0, 0.0, 0.0]),
        ([5.0], [0.0]),  # nothing to be ranked against
        ([1.0, 1.0 + 1e-8, 3.0], [-0.5, -0.5, 1.0]),  # closer than a tie
    ],
)
def test_ties_share_a_rank(rewards, expected):
    shard, stream = per_response(rewards)
    close(run(shard, stream, scale="rank"), [[each] for each in expected])


def test_length_divides_by_the_responses_tokens():
    close(run(example(), scale="length"), [[0.1, -0.05], [0.033333, 0.1, -0.066667], [0.4]])
    # the response is 2 tokens long, though one has no reward
    shard = shard_of([2], [1.0])
    stream = Stream(rewards=on_response(shard, [[3.0, torch.nan]]), present=shard.response_mask & (torch.arange(3) < 2))
    close(run(shard, stream, scale="length"), [[1.5, 0.0]])


# -- accumulate, clip, bound -----------------------------------------------------------------------------------------


def test_accumulation_comes_before_the_statistics():
    # suffix sums [0.1, -0.1], [0.2, 0.1, -0.2], [0.4]; their mean 0.5/6
    close(run(example(), accumulate="suffix"), [[0.1, -0.1], [0.2, 0.1, -0.2], [0.4]])
    mean = 0.5 / 6
    expected = [[0.1 - mean, -0.1 - mean], [0.2 - mean, 0.1 - mean, -0.2 - mean], [0.4 - mean]]
    close(run(example(), accumulate="suffix", centre="group"), expected)


def test_accumulation_passes_over_what_is_absent():
    shard = shard_of([3], [1.0])
    present = shard.response_mask & torch.tensor([[False, True, False, True]])
    stream = Stream(rewards=on_response(shard, [[1.0, torch.nan, 2.0]]), present=present)
    close(run(shard, stream, accumulate="prefix"), [[1.0, 0.0, 3.0]])


def test_clip_before_the_statistics_and_after_them():
    # clipped first: 0.2, -0.1, 0.1, 0.25, -0.2, 0.25, mean 0.083333; afterwards: mean 0.116667, 0.283333 -> 0.25
    first = run(example(), clip_first=0.25, centre="group")
    close(first, [[0.116667, -0.183333], [0.016667, 0.166667, -0.283333], [0.166667]])
    after = run(example(), bound=0.25, centre="group")
    close(after, [[0.083333, -0.216667], [-0.016667, 0.183333, -0.25], [0.25]])


def test_sigmoid_is_shifted_to_zero():
    # 1 / (1 + exp(-0.4)) = 0.598688
    found = run(example(), bound="sigmoid")
    assert found[2] == pytest.approx([0.098688], abs=1e-6)
    shard, stream = per_response([0.0, 1e30, -1e30])
    close(run(shard, stream, bound="sigmoid"), [[0.0], [0.5], [-0.5]])


# -- running ---------------------------------------------------------------------------------------------------------

RUNNING = {"centre": "running", "scale": "running_std", **ZSCORE}


def seen(before, rewards, decay, shard=None):
    own, stream = per_response(rewards)
    return updated(before, stream.rewards, stream.present, own, Identity(), partial(RAW, **RUNNING, decay=decay))


def test_running_statistics_of_two_batches():
    # batch 1: 1, 3: mean 2, m2 2, std_b 1.414214. Batch 2: 5, 7; old weight 1, m2 1; weight 3, mean 2 + 4 * 2/3,
    # m2 1 + 2 + 16 * 1 * 2/3 = 13.666667, std 2.614065
    first = seen(None, [1.0, 3.0], 0.5)
    assert (first.weight, first.mean, first.m2) == (2.0, 2.0, 2.0)
    shard, stream = per_response([1.0, 3.0])
    close(run(shard, stream, moments=first, decay=0.5, **RUNNING), [[-0.707106], [0.707106]])
    close(run(shard, stream, decay=0.5, **RUNNING), [[-0.707106], [0.707106]])  # a first batch needs no moments
    second = seen(first, [5.0, 7.0], 0.5)
    assert (second.weight, second.mean, second.m2) == pytest.approx((3.0, 4.666667, 13.666667), abs=1e-6)
    shard, stream = per_response([5.0, 7.0])
    close(run(shard, stream, moments=second, decay=0.5, **RUNNING), [[0.127515], [0.892605]], 5e-6)


def test_without_fading_it_is_all_entries_together():
    parts = [[0.3, -2.0, 5.0], [1e3, 1e3 + 1.0], [7.0]]
    moments = None
    for part in parts:
        moments = seen(moments, part, 1.0)
    together = torch.tensor([each for part in parts for each in part], dtype=torch.float64)
    assert moments.mean == pytest.approx(float(together.mean()))
    assert moments.std == pytest.approx(float(together.std()))


def test_moments_are_those_of_all_shards_and_the_same_on_each():
    shard = shard_of([1] * 5, [1.0] * 5, groups=[1, 1, 2, 2, 2])
    rewards = on_response(shard, [[1.0], [2.0], [4.0], [8.0], [16.0]])
    rows = [torch.tensor([0, 1]), torch.tensor([2, 3, 4]), torch.tensor([], dtype=torch.int64)]
    normalizer = partial(RAW, **RUNNING, decay=0.9)
    whole = updated(None, rewards, shard.response_mask, shard, Identity(), normalizer)

    def work(part, reduce):
        own = shard.select(part)
        return updated(None, rewards[part], own.response_mask, own, reduce, normalizer)

    for found in on_ranks(work, rows):
        assert (found.weight, found.mean, found.m2) == pytest.approx((whole.weight, whole.mean, whole.m2))


def test_moments_hold_without_entries_and_survive_a_checkpoint():
    moments = seen(None, [1.0, 3.0], 0.5)
    shard, stream = per_response([9.0])
    nothing = torch.zeros_like(stream.present)
    held = updated(moments, stream.rewards, nothing, shard, Identity(), partial(RAW, **RUNNING, decay=0.5))
    assert held == moments
    assert Moments.from_dict(moments.to_dict()) == moments
    with pytest.raises(CheckpointError, match="keys"):
        Moments.from_dict({"mean": 1.0})


def test_running_spread_of_nothing_but_equal_rewards_pays_nothing():
    shard, stream = per_response([0.7, 0.7, 0.7])
    close(run(shard, stream, decay=1.0, **RUNNING), [[0.0], [0.0], [0.0]], 0.0)


def test_running_spread_under_the_group_mean():
    # std_b of 1, 0, 3, 3 is 1.5; group means 0.5 and 3
    shard = shard_of([1] * 4, [1.0] * 4, groups=[4, 4, 7, 7])
    stream = Stream(rewards=on_response(shard, [[1.0], [0.0], [3.0], [3.0]]), present=shard.response_mask)
    found = run(shard, stream, centre="group", scale="running_std", order="scale_then_centre", eps=1e-9, decay=1.0)
    close(found, [[0.333333], [-0.333333], [0.0], [0.0]])


def test_who_uses_running_statistics():
    assert uses_running(partial(RAW, **RUNNING, decay=0.9))
    assert not uses_running(RAW)
    assert not uses_running(lambda rewards, present, shard, reduce: rewards)


# -- contradictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"subset": "some"}, "subset is 'some'"),
        ({"accumulate": "both"}, "accumulate is 'both'"),
        ({"accumulate": "prefix", "unit": "response"}, "one entry to sum"),
        ({"accumulate": "suffix", "scale": "return_range", "eps": 1e-6}, "sums up what follows by itself"),
        ({"clip_first": 0.0}, r"clip_first is 0\.0"),
        ({"centre": "position", "unit": "step"}, "needs unit token"),
        ({"centre": "length_weighted"}, "needs unit response"),
        ({"centre": "token_mean_group", "unit": "response"}, "needs unit token or step"),
        ({"centre": "incorrect_mean", "subset": "correct"}, "set subset all"),
        ({"scale": "token_mean_std", "eps": 1e-6}, "needs a centre"),
        ({"scale": "rank", "centre": "group", "order": "centre_then_scale"}, "centres already"),
        ({"scale": "min_max", "unit": "response"}, "use token or step"),
        ({"scale": "min_max", "centre": "group", "order": "centre_then_scale"}, "undoes centre group"),
        ({"scale": "length", "eps": 1e-6}, "set eps 0.0"),
        ({"decay": 0.9}, "set decay null"),
        ({"centre": "running"}, "decay is None"),
        ({"centre": "running", "decay": 0.0}, r"decay is 0\.0"),
        ({**RUNNING, "order": "scale_then_centre", "decay": 0.9}, "unscaled rewards"),
        ({**RUNNING, "centre": "group", "decay": 0.9}, "uncentred rewards"),
        ({"bound": "arctan"}, "bound is 'arctan'"),
    ],
)
def test_contradictions_of_the_axes_are_refused(axes, message):
    # The Literal annotations would stop some of these first under the test hook: the plain function is what runs.
    check = getattr(check_axes, "__wrapped__", check_axes)
    with pytest.raises(ConfigError, match=message):
        check(**{**NO_AXES, **axes})


@pytest.mark.parametrize("axes", [{"subset": "correct"}, {"clip_first": 1.0}, {"accumulate": "suffix"}, {"bound": 1.0}])
def test_only_what_changes_nothing_is_raw(axes):
    assert is_raw(partial(RAW))
    assert not is_raw(partial(RAW, **axes))
