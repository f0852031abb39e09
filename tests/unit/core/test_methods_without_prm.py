"""Methods that need no trained PRM, from their YAML to advantages worked out by hand: two responses, outcomes 1 and 0."""

from __future__ import annotations

import pytest
import torch

from rlprm.cli.compose import composed
from rlprm.config import TrainConfig, validated
from rlprm.core.credit import credit, kl_stream, outcome_stream
from rlprm.core.reduce import Identity
from rlprm.records import Stream
from rlprm.run.factories import plans
from tests.unit.core.worked import PROCESS, shard_of

SHARD = shard_of([2, 1], [1.0, 0.0])
KL = kl_stream(torch.tensor([[0.0, 1.0, -3.0], [0.0, 2.0, 0.0]]), torch.zeros(2, 3), SHARD)  # -1, 3 and -2
Z = 0.7071058  # (1 - 1/2) / (sqrt(1/2) + 1e-6)


def advantages(method, streams, *overrides, shard=SHARD):
    config = validated(TrainConfig, composed("train", ["model.path=x", f"method={method}", *overrides]).values)
    return credit(shard, streams, plans(config), Identity(), whiten=config.whiten, trust={})


def rows(found, *lengths):
    return [found.advantages.total[row, 1 : 1 + length].tolist() for row, length in enumerate(lengths)]


def at(rewards, present=None):
    """A stream of rewards on padded tokens, the prompt's one in front."""
    padded = torch.tensor(rewards)
    return Stream(rewards=padded, present=padded != 0 if present is None else torch.tensor(present))


def test_prl_adds_the_kl_that_is_to_come_after_the_z_score():
    found = advantages("prl", {"outcome": outcome_stream(SHARD), "kl": KL})
    # to go: -1 + 3 = 2, 3; -2; times 1/200
    first, second = rows(found, 2, 1)
    assert first == pytest.approx([Z + 0.010, Z + 0.015], abs=1e-6)
    assert second == pytest.approx([-Z - 0.010], abs=1e-6)


def test_prl_in_segments_reads_it_at_the_start_of_each():
    shard = shard_of([3, 1], [1.0, 0.0], steps=[[0, 0, 1], [0]])
    kl = kl_stream(torch.tensor([[0.0, 1.0, -3.0, -4.0], [0.0, 2.0, 0.0, 0.0]]), torch.zeros(2, 4), shard)
    first, second = rows(advantages("prl_segments", {"outcome": outcome_stream(shard), "kl": kl}, shard=shard), 3, 1)
    # -1 + 3 + 4 = 6 for both tokens of the first segment, 4 for the second; times 1/100
    assert first == pytest.approx([Z + 0.06, Z + 0.06, Z + 0.04], abs=1e-6)
    assert second == pytest.approx([-Z - 0.02], abs=1e-6)


def test_the_same_kl_before_the_z_score_vanishes_between_two_responses():
    found = advantages("prl_before", {"outcome": outcome_stream(SHARD), "kl": KL})
    # rewards 1 + 2/200 = 1.01 and 0 - 2/200: whatever their distance, a z-score of two is +-0.7071
    first, second = rows(found, 2, 1)
    assert first == pytest.approx([0.707106] * 2, abs=2e-6)
    assert second == pytest.approx([-0.707106], abs=2e-6)


def test_step_grpo_pays_each_turn_its_z_score_and_nothing_else():
    shard = shard_of([2, 3, 1], [1.0, 0.0, 1.0])
    padded = torch.zeros(3, 4)
    for row, values in enumerate(PROCESS):
        padded[row, 1 : 1 + len(values)] = torch.tensor(values)
    stream = Stream(rewards=padded, present=shard.response_mask)
    found = advantages("step_grpo", {"process": stream}, shard=shard)
    golden = [[0.359720, -0.935272], [-0.071944, 0.791384, -1.366936], [1.223048]]
    for row, expected in zip(rows(found, 2, 3, 1), golden, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


def test_pav_pays_progress_to_its_own_step_and_the_outcome_to_all():
    shard = shard_of([3, 1], [1.0, 0.0], steps=[[0, 0, 1], [0]])
    process = at([[0.0, 0.0, 0.25, -0.5], [0.0, -0.125, 0.0, 0.0]])
    kl = kl_stream(torch.zeros(2, 4), torch.zeros(2, 4), shard)
    found = advantages("pav", {"outcome": outcome_stream(shard), "process": process, "kl": kl}, shard=shard)
    # outcome minus the group mean: +-0.5; alpha 5: 1.25, 1.25, -2.5; -0.625
    assert rows(found, 3, 1) == [[1.75, 1.75, -2.0], [-1.125]]


def test_spro_reads_prefix_sums_against_the_group_at_the_same_token():
    process = at([[0.0, 0.4, -0.2], [0.0, 0.2, 0.0]], [[False, True, True], [False, True, False]])
    first, second = rows(advantages("spro", {"outcome": outcome_stream(SHARD), "process": process}), 2, 1)
    # prefix sums 0.4, 0.2 and 0.2; means 0.3 and (one survivor) its own 0.2
    assert first == pytest.approx([Z + 0.1, Z], abs=1e-6)
    assert second == pytest.approx([-Z - 0.1], abs=1e-6)


def test_rlfr_prices_are_summed_to_go_beside_the_z_score():
    process = at([[0.0, -0.01, -0.008], [0.0, 0.0, 0.0]], [[False, True, True], [False, True, False]])
    first, second = rows(advantages("rlfr", {"outcome": outcome_stream(SHARD), "process": process}), 2, 1)
    assert first == pytest.approx([0.7071068 - 0.018, 0.7071068 - 0.008], abs=1e-6)
    assert second == pytest.approx([-0.7071068], abs=1e-6)


def test_self_certainty_is_added_before_the_z_score_and_decides_where_outcomes_agree():
    both = shard_of([2, 1], [1.0, 1.0])
    process = at([[0.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    found = advantages("self_certainty", {"outcome": outcome_stream(both), "process": process}, shard=both)
    # 1.010 and 1.005: a tiny difference at full size, 0.0025 / (0.0035355 + 1e-6)
    assert rows(found, 2, 1)[0] == pytest.approx([0.706907] * 2, abs=2e-5)


def test_shop_r1_pays_a_level_once_those_before_it_are_full():
    shard = shard_of([2, 1, 1], [1.0, 0.0, 1.0])
    one = [[False, False, True], [False, True, False], [False, True, False]]
    streams = {
        "outcome": outcome_stream(shard),
        "form": at([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], one),
        # right steps: both; half; all, but its form is bad
        "process": at([[0.0, 1.0, 1.0], [0.0, 0.5, 0.0], [0.0, 1.0, 0.0]]),
        "certainty": at([[0.0, 0.0, 0.2], [0.0, 0.4, 0.0], [0.0, 0.6, 0.0]]),
        "kl": kl_stream(torch.zeros(3, 3), torch.zeros(3, 3), shard),
    }
    metrics = advantages("shop_r1", streams, shard=shard).metrics
    # .5 + .3 + 1000 + .005 * .2 = 1000.801; .5 + .3 * .5 + .002 = .652; 0 + .003
    assert metrics["reward/outcome/max"] == pytest.approx(1000.801, abs=1e-3)
    assert metrics["reward/outcome/min"] == pytest.approx(0.003, abs=1e-6)
    assert metrics["reward/outcome/mean"] == pytest.approx((1000.801 + 0.652 + 0.003) / 3, abs=1e-3)


def test_mr_rlvr_is_refused_where_its_tasks_or_their_verifier_are_missing():
    tasks, verifier = "data=chain_arithmetic_masked", "verifier=worked_steps"
    recipe = ["recipe=chain_arithmetic_cpu", "method=mr_rlvr"]
    with pytest.raises(ValueError, match=r"data\.train\.fill\.reader"):
        validated(TrainConfig, composed("train", [*recipe, "data=chain_arithmetic", verifier]).values)
    with pytest.raises(ValueError, match="takes no argument 'order'"):
        validated(TrainConfig, composed("train", [*recipe, tasks, "verifier=chain_arithmetic"]).values)
    config = validated(TrainConfig, composed("train", [*recipe, tasks, verifier]).values)
    assert sorted(config.data.train) == ["chain", "fill", "order"]
