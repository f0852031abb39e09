"""Gates on parts that were written down by hand."""

from __future__ import annotations

import pytest
import torch

from rlprm.core.gates import Around, failure_agrees, open_gate, selective, sign_consistent, trust_gate
from rlprm.errors import ConfigError
from rlprm.records import Stream
from tests.unit.core.worked import shard_of

PART = torch.tensor([[0.0, 1.0, -1.0, -3.0]])  # the first token is the prompt


def around(shard, *, trust=None, streams=None, **parts):
    return Around(name="process", shard=shard, parts=parts, streams=streams or {}, trust=trust)


def test_sign_gate_keeps_what_agrees_with_the_outcome():
    outcome = torch.tensor([[0.0, 0.5, 0.5, -1.0]])
    shard = shard_of([3], [1.0])
    assert sign_consistent(PART, around(shard, outcome=outcome)).tolist() == [[0.0, 1.0, 0.0, -3.0]]
    assert open_gate(PART, around(shard)).tolist() == PART.tolist()
    with pytest.raises(ConfigError, match="`outcome`"):
        sign_consistent(PART, around(shard))


def test_trust_gate_scales():
    shard = shard_of([3], [1.0])
    assert trust_gate(PART, around(shard, trust=0.25)).tolist() == [[0.0, 0.25, -0.25, -0.75]]
    with pytest.raises(ConfigError, match="nobody measures"):
        trust_gate(PART, around(shard))


def three_steps(outcome):
    """One response, a token a step: judged right, judged wrong, not judged."""
    shard = shard_of([3], [outcome])
    assert shard.step_index.tolist() == [[-1, 0, 1, 2]]
    verdicts = Stream(rewards=torch.tensor([[0.0, 1.0, -1.0, 5.0]]), present=torch.tensor([[False, True, True, False]]))
    return shard, {"judge": verdicts}


@pytest.mark.parametrize(
    ("part", "kept"),
    [
        # A >= 0 passes on the right step only; the step without a verdict agrees with nothing
        ([0.0, 2.0, 2.0, 2.0], [0.0, 2.0, 0.0, 0.0]),
        # A < 0 passes on the wrong step only
        ([0.0, -2.0, -2.0, -2.0], [0.0, 0.0, -2.0, 0.0]),
    ],
)
def test_selective_advantage_agrees_with_the_verdict_on_each_step(part, kept):
    shard, streams = three_steps(1.0)
    found = selective(torch.tensor([part]), around(shard, streams=streams), by="judge", threshold=0.0)
    assert found.tolist() == [kept]


def test_a_failure_does_not_blame_steps_that_were_right():
    part = torch.tensor([[0.0, -2.0, -2.0, -2.0]])
    for outcome, kept in ((0.0, [0.0, 0.0, -2.0, -2.0]), (1.0, part.tolist()[0]), (None, part.tolist()[0])):
        shard, streams = three_steps(outcome)
        found = failure_agrees(part, around(shard, streams=streams), by="judge", threshold=0.0)
        assert found.tolist() == [kept]


def test_verdicts_of_nobody_are_refused():
    shard, streams = three_steps(1.0)
    with pytest.raises(ConfigError, match="reads the verdicts of 'process'; there are judge"):
        selective(PART, around(shard, streams=streams), by="process", threshold=0.0)
