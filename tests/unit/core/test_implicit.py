from __future__ import annotations

import pytest
import torch

from rlprm.core.implicit import drop_last, implicit_rewards, implicit_stream, sequence_sums, steps_of

MASK = torch.tensor([[False, True, True, True], [False, True, False, False]])
PRM = torch.tensor([[torch.nan, -1.0, -2.0, -3.0], [torch.nan, -1.0, torch.nan, torch.nan]])
REF = torch.tensor([[torch.nan, -2.0, -1.0, -5.0], [torch.nan, -1.5, torch.nan, torch.nan]])
INDEX = torch.tensor([[-1, 0, 0, 1], [-1, 0, -1, -1]])


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


def test_a_dropped_last_token_earns_nothing_and_stays_present():
    stream = drop_last(implicit_stream(PRM, REF, MASK, INDEX, beta=1.0, granularity="token"), MASK)
    assert stream.rewards.tolist() == [[0.0, 1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]  # a response of one token earns 0
    assert stream.present.tolist() == MASK.tolist()


def test_steps_are_counted_and_never_0():
    assert steps_of(INDEX).tolist() == [2, 1]
    assert steps_of(torch.tensor([[-1, -1]])).tolist() == [1]
    assert steps_of(torch.zeros(0, 0, dtype=torch.int64)).tolist() == []  # a rank without rows in a mini-batch
    assert steps_of(torch.zeros(2, 0, dtype=torch.int64)).tolist() == [1, 1]
