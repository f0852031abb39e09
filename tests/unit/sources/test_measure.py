"""PRM quality on a hand-made shard, every number worked out by hand."""

from __future__ import annotations

import pytest
import torch

from rlprm.batch import chosen_rows, pad, unflatten
from rlprm.records import JaggedShard
from rlprm.sources.measure import Measurement, measure, quality
from tests.unit.made import shard

# Five responses to one prompt; each token is a step. The fourth is not fresh, the fifth has no verdict.
#            y1            y2      y3           y4     y5
# rewards    0.2 -0.1      0.3     0.4 0.2      9      9
# log ref   -1 -1         -0.5    -0.1 -0.1     0      0
# outcome    1             0       1            0      absent
# labels     1 1           0       1 0          0      0
LENGTHS = [2, 1, 2, 1, 1]
REWARDS = [0.2, -0.1, 0.3, 0.4, 0.2, 9.0, 9.0]
LOG_REF = [-1.0, -1.0, -0.5, -0.1, -0.1, 0.0, 0.0]


def measured(labels: bool = True, groups: list[int] | None = None):
    made = shard(
        LENGTHS,
        [1.0, 0.0, 1.0, 0.0, None],
        groups=groups,
        labels=[(1, 1), (0,), (1, 0), (0,), (0,)] if labels else None,
        fresh=[True, True, True, False, True],
        train=[True, False, True, True, True],  # what trains does not matter for quality
    )

    def laid_out(values: list[float]) -> torch.Tensor:
        """On the response; NaN on the prompt's token, which nobody may look at."""
        taken = iter(values)
        flat = torch.tensor([torch.nan if step < 0 else next(taken) for step in made.step_index.tolist()])
        return unflatten(flat, made.lengths, fill=float("nan"))

    return by_sum(made, laid_out(REWARDS), laid_out(LOG_REF))


def by_sum(made: JaggedShard, rewards: torch.Tensor, log_ref: torch.Tensor) -> Measurement:
    """As the implicit PRM is measured: every token has a reward, and r(y) is their sum."""
    return measure(made, rewards, pad(made).response_mask, log_ref, pooling="sum", scale="logit")


def test_rows_are_the_fresh_ones_with_a_verdict():
    rows = measured().rows
    assert rows.outcome.tolist() == [1.0, 0.0, 1.0]
    assert rows.reward.tolist() == pytest.approx([0.1, 0.3, 0.6])
    assert rows.reward_no_last.tolist() == pytest.approx([0.2, 0.0, 0.4])
    assert rows.surprisal.tolist() == pytest.approx([-2.0, -0.5, -0.2])
    assert rows.surprisal_no_last.tolist() == pytest.approx([-1.0, 0.0, -0.1])


def test_steps_carry_rewards_baseline_and_labels():
    steps = measured().steps
    assert len(steps) == 3
    assert steps[2][0] == pytest.approx((0.4, 0.2))
    assert steps[2][1] == pytest.approx((-0.1, -0.1))
    assert [labels for _, _, labels in steps] == [(1, 1), (0,), (1, 0)]


def test_quality_by_hand():
    found = quality([measured()])
    expected = {
        # pairs (right, wrong): 0.1 > 0.3 no, 0.6 > 0.3 yes
        "prm/pair_acc_fresh": 0.5,
        "prm/auc_fresh": 0.5,
        # 0.2 > 0 yes, 0.4 > 0 yes
        "prm/pair_acc_fresh_no_last": 1.0,
        "prm/auc_fresh_no_last": 1.0,
        # -2 > -0.5 no, -0.2 > -0.5 yes
        "prm/pair_acc_surprisal": 0.5,
        "prm/auc_surprisal": 0.5,
        # sigmoids 0.524979, 0.574443 (bin 5: |1 - 1.099422|), 0.645656 (bin 6: 0.354344); (0.099422 + 0.354344) / 3
        "prm/ece": 0.151255,
        # deviations (-7, -1, 8)/30 and (1, -2, 1)/3: (1/30) / (sqrt(114)/30 * sqrt(6)/3)
        "prm/corr_with_outcome": 0.114708,
        "prm/mixed_groups": 1.0,
        "prm/fresh_rows": 3.0,
        # right steps 0.2, -0.1, 0.4 against wrong 0.3, 0.2: (0 + 0.5) + (0 + 0) + (1 + 1) of 6
        "prm/step_auc": 2.5 / 6,
        # right -1, -1, -0.1 against wrong -0.5, -0.1: 0 + 0 + (1 + 0.5) of 6
        "prm/step_auc_surprisal": 1.5 / 6,
        # y2: its only step; y3: 0.2 is its lowest and its first wrong one
        "prm/first_wrong_hit": 1.0,
        # y2: its only step; y3: a tie of two
        "prm/first_wrong_hit_surprisal": 0.75,
        "prm/first_wrong_hit_chance": 0.75,
    }
    assert found == pytest.approx(expected, abs=1e-6)


def test_ranks_give_together_what_one_would():
    # two ranks of equal rows under different prompts: pair accuracy is averaged over groups, rows are pooled
    found = quality([measured(groups=[0] * 5), measured(groups=[1] * 5)])
    assert found["prm/fresh_rows"] == 6.0
    assert found["prm/mixed_groups"] == 2.0
    assert found["prm/pair_acc_fresh"] == pytest.approx(0.5)


def test_without_labels_nothing_is_said_of_steps():
    found = quality([measured(labels=False)])
    assert not [name for name in found if "step" in name or "first_wrong" in name]


def test_one_class_only_leaves_the_comparisons_out():
    made = shard([1, 1], [1.0, 1.0])
    zeros = unflatten(torch.zeros(4), made.lengths)
    found = quality([by_sum(made, zeros, zeros)])
    assert found["prm/mixed_groups"] == 0.0
    assert "prm/pair_acc_fresh" not in found
    assert "prm/auc_fresh" not in found
    assert "prm/corr_with_outcome" not in found


def test_a_rank_without_fresh_rows_takes_part():
    made = shard([1, 1], [1.0, 0.0], fresh=[False, False])
    zeros = unflatten(torch.zeros(4), made.lengths)
    empty = by_sum(made, zeros, zeros)
    assert quality([measured(), empty])["prm/fresh_rows"] == 3.0


# Five responses of a PRM that gives each step a probability; each token is a step, None: the PRM could not read it.
#            y1          y2                             y3          y4           y5
# p          0.95 0.95   0.42 (six times)              None None   0.73 None    0.61
# outcome    1           0                              0           1            0
# labels     1 1         1 1 0 0 0 0                    0 0         1 0          0
CHANCES = [0.95, 0.95, *[0.42] * 6, None, None, 0.73, None, 0.61]


def discriminative(scale: str = "probability") -> Measurement:
    made = shard(
        [2, 6, 2, 2, 1],
        [1.0, 0.0, 0.0, 1.0, 0.0],
        labels=[(1, 1), (1, 1, 0, 0, 0, 0), (0, 0), (1, 0), (0,)],
    )
    taken = iter(CHANCES)
    flat = [None if step < 0 else next(taken) for step in made.step_index.tolist()]
    numbers = [torch.nan if each is None else each if scale == "probability" else 2 * each - 1 for each in flat]
    present = torch.tensor([each is not None for each in flat])
    return measure(
        made,
        unflatten(torch.tensor(numbers), made.lengths),
        unflatten(present, made.lengths),
        unflatten(torch.full((len(flat),), -1.0), made.lengths),
        pooling="mean",
        scale=scale,
    )


def test_probabilities_of_steps_are_averaged_over_those_that_are_present():
    rows = discriminative().rows
    assert rows.outcome.tolist() == [1.0, 0.0, 1.0, 0.0]  # nothing is said of y3, so it is no row
    assert rows.reward.tolist() == pytest.approx([0.95, 0.42, 0.73, 0.61])
    assert rows.surprisal.tolist() == [-2.0, -6.0, -2.0, -1.0]
    # without y5's only step nothing is left of it; y4 loses a step that was absent anyway
    assert rows.no_last_present.tolist() == [True, True, True, False]
    assert rows.reward_no_last[:3].tolist() == pytest.approx([0.95, 0.42, 0.73])


def test_absent_steps_are_no_candidates():
    steps = discriminative().steps
    assert [labels for _, _, labels in steps] == [(1, 1), (1, 1, 0, 0, 0, 0), (1, -1), (0,)]
    found = quality([discriminative()])
    # right 0.95, 0.95, 0.42, 0.42, 0.73 against wrong 0.42 (four) and 0.61:
    # 5 + 5 + (4 ties = 2) + 2 + 5 = 19 of 25
    assert found["prm/step_auc"] == pytest.approx(19 / 25)
    # y2: six equal steps, y5: its only one; the wrong step of y4 is absent, so y4 does not count
    assert found["prm/first_wrong_hit"] == pytest.approx((1 / 6 + 1) / 2)
    assert found["prm/first_wrong_hit_chance"] == pytest.approx((1 / 6 + 1) / 2)


@pytest.mark.parametrize("scale", ["probability", "plus_minus"])
def test_quality_of_probabilities_by_hand(scale):
    found = quality([discriminative(scale)])
    # 0.95 and 0.73 beat 0.42 and 0.61; sums would put y2, 2.52, before both right ones, 1.9 and 0.73
    assert found["prm/pair_acc_fresh"] == found["prm/auc_fresh"] == 1.0
    assert found["prm/pair_acc_fresh_no_last"] == found["prm/auc_fresh_no_last"] == 1.0
    assert found["prm/fresh_rows"] == 4.0
    # each in a bin of its own: (|1 - 0.95| + |0 - 0.42| + |1 - 0.73| + |0 - 0.61|) / 4
    assert found["prm/ece"] == pytest.approx(1.35 / 4, abs=1e-6)


def test_a_certain_probability_has_finite_log_odds():
    made = shard([1, 1], [1.0, 0.0])
    sure = unflatten(torch.tensor([0.0, 1.0, 0.0, 0.0]), made.lengths)
    rows = measure(made, sure, pad(made).response_mask, sure, pooling="mean", scale="probability").rows
    assert rows.logit.tolist() == pytest.approx([13.815510, -13.815510], abs=1e-5)  # log((1 - 1e-6) / 1e-6)


def test_a_sum_leaves_out_a_response_of_which_nothing_is_said():
    made = shard([1, 2], [1.0, 0.0])
    rewards = unflatten(torch.tensor([0.0, 2.0, 0.0, 3.0, 4.0]), made.lengths)
    present = unflatten(torch.tensor([False, True, False, False, False]), made.lengths)
    rows = measure(made, rewards, present, rewards, pooling="sum", scale="logit").rows
    assert rows.reward.tolist() == rows.logit.tolist() == [2.0]
    assert rows.no_last_present.tolist() == [True]  # a sum over no step is 0


def test_a_shard_without_rows_gives_an_empty_measurement():
    nobody = chosen_rows(shard([1], [1.0]), torch.zeros(0, dtype=torch.int64))
    nothing = torch.zeros(0, 0)
    empty = by_sum(nobody, nothing, nothing)
    assert len(empty.rows) == len(empty.steps) == 0
    assert quality([empty]) == {"prm/mixed_groups": 0.0, "prm/fresh_rows": 0.0}
    assert quality([measured(), empty]) == quality([measured()])
