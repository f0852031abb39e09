from __future__ import annotations

import pytest
import torch

from rlprm.core.implicit import implicit_rewards, implicit_stream, outcome_cross_entropy, sequence_sums
from rlprm.errors import ConfigError

MASK = torch.tensor([[False, True, True, True], [False, True, False, False]])
PRM = torch.tensor([[torch.nan, -1.0, -2.0, -3.0], [torch.nan, -1.0, torch.nan, torch.nan]])
REF = torch.tensor([[torch.nan, -2.0, -1.0, -5.0], [torch.nan, -1.5, torch.nan, torch.nan]])
INDEX = torch.tensor([[-1, 0, 0, 1], [-1, 0, -1, -1]])


def test_cross_entropy_of_the_worked_example():
    # raw log-ratio sums 2, 2, 8; beta 0.05 -> r = 0.1, 0.1, 0.4; sigma 0.524979, 0.524979, 0.598688
    # outcomes 1, 0, 1: losses 0.644397, 0.744397, 0.513015; mean 0.633936
    rewards, outcome = 0.05 * torch.tensor([2.0, 2.0, 8.0]), torch.tensor([1.0, 0.0, 1.0])
    everyone = torch.tensor([True, True, True])
    assert outcome_cross_entropy(rewards, outcome, everyone, 3.0).item() == pytest.approx(0.633936, abs=1e-6)
    for row, expected in enumerate([0.644397, 0.744397, 0.513015]):
        alone = everyone & (torch.arange(3) == row)
        assert outcome_cross_entropy(rewards, outcome, alone, 1.0).item() == pytest.approx(expected, abs=1e-6)


def test_cross_entropy_of_soft_labels_and_large_rewards():
    # label 0.25 at r = 0: log 2 whatever the label; label 1 at r = -100: 100, not infinite
    yes = torch.tensor([True])
    assert outcome_cross_entropy(torch.zeros(1), torch.tensor([0.25]), yes, 1.0).item() == pytest.approx(0.693147)
    assert outcome_cross_entropy(torch.tensor([-100.0]), torch.ones(1), yes, 1.0).item() == pytest.approx(100.0)


def test_absent_outcomes_are_not_learnt_from():
    rewards = torch.tensor([0.0, torch.nan], requires_grad=True)
    outcome_cross_entropy(rewards, torch.tensor([1.0, torch.nan]), torch.tensor([True, False]), 2.0).backward()
    assert rewards.grad.tolist() == [-0.25, 0.0]  # (sigma(0) - 1) / 2


def test_no_outcome_at_all_is_refused():
    with pytest.raises(ConfigError, match="skip the update"):
        outcome_cross_entropy(torch.zeros(1), torch.zeros(1), torch.tensor([False]), 0.0)


def test_token_rewards_are_beta_times_log_ratio_and_nan_stays_masked():
    prm = PRM.clone().requires_grad_()
    rewards = implicit_rewards(prm, REF, MASK, 0.5)
    assert rewards.tolist() == [[0.0, 0.5, -0.5, 1.0], [0.0, 0.25, 0.0, 0.0]]
    rewards.sum().backward()
    assert prm.grad.tolist() == [[0.0, 0.5, 0.5, 0.5], [0.0, 0.5, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("granularity", "rewards", "present"),
    [
        ("token", [[0.0, 1.0, -1.0, 2.0], [0.0, 0.5, 0.0, 0.0]], MASK.tolist()),
        # steps: 1 - 1 = 0 (present, and a true 0) and 2; the short row has one step
        (
            "step",
            [[0.0, 0.0, 0.0, 2.0], [0.0, 0.5, 0.0, 0.0]],
            [[False, False, True, True], [False, True, False, False]],
        ),
        ("whole", [[0.0, 0.0, 0.0, 2.0], [0.0, 0.5, 0.0, 0.0]], [[False] * 3 + [True], [False, True, False, False]]),
    ],
)
def test_granularity(granularity, rewards, present):
    stream = implicit_stream(PRM, REF, MASK, INDEX, beta=1.0, granularity=granularity)
    assert stream.rewards.tolist() == rewards
    assert stream.present.tolist() == present


def test_sums_of_packed_and_padded_sequences_agree():
    values, sequence = torch.tensor([[1.0, 2.0, torch.nan], [4.0, 8.0, 16.0]]), torch.tensor([[0, 0, -1], [1, 1, 1]])
    real = sequence >= 0
    assert sequence_sums(values, sequence, 2).tolist() == [3.0, 28.0]
    assert sequence_sums(values[real][None], sequence[real][None], 2).tolist() == [3.0, 28.0]
