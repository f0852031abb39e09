"""Self-certainty from entropies equals the printed sum over the vocabulary, in its printed direction."""

from __future__ import annotations

import pytest
import torch

from rlprm.core.self_certainty import self_certainty
from rlprm.errors import ConfigError


def test_it_is_the_printed_sum_and_not_the_other_direction():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]], dtype=torch.float64)  # two tokens, V = 3
    printed = (p * (p * 3).log()).sum() / (2 * 3)
    reverse = -((3 * p).log()).sum() / 3 / (2 * 3)
    entropy = -(p * p.log()).sum(1)[None]
    found = self_certainty(entropy, torch.tensor([[True, True]]), 3)
    assert found.sum().item() == pytest.approx(printed.item())
    assert found.sum().item() != pytest.approx(reverse.item(), rel=0.05)
    # by hand: H = .801819, 1.054920; log 3 = 1.098612: (.296794 + .043692) / 6
    assert found[0].tolist() == pytest.approx([0.0494656, 0.0072820], abs=1e-6)


def test_tokens_off_the_response_do_not_count():
    on = torch.tensor([[False, True], [False, False]])
    found = self_certainty(torch.tensor([[torch.nan, 0.0], [0.0, 0.0]]), on, 2)
    assert found[0].tolist() == pytest.approx([0.0, 0.3465736])  # log(2) / (1 * 2)
    assert found[1].tolist() == [0.0, 0.0]
    with pytest.raises(ConfigError, match="2 or more"):
        self_certainty(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), 1)
