"""`reward/{stream}/right_mean` and its neighbours, by hand and over shards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlprm.contract.ranks import on_ranks
from rlprm.core.credit_metrics import agreement_metrics
from rlprm.core.metrics import check_name
from rlprm.core.reduce import Identity
from rlprm.records import Stream
from tests.unit.core.worked import example, process_stream, shard_of


def test_by_hand():
    # sums 0.1, 0.2, 0.4 with outcomes 1, 0, 1: right (0.1 + 0.4) / 2, wrong 0.2
    # deviations -0.13333, -0.03333, 0.16667 and 1/3, -2/3, 1/3: products 0.033333; squares 0.046667 and 0.666667
    # 0.033333 / sqrt(0.0311111) = 0.188982
    shard = example()
    found = agreement_metrics({"process": process_stream(shard)}, shard, Identity())
    assert found == {
        "reward/process/right_mean": pytest.approx(0.25, abs=1e-6),
        "reward/process/wrong_mean": pytest.approx(0.2, abs=1e-6),
        "reward/process/right_wrong_gap": pytest.approx(0.05, abs=1e-6),
        "reward/process/corr_with_outcome": pytest.approx(0.188982, abs=1e-5),
    }
    for name in found:
        check_name(name)


def test_unjudged_untrained_and_unpaid_responses_are_not_counted():
    shard = shard_of([2, 3, 1], [1.0, None, 1.0])
    stream = process_stream(shard)
    found = agreement_metrics({"process": stream}, shard, Identity())
    assert found["reward/process/right_mean"] == pytest.approx(0.25, abs=1e-6)
    assert "reward/process/wrong_mean" not in found  # nobody is known to be wrong
    assert "reward/process/right_wrong_gap" not in found
    assert "reward/process/corr_with_outcome" not in found
    untrained = replace(example(), train=torch.tensor([True, True, False]))
    found = agreement_metrics({"process": stream}, untrained, Identity())
    assert found["reward/process/right_mean"] == pytest.approx(0.1, abs=1e-6)
    unpaid = Stream(rewards=stream.rewards, present=stream.present & torch.tensor([[True], [True], [False]]))
    assert agreement_metrics({"process": unpaid}, example(), Identity()) == found


def test_a_stream_that_pays_all_alike_has_no_correlation_and_outcome_and_kl_are_left_out():
    shard = example()
    last = Stream(rewards=torch.full((3, 4), 0.7), present=shard.response_mask & (shard.step_index == 0))
    found = agreement_metrics({"process": last, "outcome": last, "kl": last}, shard, Identity())
    assert set(found) == {f"reward/process/{key}" for key in ("right_mean", "wrong_mean", "right_wrong_gap")}
    assert found["reward/process/right_wrong_gap"] == pytest.approx(0.0, abs=1e-6)


def test_shards_give_the_numbers_of_the_whole():
    shard = shard_of([2, 3, 1, 2], [1.0, 0.0, 1.0, 0.0], groups=[0, 0, 1, 1])
    rewards = torch.tensor([0.3, -0.2, 0.9, 0.1])[:, None].expand_as(shard.rollout_logprobs).contiguous()
    stream = Stream(rewards=rewards, present=shard.response_mask)
    whole = agreement_metrics({"process": stream}, shard, Identity())
    parts = [[0, 1], [2, 3], []]

    def measured(rows, reduce):
        chosen = torch.tensor(rows, dtype=torch.int64)
        return agreement_metrics({"process": stream.select(chosen)}, shard.select(chosen), reduce)

    assert len(whole) == 4
    for found in on_ranks(measured, parts):
        assert found == pytest.approx(whole, abs=1e-12)
