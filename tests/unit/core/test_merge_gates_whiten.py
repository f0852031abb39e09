from __future__ import annotations

import pytest
import torch

from rlprm.core.gates import TrustState, trust_from
from rlprm.core.merge import posterior_gate, separate, sum_into
from rlprm.core.reduce import Identity
from rlprm.core.whiten import whiten
from rlprm.errors import CheckpointError, ConfigError
from rlprm.records import Stream
from tests.unit.core.worked import close, example, off_response, process_stream, shard_of


def test_separate_is_the_identity():
    streams = {"process": process_stream(example())}
    assert separate(streams, example()) is streams


def test_posterior_gate_pays_right_responses_only():
    shard = shard_of([2, 3, 1], [1.0, 0.0, None])
    gated = posterior_gate({"process": process_stream(shard)}, shard, stream="process")["process"]
    close(off_response(gated.rewards, shard), [[0.2, -0.1], [0.0, 0.0, 0.0], [0.0]])
    assert gated.present.sum(1).tolist() == [2, 3, 0]  # a 0 in the wrong response is a reward; the unjudged has none


def test_sum_into_is_named_and_weighted():
    shard = example()
    ones = Stream(rewards=torch.ones_like(shard.rollout_logprobs), present=shard.response_mask)
    merged = sum_into({"a": ones, "b": process_stream(shard)}, shard, name="b", into="a", weight=2.0)
    assert set(merged) == {"a"}
    close(off_response(merged["a"].rewards, shard), [[1.4, 0.8], [1.2, 1.6, 0.6], [1.8]])


@pytest.mark.parametrize(("name", "into", "message"), [("c", "a", "names the stream 'c'"), ("a", "a", "into itself")])
def test_sum_into_refuses_what_is_not_there(name, into, message):
    shard = example()
    with pytest.raises(ConfigError, match=message):
        sum_into({"a": process_stream(shard)}, shard, name=name, into=into, weight=1.0)


@pytest.mark.parametrize(
    ("accuracy", "count", "expected"),
    [
        (0.9, 0.0, 0.0),  # nothing measured
        (0.5, 1e9, 0.0),  # chance, known for certain
        (0.2, 100.0, 0.0),  # worse than chance is not trusted backwards
        (1.0, 1e9, 1.0),
        # Wilson, z = 1.644854: (0.75 + 0.0338193 - 1.644854 sqrt(0.0046875 + 0.000422848)) / 1.0676386 = 0.623927
        (0.75, 40.0, 0.247),
    ],
)
def test_trust_of_a_pair_accuracy(accuracy, count, expected):
    assert trust_from(accuracy, count) == pytest.approx(expected, abs=2e-3)


def test_trust_moves_holds_and_survives_a_checkpoint():
    state = TrustState.start(0.5)
    assert state.value == 0.0
    state = state.update(1.0, 8)  # weight 8, mean 1
    assert state.update(0.0, 0) is state  # no mixed group: held
    state = state.update(0.5, 4)  # weight 4 + 4, mean (4 * 1 + 4 * 0.5) / 8
    assert (state.weight, state.mean) == (8.0, 0.75)
    assert TrustState.from_dict(state.to_dict()) == state
    with pytest.raises(CheckpointError, match="keys"):
        TrustState.from_dict({"mean": 1.0})
    with pytest.raises(ConfigError, match=r"decay is 1\.0"):
        TrustState.start(1.0)


PARTS = {"a": torch.tensor([[1.0, 3.0, torch.nan]]), "b": torch.tensor([[1.0, 5.0, torch.nan]])}
MASK = torch.tensor([[True, True, False]])


@pytest.mark.parametrize(
    ("mode", "a", "b"),
    [
        # total 2, 8: mean 5, var_b = 18, sd 4.242641; a: mean 2, b: mean 3
        ("full", [-0.235702, 0.235702, 0.0], [-0.471405, 0.471405, 0.0]),
        ("scale", [0.235702, 0.707107, 0.0], [0.235702, 1.178511, 0.0]),
        ("none", [1.0, 3.0, 0.0], [1.0, 5.0, 0.0]),
    ],
)
def test_whiten(mode, a, b):
    found = whiten(PARTS, MASK, Identity(), mode)
    assert found["a"][0].tolist() == pytest.approx(a, abs=1e-6)
    assert found["b"][0].tolist() == pytest.approx(b, abs=1e-6)


def test_whitening_nothing_but_zeros_stays_finite():
    zeros = {"a": torch.zeros(1, 3)}
    assert whiten(zeros, MASK, Identity(), "full")["a"].tolist() == [[0.0, 0.0, 0.0]]
