"""Losses of an implicit PRM against numbers worked out by hand.

The worked responses: rewards 0.1, 0.1 and 0.4 (raw log-ratio sums 2, 2 and 8 times beta 0.05), outcomes 1, 0 and 1, one
group; so the pairs are (y1, y2) with gap 0 and (y3, y2) with gap 0.3.
"""

from __future__ import annotations

from functools import partial
from math import exp, log

import pytest
import torch

from rlprm.core.prm_losses import (
    bco,
    ce,
    ce_dataset_balanced,
    ce_instance_balanced,
    check_loss,
    dpo,
    dpo_detached,
    kto_paired,
    kto_unpaired,
    nca,
    slopes,
)
from rlprm.core.reduce import Identity
from rlprm.errors import ConfigError

DETACHED = partial(dpo_detached, weighting="none")
KTO = partial(kto_unpaired, desirable=1.0, undesirable=1.0)
BCO = partial(bco, decay=0.9)
EVERY = {
    "ce": ce, "ce_instance_balanced": ce_instance_balanced, "ce_dataset_balanced": ce_dataset_balanced, "bco": BCO,
    "dpo": dpo, "dpo_detached": DETACHED, "dpo_bon_reward": partial(dpo_detached, weighting="bon_reward"),
    "dpo_bon_outcome": partial(dpo_detached, weighting="bon_outcome"), "nca": nca, "kto_paired": kto_paired,
    "kto_unpaired": KTO,
}  # fmt: skip
PAIRED = ["dpo", "nca", "kto_paired"]


def sigma(x: float) -> float:
    return 1 / (1 + exp(-x))


def run(loss, rewards, outcome, groups=None, present=None, state=None):
    """(share, slopes) of float32 rewards on one rank."""
    return slopes(
        loss,
        torch.tensor(rewards),
        torch.tensor(outcome),
        torch.tensor(present or [True] * len(rewards)),
        torch.tensor(groups or [0] * len(rewards)),
        Identity(),
        state or {},
    )


def worked(loss, **settings):
    return run(loss, [0.1, 0.1, 0.4], [1.0, 0.0, 1.0], **settings)


def test_cross_entropy_of_the_worked_example():
    # sigma 0.524979, 0.524979, 0.598688: losses 0.644397, 0.744397, 0.513015; mean 0.633936
    share, slope = worked(ce)
    assert share.loss.item() == pytest.approx(0.633936, abs=1e-6)
    assert share.terms == 3
    # dL/dr_i = (sigma(r_i) - outcome_i) / 3
    assert slope.tolist() == pytest.approx([(0.524979 - 1) / 3, 0.524979 / 3, (0.598688 - 1) / 3], abs=1e-6)
    for row, expected in enumerate([0.644397, 0.744397, 0.513015]):
        alone = [each == row for each in range(3)]
        assert worked(ce, present=alone)[0].loss.item() == pytest.approx(expected, abs=1e-6)


def test_cross_entropy_of_soft_labels_and_large_rewards():
    # label 0.25 at r = 0: log 2 whatever the label, with slope 1/2 - 1/4; label 1 at r = -100: 100, not infinite
    share, slope = run(ce, [0.0], [0.25])
    assert share.loss.item() == pytest.approx(log(2))
    assert slope.item() == pytest.approx(0.25)
    assert run(ce, [-100.0], [1.0])[0].loss.item() == pytest.approx(100.0)


def test_instance_balance_is_within_each_prompt():
    # group 0: two right (weight 3/4 each) and one wrong (3/2); group 1: all right, left out
    share, slope = run(ce_instance_balanced, [0.0] * 5, [1.0, 0.0, 1.0, 1.0, 1.0], groups=[0, 0, 0, 1, 1])
    assert share.loss.item() == pytest.approx(log(2))
    assert share.terms == 3
    # weight * (sigma - outcome) / 3: -0.75/2/3, 1.5/2/3
    assert slope.tolist() == pytest.approx([-0.125, 0.25, -0.125, 0.0, 0.0])


def test_dataset_balance_is_within_the_step():
    # four right, one wrong: 5/8 each and 5/2; the wrong one pushes as much as all right ones together
    share, slope = run(ce_dataset_balanced, [0.0] * 5, [1.0, 0.0, 1.0, 1.0, 1.0], groups=[0, 0, 0, 1, 1])
    assert share.loss.item() == pytest.approx(log(2))
    assert slope.tolist() == pytest.approx([-0.0625, 0.25, -0.0625, -0.0625, -0.0625])
    assert run(ce_dataset_balanced, [0.0, 0.0], [1.0, 1.0])[0].terms == 0


def test_dpo_averages_all_pairs():
    # -log sigma(0) = 0.693147, -log sigma(0.3) = 0.554355; mean 0.623751
    share, slope = worked(dpo)
    assert share.loss.item() == pytest.approx(0.623751, abs=1e-6)
    assert share.pairs == share.terms == 2
    # slope of a pair's right response: -sigma(-gap) / 2 = -0.25 and -0.425557 / 2; the wrong one has the opposite of both
    assert slope.tolist() == pytest.approx([-0.25, 0.462779, -0.212779], abs=1e-6)


def test_pairs_stay_within_their_prompt_and_split_at_one_half():
    # group 4: outcomes 0.6 (right) and 0.5 (wrong); group 2: one response only. Rows of a group are not neighbours.
    share, slope = run(dpo, [1.0, 5.0, 0.0], [0.6, 1.0, 0.5], groups=[4, 2, 4])
    assert share.pairs == 1
    assert share.loss.item() == pytest.approx(-log(sigma(1.0)))
    assert slope[1] == 0


def test_nca_of_the_worked_example():
    # y1 with y2: 0.644397 + (0.744397 + 0.744397) / 2 = 1.388794
    # y3 with y2: 0.513015 + (0.913015 + 0.744397) / 2 = 1.341721; mean 1.365257
    assert worked(nca)[0].loss.item() == pytest.approx(1.365257, abs=2e-6)


def test_paired_kto_measures_each_side_from_the_other():
    # over the two pairs: mean r+ = 0.25, mean r- = 0.1
    # right: 1 - sigma(0), 1 - sigma(0.3) = 0.5, 0.425557; wrong, twice: 1 - sigma(0.25 - 0.1) = 0.462570
    share, _ = worked(kto_paired)
    assert share.loss.item() == pytest.approx((0.5 + 0.425557 + 2 * 0.462570) / 4, abs=1e-6)
    # below 0 the reference points stay at 0: 1 - sigma(-1) for right, 1 - sigma(2) for wrong
    share, _ = run(kto_paired, [-1.0, -2.0], [1.0, 0.0])
    assert share.loss.item() == pytest.approx((sigma(1.0) + sigma(-2.0)) / 2)


def test_unpaired_kto_measures_from_the_mean_of_the_step():
    # z = 0.2: right 1 - sigma(-0.1) = 0.524979, 1 - sigma(0.2) = 0.450166; wrong 1 - sigma(0.1) = 0.475021
    share, _ = worked(KTO)
    assert share.shift == pytest.approx(0.2)
    assert share.loss.item() == pytest.approx((0.524979 + 0.450166 + 0.475021) / 3, abs=1e-6)
    weighted, _ = worked(partial(kto_unpaired, desirable=1.0, undesirable=2.0))
    assert weighted.loss.item() == pytest.approx((0.524979 + 0.450166 + 2 * 0.475021) / 3, abs=1e-6)
    assert run(KTO, [-1.0, -2.0], [1.0, 0.0])[0].shift == 0.0


def test_kto_reference_points_carry_no_gradient():
    # of a right response at r with z = r: -sigma'(0) = -1/4; with the gradient through z it would be 0
    assert run(KTO, [0.5], [1.0])[1].item() == pytest.approx(-0.25)
    _, slope = run(kto_paired, [0.5, 0.5], [1.0, 0.0])
    assert slope.tolist() == pytest.approx([-0.125, 0.125])


def test_bco_shifts_by_a_moving_mean_of_both_class_means():
    # class means 0.25 and 0.1: shift 0.175; losses -log sigma(-0.075), -log sigma(0.075), -log sigma(0.225)
    share, slope = worked(BCO)
    assert share.shift == pytest.approx(0.175)
    assert share.loss.item() == pytest.approx((0.731350 + 0.656350 + 0.586962) / 3, abs=2e-6)
    assert share.state == {"right": pytest.approx(0.25), "wrong": pytest.approx(0.1)}
    assert slope[0].item() == pytest.approx(-sigma(0.075) / 3)  # no gradient through the shift
    # the next step: 0.9 * 0.25 + 0.1 * 1.25 = 0.35 and 0.9 * 0.1 + 0.1 * -0.9 = 0
    following, _ = run(BCO, [1.25, -0.9], [1.0, 0.0], state=share.state)
    assert following.state == {"right": pytest.approx(0.35), "wrong": pytest.approx(0.0, abs=1e-7)}
    assert following.shift == pytest.approx(0.175)


def test_bco_is_balanced_where_a_pooled_mean_is_not():
    # nine right responses at 1 and one wrong at -1: balanced 0, pooled 0.8
    assert run(BCO, [1.0] * 9 + [-1.0], [1.0] * 9 + [0.0])[0].shift == pytest.approx(0.0, abs=1e-7)


def test_bco_waits_for_both_classes():
    share, _ = run(BCO, [2.0], [1.0])
    assert share.shift == 0.0
    assert share.state == {"right": 2.0}
    later, _ = run(BCO, [-1.0], [0.0], state=share.state)
    assert later.shift == pytest.approx(0.5)
    assert (
        run(BCO, [3.0], [1.0], state=later.state)[0].state["wrong"] == -1.0
    )  # a class that is not there keeps its mean


def test_detached_dpo_compares_with_the_mean_of_the_other_side():
    # y1: 0.1 - 0.1; y2: -(0.1 - (0.1 + 0.4) / 2) = 0.15; y3: 0.4 - 0.1 = 0.3
    share, slope = worked(DETACHED)
    assert share.loss.item() == pytest.approx((0.693147 + 0.620957 + 0.554355) / 3, abs=2e-6)
    assert share.pairs == 2
    assert slope[0].item() == pytest.approx(-0.5 / 3)  # nothing of what y2 sees in it


def test_detached_dpo_without_an_opposite_is_the_cross_entropy():
    rewards, right = [0.3, -0.7], [1.0, 1.0]
    for found, expected in zip(run(DETACHED, rewards, right), run(ce, rewards, right), strict=True):
        torch.testing.assert_close(getattr(found, "loss", found), getattr(expected, "loss", expected))


def test_best_of_n_weights():
    # K = 3. Outcomes at most its own: 3/3, 1/3, 3/3 -> w = 3 P^2 = 3, 1/3, 3. Rewards: 2/3, 2/3, 3/3 -> 4/3, 4/3, 3
    losses = [0.693147, 0.620957, 0.554355]
    by_outcome, _ = worked(EVERY["dpo_bon_outcome"])
    by_reward, _ = worked(EVERY["dpo_bon_reward"])
    assert by_outcome.loss.item() == pytest.approx((3 * losses[0] + losses[1] / 3 + 3 * losses[2]) / 3, abs=3e-6)
    assert by_reward.loss.item() == pytest.approx((4 * losses[0] + 4 * losses[1] + 9 * losses[2]) / 9, abs=3e-6)


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"ce"}))
def test_a_response_is_right_above_one_half(name):
    share, slope = run(EVERY[name], [0.0, 0.0], [0.6, 0.4])
    assert share.terms == (1 if name in PAIRED else 2)
    assert share.pairs in (None, 1)
    assert slope[0] < 0 < slope[1]
    if name == "bco":
        assert set(share.state) == {"right", "wrong"}
    # two of a kind, on either side: nothing to compare, or pushed the same way
    for outcomes in ([0.6, 0.7], [0.4, 0.3]):
        alike, same = run(EVERY[name], [0.0, 0.0], outcomes)
        assert alike.terms == 0 or float(same[0] * same[1]) > 0
        assert alike.pairs in (None, 0)


@pytest.mark.parametrize("name", EVERY)
def test_absent_responses_are_never_read(name):
    given = [0.1, 0.1, 0.4], [1.0, 0.0, 1.0]
    expected, slope = run(EVERY[name], *given)
    for garbage in (torch.nan, torch.inf, 1e30):
        found, wider = run(EVERY[name], [*given[0], garbage], [*given[1], garbage], present=[True, True, True, False])
        assert found.loss.item() == expected.loss.item()
        assert wider.tolist() == [*slope.tolist(), 0.0]
    nothing, none = run(EVERY[name], [torch.nan], [torch.nan], present=[False])
    assert nothing.terms == 0
    assert nothing.loss.item() == 0
    assert none.tolist() == [0.0]


@pytest.mark.parametrize("name", EVERY)
def test_a_rank_without_responses_takes_part(name):
    share, slope = slopes(
        EVERY[name], torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.bool),
        torch.zeros(0, dtype=torch.int64), Identity(), {},
    )  # fmt: skip
    assert share.terms == 0
    assert share.loss.item() == 0
    assert slope.shape == (0,)


@pytest.mark.parametrize("name", PAIRED)
def test_a_step_without_a_pair_has_nothing_to_learn(name):
    # right and wrong, but to different prompts
    share, slope = run(EVERY[name], [1.0, -1.0], [1.0, 0.0], groups=[0, 1])
    assert share.terms == share.pairs == 0
    assert slope.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", EVERY)
def test_every_loss_raises_right_and_lowers_wrong_responses(name):
    check_loss(EVERY[name])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (partial(bco, decay=1.0), "decay is 1.0; expected a number in"),
        (partial(kto_unpaired, desirable=0.0, undesirable=1.0), "expected both above 0"),
        (lambda rewards, *rest: ce(-rewards, *rest), "expected a negative and a positive one"),
    ],
)
def test_impossible_losses_are_refused_at_start_up(loss, message):
    with pytest.raises(ConfigError, match=message):
        check_loss(loss)
