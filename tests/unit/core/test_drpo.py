"""DRPO's weights by hand, and that with the aggregation they are the gradient of its loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rlprm.core.credit import outcome_stream
from rlprm.core.drpo import drpo
from rlprm.core.kl import TrustRegion
from rlprm.core.policy_loss import Choices, Denominators, aggregation_weights, weighted_sum
from rlprm.core.policy_loss_free import reinforce
from rlprm.core.reduce import Identity
from rlprm.errors import ConfigError
from tests.unit.core.worked import shard_of

SETTINGS = {"tau": 2.0, "lam": 0.5, "max_length": 8}


def logged(shard, rows):
    """The shard with these log mu on each row's response, NaN elsewhere."""
    values = torch.full(shard.tokens.shape, torch.nan)
    for row, entries in enumerate(rows):
        values[row, shard.response_mask[row]] = torch.tensor(entries)
    return replace(shard, rollout_logprobs=values)


def example():
    """Group 3: right (2 tokens), right (4), wrong (mean log-prob -1), wrong (-3). Group 5: right only. Group 8: one of
    each, and a response without a verdict."""
    shard = shard_of(
        [2, 4, 2, 1, 1, 2, 1, 1, 3], [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, None], groups=[3, 3, 3, 3, 5, 5, 8, 8, 8]
    )
    rows = [[-1.0, -1.0], [-1.0] * 4, [-0.5, -1.5], [-3.0], [-1.0], [-1.0] * 2, [-2.0], [-2.0], [-1.0] * 3]
    return logged(shard, rows)


def weights(shard, **changes):
    stream = outcome_stream(shard)
    found = drpo(stream.rewards, stream.present, shard, Identity(), **{**SETTINGS, **changes})
    assert torch.all(found[~stream.present] == 0)
    return found.sum(1).tolist()


def test_weights_by_hand():
    # right: exp((1 - 2/8) / 0.5) = exp(1.5), exp((1 - 4/8) / 0.5) = e: shares 1 / (1 + e^-0.5) = 0.622459, 0.377541
    # wrong: exp(-1/2), exp(-3/2): shares 1 / (1 + e^-1) = 0.731059, 0.268941; times K = 4
    assert weights(example())[:4] == pytest.approx([2.489837, 1.510163, -2.924234, -1.075766], abs=1e-6)


def test_a_group_without_both_classes_teaches_nothing():
    assert weights(example())[4:6] == [0.0, 0.0]


def test_absent_verdicts_are_in_neither_class_and_not_in_k():
    assert weights(example())[6:] == pytest.approx([2.0, -2.0, 0.0])


def test_graded_rewards_are_in_neither_class():
    shard = shard_of([1, 1, 1], [1.0, 0.5, 0.0])
    assert weights(logged(shard, [[-1.0]] * 3)) == pytest.approx([3.0, 0.0, -3.0])


def test_extremes_neither_overflow_nor_vanish():
    shard = logged(shard_of([1, 1, 1, 1], [1.0, 1.0, 0.0, 0.0]), [[-1.0], [-1.0], [-1e4], [0.0]])
    assert weights(shard, lam=1e-4, max_length=1000, tau=1e-3) == pytest.approx([2.0, 2.0, 0.0, -4.0])


def test_a_right_answer_is_never_pushed_down_and_a_shorter_one_gains_more():
    shard = logged(shard_of([1, 8, 1], [1.0, 1.0, 0.0]), [[-1.0], [-1.0] * 8, [-1.0]])
    short, long, _ = weights(shard, lam=0.1)
    assert short > long >= 0


def test_with_the_aggregation_it_is_the_gradient_of_the_authors_loss():
    """Their loss by autograd, ``-(1/Q) sum_q sum_right (w / sum w) (s - tau log sum_wrong exp(s / tau))``."""
    whole = example()
    shard = whole.select(torch.arange(6))  # equal outcomes known; groups of four and two
    shard = replace(shard, group=torch.tensor([3, 3, 3, 3, 5, 5]))
    # equal group sizes, as the authors assume: group 5 gets two more right answers
    shard = shard.select(torch.tensor([0, 1, 2, 3, 4, 5, 4, 5]))
    mask = shard.response_mask
    start = torch.where(mask, shard.rollout_logprobs, 0.0).double()
    theirs = start.clone().requires_grad_()
    lengths = mask.sum(1)
    mean = torch.where(mask, theirs, 0.0).sum(1) / lengths
    omega = ((1 - lengths / 8) / 0.5).exp()
    loss = -((omega[:2] / omega[:2].sum()) * (mean[:2] - 2.0 * (mean[2:4] / 2.0).logsumexp(0))).sum() / 2
    loss.backward()

    stream = outcome_stream(shard)
    gain = drpo(stream.rewards, stream.present, shard, Identity(), **SETTINGS).sum(1, keepdim=True).expand(mask.shape)
    ours = start.clone().requires_grad_()
    sequence = torch.arange(8)[:, None].expand(mask.shape)
    surrogate, _ = reinforce(
        Choices(
            logprobs=ours,
            old_logprobs=start,
            advantages=gain.double(),
            response_mask=mask,
            sequence=sequence,
            num_sequences=8,
        )
    )
    share = aggregation_weights(
        mask,
        sequence,
        8,
        mode="seq-mean-token-mean",
        denominators=Denominators.count(lengths, Identity()),
        horizon=None,
    )
    weighted_sum(surrogate, share.double()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-8)
    assert float(theirs.grad.abs().sum()) > 0.5


@pytest.mark.parametrize("setting", [{"tau": 0.0}, {"lam": -1.0}, {"max_length": 0}, {"tau": math.inf}])
def test_settings_that_cannot_be_are_refused(setting):
    with pytest.raises(ConfigError, match="drpo has"):
        weights(example(), **setting)


def test_trust_region_prices_what_lies_beyond_delta_only():
    region = TrustRegion(weight=1000.0, delta=1e-4)
    # 1000 * (0.0006 - 0.0001)
    assert region.factor(6e-4) == pytest.approx(0.5)
    assert region.factor(1e-4) == region.factor(-0.3) == 0.0
