"""The sum form beside PURE's soft minimum: every step counts in full, the baseline is the same."""

from __future__ import annotations

import pytest
import torch

from rlprm.batch import pad
from rlprm.parts import made as made_part
from tests.contract import options as listing
from tests.unit.made import shard

# y1: steps of two tokens each, rewards 1 and 0.5; y2: one step of three tokens, reward -0.6
GROUP = pad(shard([4, 3], [1.0, 0.0], steps=[[0, 0, 1, 1], [0, 0, 0]]))
REWARDS = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.5], [0.0, 0.0, 0.0, -0.6, 0.0]])


def returns(name: str, **changes: object) -> list[float]:
    part = {**listing.read(listing.conf_dir() / "estimator" / f"{name}.yaml"), **changes}
    found = made_part(part)(REWARDS, REWARDS != 0, GROUP)
    return found[GROUP.response_mask].tolist()


def test_sums_with_the_baseline_of_the_others_tokens():
    # y1: b = S_2 / L_2 = -0.6 / 3 = -0.2; a step has one token besides its end: 1.2 and 0.7, summed from each step on 1.9, 0.7
    # y2: b = S_1 / L_1 = 1.5 / 4 = 0.375; two tokens besides the end: -0.6 - 0.75 = -1.35; ends get 0
    assert returns("pure_sum") == pytest.approx([1.9, 0.0, 0.7, 0.0, -1.35, -1.35, 0.0], abs=1e-6)


def test_sums_without_a_baseline_are_plain():
    found = returns("pure_sum", baseline="none", zero_ends=False)
    assert found == pytest.approx([1.5, 1.5, 0.5, 0.5, -0.6, -0.6, -0.6], abs=1e-6)


def test_the_soft_minimum_differs():
    # weights of y1 at 0.1: exp(-5) / (1 + exp(-5)) = 0.006693 and 0.993307, so 0.006693 + 0.496654 = 0.503347
    found = returns("pure_softmin", baseline="none", zero_ends=False)
    assert found == pytest.approx([0.503347, 0.503347, 0.496654, 0.496654, -0.6, -0.6, -0.6], abs=1e-5)
