from __future__ import annotations

import pytest
import torch

from rlprm.core.best_of_group import best_of_group
from rlprm.core.credit import outcome_stream
from rlprm.core.reduce import Identity
from rlprm.errors import ConfigError
from tests.unit.core.worked import shard_of


def earned(outcomes, groups, scale="none", eps=0.0):
    stream = outcome_stream(shard := shard_of([2] * len(outcomes), outcomes, groups=groups))
    found = best_of_group(stream.rewards, stream.present, shard, Identity(), scale=scale, eps=eps)
    assert torch.all(found[~stream.present] == 0)
    return found.sum(1).tolist()


def test_the_best_earns_its_lead_and_nobody_else_anything():
    # group 1: 0.9 leads 0.4; group 2: two share the best; group 3: alone; group 4: a sibling without a verdict
    outcomes = [0.4, 0.9, 0.1, 1.0, 1.0, 0.0, 1.0, 1.0, None]
    groups = [1, 1, 1, 2, 2, 2, 3, 4, 4]
    assert earned(outcomes, groups) == pytest.approx([0, 0.5, 0, 0, 0, 0, 0, 0, 0])


def test_divided_by_the_groups_deviation():
    # Bessel deviation of [1, 0, 0] is sqrt(1/3)
    assert earned([1.0, 0.0, 0.0], [0, 0, 0], "group_std", 1e-6) == pytest.approx([3**0.5, 0, 0], abs=1e-5)


@pytest.mark.parametrize(("scale", "eps"), [("none", 1e-6), ("group_std", 0.0), ("group_std", -1.0)])
def test_scale_and_eps_must_fit(scale, eps):
    with pytest.raises(ConfigError, match="best_of_group"):
        earned([1.0, 0.0], [0, 0], scale, eps)
