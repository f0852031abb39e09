"""PRM quality on a hand-made shard, every number worked out by hand."""

from __future__ import annotations

import pytest
import torch

from rlprm.batch import unflatten
from rlprm.sources.measure import measure, quality
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

    return measure(made, laid_out(REWARDS), laid_out(LOG_REF))


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
    found = quality([measure(made, zeros, zeros)])
    assert found["prm/mixed_groups"] == 0.0
    assert "prm/pair_acc_fresh" not in found
    assert "prm/auc_fresh" not in found
    assert "prm/corr_with_outcome" not in found


def test_a_rank_without_fresh_rows_takes_part():
    made = shard([1, 1], [1.0, 0.0], fresh=[False, False])
    zeros = unflatten(torch.zeros(4), made.lengths)
    empty = measure(made, zeros, zeros)
    assert quality([measured(), empty])["prm/fresh_rows"] == 3.0
