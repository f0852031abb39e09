from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlprm.core.estimators import as_value, gae, none, step_local, to_go, to_go_from_step
from rlprm.errors import ConfigError
from tests.unit.core.worked import close, example, off_response, on_response, process_stream, shard_of


def test_none_leaves_rewards_where_they_are():
    shard = example()
    stream = process_stream(shard)
    close(off_response(none(stream.rewards, stream.present, shard), shard), [[0.2, -0.1], [0.1, 0.3, -0.2], [0.4]])


def test_to_go_of_the_worked_example():
    shard = example()
    stream = process_stream(shard)
    found = off_response(to_go(stream.rewards, stream.present, shard, gamma=1.0), shard)
    close(found, [[0.1, -0.1], [0.2, 0.1, -0.2], [0.4]])
    # gamma 0.5: 0.2 - 0.05; 0.1 + 0.15 - 0.05, 0.3 - 0.1
    found = off_response(to_go(stream.rewards, stream.present, shard, gamma=0.5), shard)
    close(found, [[0.15, -0.1], [0.2, 0.2, -0.2], [0.4]])


def test_to_go_carries_through_tokens_that_were_not_sampled():
    # tool output between the two sampled tokens: one discount, not two, and no advantage on the tool's token
    shard = shard_of([3], [1.0])
    mask = shard.response_mask.clone()
    mask[0, 2] = False
    shard = replace(shard, response_mask=mask)
    rewards = torch.tensor([[torch.nan, 0.0, torch.nan, 1.0]])
    assert to_go(rewards, mask, shard, gamma=0.5).tolist() == [[0.0, 0.5, 0.0, 1.0]]


def test_step_local_pays_each_token_with_its_step():
    # steps of y2: {0.1, 0.3} and {-0.2}
    shard = shard_of([3, 1], [1.0, 0.0], steps=[[0, 0, 1], [0]])
    rewards = on_response(shard, [[0.1, 0.3, -0.2], [0.4]])
    close(off_response(step_local(rewards, shard.response_mask, shard), shard), [[0.4, 0.4, -0.2], [0.4]])


def test_gae_golden():
    # delta = 0.6 - 0.5, 0.7 - 0.6, 1 - 0.7; A = 0.3, 0.1 + 0.95 * 0.3, 0.1 + 0.95 * 0.385
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    advantages, targets = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.46575, 0.385, 0.3], abs=1e-6)
    assert targets[0].tolist() == pytest.approx([0.96575, 0.985, 1.0], abs=1e-6)


def test_gae_carries_masked_tokens_through():
    # the golden row with a tool token in the middle and padding behind: the same numbers, and 0 where masked
    mask = torch.tensor([[True, True, False, True, False]])
    rewards = torch.tensor([[0.0, 0.0, torch.nan, 1.0, torch.nan]])
    values = torch.tensor([[0.5, 0.6, torch.nan, 0.7, torch.nan]])
    advantages, targets = gae(rewards, values, mask, 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.46575, 0.385, 0.0, 0.3, 0.0], abs=1e-6)
    assert targets[0].tolist() == pytest.approx([0.96575, 0.985, 0.0, 1.0, 0.0], abs=1e-6)


def test_discounts_outside_the_unit_interval_are_refused():
    shard = example()
    stream = process_stream(shard)
    with pytest.raises(ConfigError, match=r"gamma is 1\.5"):
        to_go(stream.rewards, stream.present, shard, gamma=1.5)
    with pytest.raises(ConfigError, match=r"lam is -0\.1"):
        gae(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), 1.0, -0.1)


def test_to_go_from_step_gives_a_step_one_number():
    # steps of y2: {0.1, 0.3} and {-0.2}: 0.2 for the first, -0.2 for the second; each token its own step: plain to_go
    shard = shard_of([3, 1], [1.0, 0.0], steps=[[0, 0, 1], [0]])
    rewards = on_response(shard, [[0.1, 0.3, -0.2], [0.4]])
    close(off_response(to_go_from_step(rewards, shard.response_mask, shard), shard), [[0.2, 0.2, -0.2], [0.4]])
    whole = example()
    stream = process_stream(whole)
    found = off_response(to_go_from_step(stream.rewards, stream.present, whole), whole)
    close(found, [[0.1, -0.1], [0.2, 0.1, -0.2], [0.4]])


def test_as_value_is_minus_what_came_before():
    # prefix sums [0.2, 0.1], [0.1, 0.4, 0.2], [0.4], one token late and negated
    shard = example()
    stream = process_stream(shard)
    found = off_response(as_value(stream.rewards, stream.present, shard), shard)
    close(found, [[0.0, -0.2], [0.0, -0.1, -0.4], [0.0]])


def test_outcome_to_go_and_the_stream_as_value_make_outcome_minus_value():
    # outcomes 1, 0, 1 at the last token, beside prefix sums before each token
    shard = example()
    stream = process_stream(shard)
    outcome = on_response(shard, [[torch.nan, 1.0], [torch.nan, torch.nan, 0.0], [1.0]])
    total = to_go(outcome, outcome.isfinite(), shard, gamma=1.0) + as_value(stream.rewards, stream.present, shard)
    close(off_response(total, shard), [[1.0, 0.8], [0.0, -0.1, -0.4], [1.0]])
