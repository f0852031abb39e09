"""GSPO by hand: s = exp(mean log ratio) of the sequence."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from rlprm.core.policy_loss import Choices
from rlprm.core.policy_loss_sequence import gspo, gspo_token
from rlprm.errors import ConfigError

E2 = math.exp(0.2)  # 1.221403

# Sequence 0: log ratios 0.3, 0.1, mean 0.2. Sequence 1: -0.4 alone. A masked token of sequence 0, then padding.
NEW = [0.3, 0.1, -0.4, torch.nan, 9.0]
GAIN = [1.0, -2.0, 3.0, torch.nan, torch.nan]
ON = [True, True, True, False, False]
SEQUENCE = [0, 0, 1, 0, -1]


def learnt(surrogate, **bounds):
    new = torch.tensor([NEW], dtype=torch.float64).requires_grad_()
    loss, told = surrogate(
        Choices(
            logprobs=new,
            old_logprobs=torch.tensor([[0.0, 0.0, 0.0, torch.nan, 1.0]], dtype=torch.float64),
            advantages=torch.tensor([GAIN], dtype=torch.float64),
            response_mask=torch.tensor([ON]),
            sequence=torch.tensor([SEQUENCE]),
            num_sequences=2,
        ),
        **bounds,
    )
    loss.sum().backward()
    return loss[0].tolist(), new.grad[0].tolist(), {name: values[0].tolist() for name, values in told.items()}


def test_gspo_inside_the_band_shares_one_ratio():
    loss, gradient, told = learnt(gspo, clip_low=0.5, clip_high=0.5)
    assert loss == pytest.approx([-E2, 2 * E2, -3 * math.exp(-0.4), 0, 0])
    # d(-s (1 - 2)) / d log pi_t = s / 2 for both tokens of sequence 0: the credit of single tokens is averaged away
    assert gradient == pytest.approx([E2 / 2, E2 / 2, -3 * math.exp(-0.4), 0, 0])
    assert told["sequence_ratio"] == pytest.approx([E2, E2, math.exp(-0.4), 0, 0])
    assert told["ratio"] == pytest.approx([math.exp(0.3), math.exp(0.1), math.exp(-0.4), 0, 0])
    assert told["ppo_kl"] == pytest.approx([-0.3, -0.1, 0.4, 0, 0])


def test_gspo_token_keeps_the_value_and_each_tokens_own_credit():
    loss, gradient, _ = learnt(gspo_token, clip_low=0.5, clip_high=0.5)
    assert loss == pytest.approx([-E2, 2 * E2, -3 * math.exp(-0.4), 0, 0])
    assert gradient == pytest.approx([-E2, 2 * E2, -3 * math.exp(-0.4), 0, 0])  # -s A_t


@pytest.mark.parametrize(
    ("surrogate", "gradient"),
    [
        # band 0.9 to 1.1: token 1 (A > 0, s = 1.22) is flat, token 2 (A < 0) is not, sequence 1 (A > 0, s = 0.67) is not.
        # GSPO: token 2's loss 2 s goes to both tokens alike, s each; the token form leaves it where it is.
        (gspo, [E2, E2, -3 * math.exp(-0.4), 0, 0]),
        (gspo_token, [0, 2 * E2, -3 * math.exp(-0.4), 0, 0]),
    ],
)
def test_clipped_by_the_sequences_ratio(surrogate, gradient):
    loss, found, told = learnt(surrogate, clip_low=0.1, clip_high=0.1)
    assert loss == pytest.approx([-1.1, 2 * E2, -3 * math.exp(-0.4), 0, 0])
    assert found == pytest.approx(gradient)
    assert told["pg_clipfrac"] == [1, 0, 0, 0, 0]


def test_equal_advantages_make_both_forms_the_same():
    def run(surrogate):
        new = torch.tensor([[0.3, 0.1, -0.4]], dtype=torch.float64).requires_grad_()
        loss, _ = surrogate(
            Choices(
                logprobs=new,
                old_logprobs=torch.zeros(1, 3, dtype=torch.float64),
                advantages=torch.full((1, 3), 2.0, dtype=torch.float64),
                response_mask=torch.ones(1, 3, dtype=torch.bool),
                sequence=torch.zeros(1, 3, dtype=torch.int64),
                num_sequences=1,
            )
        )
        loss.mean().backward()
        return loss, new.grad

    wide = {"clip_low": 0.9, "clip_high": 0.9}
    torch.testing.assert_close(run(partial(gspo, **wide)), run(partial(gspo_token, **wide)))


@pytest.mark.parametrize("surrogate", [gspo, gspo_token])
@pytest.mark.parametrize("bounds", [{"clip_low": 0.0, "clip_high": 0.1}, {"clip_low": 0.1, "clip_high": 0.0}])
def test_bounds_that_cannot_be_are_refused(surrogate, bounds):
    with pytest.raises(ConfigError, match="clip bounds"):
        learnt(surrogate, **bounds)
