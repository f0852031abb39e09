from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from rlprm.core.credit import StreamPlan, credit, outcome_stream
from rlprm.core.estimators import to_go
from rlprm.core.gates import open_gate
from rlprm.core.merge import separate
from rlprm.core.reduce import Identity
from rlprm.core.remax import minus_greedy
from rlprm.errors import ConfigError
from tests.unit.core.worked import shard_of


def example():
    """Greedy responses: right, wrong, without verdict."""
    shard = shard_of([2, 3, 1, 2, 2], [1.0, 0.0, 1.0, None, 1.0], groups=[1, 1, 2, 2, 3])
    return replace(
        shard,
        greedy_outcome=torch.tensor([1.0, 1.0, 0.0, 0.0, torch.nan]),
        greedy_present=torch.tensor([True, True, True, True, False]),
    )


def test_outcome_minus_the_greedy_outcome():
    shard = example()
    stream = outcome_stream(shard)
    found = minus_greedy(stream.rewards, stream.present, shard, Identity())
    assert torch.all(found[~stream.present] == 0)
    # 1 - 1, 0 - 1, 1 - 0, no verdict, no baseline
    assert found.sum(1).tolist() == [0.0, -1.0, 1.0, 0.0, 0.0]


def test_as_credit_of_every_token():
    shard = example()
    plan = {"merge": separate, "estimator": partial(to_go, gamma=1.0), "weight": 1.0, "gate": open_gate}
    found = credit(
        shard,
        {"outcome": outcome_stream(shard)},
        [StreamPlan(name="outcome", normalizer=minus_greedy, **plan)],
        Identity(),
        whiten="none",
        trust={},
    ).advantages.total
    assert found[1, shard.response_mask[1]].tolist() == [-1.0, -1.0, -1.0]
    with pytest.raises(ConfigError, match=r"measured from a greedy response.*only the outcome"):
        StreamPlan(name="process", normalizer=partial(minus_greedy), **plan)
