from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlprm.core.softmin import pure_softmin, step_weights
from rlprm.errors import ConfigError
from tests.unit.core.worked import close, off_response, on_response, shard_of


def pure(shard, rewards, present=None, *, temperature=0.1, baseline="none", zero_ends=False):
    there = shard.response_mask if present is None else present
    found = pure_softmin(rewards, there, shard, temperature=temperature, baseline=baseline, zero_ends=zero_ends)
    return off_response(found, shard)


def three_steps():
    shard = shard_of([3], [1.0])
    return shard, on_response(shard, [[0.9, -0.2, 0.6]])


def test_golden_row():
    # w = softmax(-9, 2, -6) = 1.7e-5, 0.999648, 3.35e-4; w r = 1.5e-5, -0.199930, 2.01e-4, summed to go
    assert step_weights(torch.tensor([[0.9, -0.2, 0.6]]), torch.ones(1, 3, dtype=torch.bool), 0.1)[0].tolist() == (
        pytest.approx([1.7e-5, 0.999648, 3.35e-4], abs=5e-7)
    )
    shard, rewards = three_steps()
    close(pure(shard, rewards), [[-0.199713, -0.199728, 2.01e-4]], 1e-6)


def test_temperature_from_the_worst_step_to_the_mean():
    # near 0 each step up to the worst gets the worst reward, later ones nothing; far above: thirds, (0.9 - 0.2 + 0.6)/3
    shard, rewards = three_steps()
    close(pure(shard, rewards, temperature=1e-3), [[-0.2, -0.2, 0.0]], 1e-6)
    close(pure(shard, rewards, temperature=1e6), [[0.433333, 0.133333, 0.2]], 1e-5)


def two_responses():
    """y1: steps of 3 and 2 tokens, rewards 0.5 and 0.5 (weights 1/2: 0.25 each); y2: one step of 3 tokens, -0.6."""
    shard = shard_of([5, 3], [1.0, 0.0], steps=[[0, 0, 0, 1, 1], [0, 0, 0]])
    nothing = torch.nan
    rewards = on_response(shard, [[nothing, nothing, 0.5, nothing, 0.5], [nothing, nothing, -0.6]])
    return shard, rewards, rewards.isfinite()


def test_token_baseline():
    # b_1 = -0.6 / 3 per token: 0.25 + 2 * 0.2 and 0.25 + 0.2, to go 1.1 and 0.45; b_2 = 0.5 / 5: -0.6 - 2 * 0.1
    given = two_responses()
    close(pure(*given, baseline="token"), [[1.1, 1.1, 1.1, 0.45, 0.45], [-0.8, -0.8, -0.8]])
    close(pure(*given, baseline="token", zero_ends=True), [[1.1, 1.1, 0.0, 0.45, 0.0], [-0.8, -0.8, 0.0]])


def test_step_baseline():
    # b_1 = -0.6 / 1: 0.85 twice; b_2 = 0.5 / 2: -0.85
    given = two_responses()
    close(pure(*given, baseline="step"), [[1.7, 1.7, 1.7, 0.85, 0.85], [-0.85, -0.85, -0.85]])
    close(pure(*given, baseline="none"), [[0.5, 0.5, 0.5, 0.25, 0.25], [-0.6, -0.6, -0.6]])


@pytest.mark.parametrize("baseline", ["token", "step"])
def test_without_a_rewarded_sibling_there_is_no_baseline_and_no_advantage(baseline):
    shard, rewards, present = two_responses()
    alone = present & torch.tensor([[True], [False]])
    close(pure(shard, rewards, alone, baseline=baseline), [[0.0] * 5, [0.0] * 3], 0.0)
    apart = replace(shard, group=torch.tensor([0, 1]))
    close(pure(apart, rewards, present, baseline=baseline), [[0.0] * 5, [0.0] * 3], 0.0)


def test_a_step_without_a_reward_takes_no_part():
    # y1's second step has none: its first step weighs 1, and nothing follows it; H_1 = 1, so b_2 = 0.5
    shard, rewards, present = two_responses()
    fewer = present & (torch.arange(6) != 5)
    close(pure(shard, rewards, fewer), [[0.5, 0.5, 0.5, 0.0, 0.0], [-0.6, -0.6, -0.6]])
    close(pure(shard, rewards, fewer, baseline="step"), [[1.1, 1.1, 1.1, 0.0, 0.0], [-1.1, -1.1, -1.1]])


def test_order_of_rows_and_padding_do_not_matter():
    lengths, steps = [5, 3, 4], [[0, 0, 0, 1, 1], [0, 0, 0], [0, 0, 1, 1]]
    shard = shard_of(lengths, [1.0, 0.0, 1.0], steps=steps)
    rewards = on_response(shard, [[0, 0, 0.5, 0, 0.5], [0, 0, -0.6], [0, 0.1, 0, 0.9]])
    present = rewards.nan_to_num(0.0) != 0
    settings = {"temperature": 0.5, "baseline": "token", "zero_ends": True}
    found = pure_softmin(rewards, present, shard, **settings)
    assert found.abs().sum() > 0
    order = torch.tensor([2, 0, 1])
    moved = pure_softmin(rewards[order], present[order], shard.select(order), **settings)
    torch.testing.assert_close(moved, found[order])
    wide = shard_of(lengths, [1.0, 0.0, 1.0], steps=steps, padding=2)
    pad = torch.nn.functional.pad
    widened = pure_softmin(pad(rewards, (0, 2), value=torch.nan), pad(present, (0, 2)), wide, **settings)
    torch.testing.assert_close(widened, pad(found, (0, 2)))


def test_several_rewards_in_a_step_are_refused():
    shard, rewards, _ = two_responses()
    with pytest.raises(ConfigError, match="one reward per step"):
        pure(shard, rewards.nan_to_num(0.1))


@pytest.mark.parametrize("temperature", [0.0, -0.1, float("inf"), float("nan")])
def test_temperatures_that_are_none_are_refused(temperature):
    shard, rewards = three_steps()
    with pytest.raises(ConfigError, match="temperature is"):
        pure(shard, rewards, temperature=temperature)
