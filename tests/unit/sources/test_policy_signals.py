"""Rewards from the policy itself: its log-ratio to the reference, and its certainty."""

from __future__ import annotations

import math

import pytest
import torch

from rlprm.errors import AlignmentError
from rlprm.sources.base import OWN, PolicyView
from rlprm.sources.log_ratio import PolicyLogRatio
from rlprm.sources.self_certainty import SelfCertainty
from tests.unit.made import context, scorable, shard


class Entropies(PolicyView):
    def __init__(self, values):
        self.values = values

    def entropy(self, shard):
        return torch.tensor(self.values)


def test_log_ratio_pays_what_the_policy_has_come_to_prefer():
    given = shard([2, 1], [1.0, 0.0])  # a prompt token before each response
    old = torch.tensor([9.0, -1.0, -2.0, 9.0, -3.0])
    ref = torch.tensor([0.0, -2.0, -1.5, 0.0, -3.0])
    source = PolicyLogRatio(context(), beta=2.0)
    stream = source.score(scorable(given, old=old, ref=ref)).streams[OWN]
    assert stream.rewards.tolist() == [[0.0, 2.0, -1.0], [0.0, 0.0, 0.0]]
    assert stream.present.tolist() == [[False, True, True], [False, True, False]]
    assert PolicyLogRatio.reads_reference
    with pytest.raises(AlignmentError, match="needs log-probs of the reference"):
        source.score(scorable(given, old=old))


@pytest.mark.parametrize(("scale", "factor"), [(1.0, 1.0), ("vocabulary", 4.0)])
def test_self_certainty_of_a_response_is_the_sum_of_its_tokens(scale, factor):
    given = shard([2, 1], [1.0, 0.0])
    asked = context(policy=Entropies([0.0, 0.0, math.log(4), 0.0, math.log(2)]), policy_tokenizer=["a", "b", "c", "d"])
    # V = 4; row 0: (log 4 + 0) / (2 * 4); row 1: (log 4 - log 2) / (1 * 4)
    expected = [math.log(4) / 8 * factor, math.log(2) / 4 * factor]
    whole = SelfCertainty(asked, scale=scale, granularity="whole").score(scorable(given)).streams[OWN]
    assert whole.rewards[0].tolist() == pytest.approx([0.0, 0.0, expected[0]])
    assert whole.rewards[1].tolist() == pytest.approx([0.0, expected[1], 0.0])
    assert whole.present.tolist() == [[False, False, True], [False, True, False]]
    token = SelfCertainty(asked, scale=scale, granularity="token").score(scorable(given)).streams[OWN]
    assert token.rewards.sum(1).tolist() == pytest.approx(expected)
    assert token.present.tolist() == [[False, True, True], [False, True, False]]
    assert SelfCertainty.granularity(scale=1.0, granularity="token") == "token"


def test_entropies_of_other_tokens_are_refused():
    source = SelfCertainty(
        context(policy=Entropies([0.0]), policy_tokenizer=["a", "b"]), scale=1.0, granularity="whole"
    )
    with pytest.raises(AlignmentError, match="1 entropies for 3 tokens"):
        source.score(scorable(shard([2], [1.0])))
