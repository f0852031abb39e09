from __future__ import annotations

import pytest
import torch

from rlprm.core.packing import build_micro, micro_batches
from rlprm.errors import ConfigError

LENGTHS = torch.tensor([2, 3, 1])
TOKENS = torch.tensor([10, 11, 20, 21, 22, 30])
RESPONSE = torch.tensor([False, True, False, True, True, True])


def test_budget_counts_padded_or_real_tokens():
    # longest first: 6, 5, 3, 2; budget 12: padded 6+6 | 3+3, packed 6+5 | 3+2 (6 + 5 + 3 = 14 is too much)
    assert micro_batches([3, 6, 5, 2], 12, 8, "padded") == [[1, 2], [0, 3]]
    assert micro_batches([3, 6, 5, 2], 11, 8, "padded") == [[1], [2, 0], [3]]
    assert micro_batches([3, 6, 5, 2], 12, 8, "packed") == [[1, 2], [0, 3]]
    assert micro_batches([3, 6, 5, 2], 11, 8, "packed") == [[1, 2], [0, 3]]


def test_at_most_so_many_sequences():
    assert micro_batches([1, 1, 1], 100, 2, "packed") == [[0, 1], [2]]


def test_a_sequence_over_the_budget_is_alone():
    assert micro_batches([50, 4, 4], 10, 8, "padded") == [[0], [1, 2]]


def test_no_sequences_no_micro_batches():
    assert micro_batches([], 10, 8, "padded") == []


@pytest.mark.parametrize(("budget", "limit"), [(0, 1), (1, 0)])
def test_limits_below_one_are_refused(budget, limit):
    with pytest.raises(ConfigError, match="at least 1"):
        micro_batches([1], budget, limit, "padded")


def build(layout):
    fields = {"advantages": TOKENS.float() / 10}
    return build_micro([1, 2], LENGTHS, TOKENS, RESPONSE, fields, {"outcome": torch.tensor([0.0, 1.0, 2.0])}, layout)


def test_padded_micro_batch():
    micro = build("padded")
    assert micro.tokens.tolist() == [[20, 21, 22], [30, 0, 0]]
    assert micro.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert micro.sequence.tolist() == [[0, 0, 0], [1, -1, -1]]
    assert micro.response_mask.tolist() == [[False, True, True], [True, False, False]]
    assert micro.token_fields["advantages"][1].tolist() == [3.0, 0.0, 0.0]
    assert micro.sequence_fields["outcome"].tolist() == [1.0, 2.0]
    assert (micro.packed, micro.num_sequences) == (False, 2)


def test_packed_micro_batch():
    micro = build("packed")
    assert micro.tokens.tolist() == [[20, 21, 22, 30]]
    assert micro.positions.tolist() == [[0, 1, 2, 0]]
    assert micro.sequence.tolist() == [[0, 0, 0, 1]]
    assert micro.response_mask.tolist() == [[False, True, True, True]]
    assert (micro.packed, micro.num_sequences) == (True, 2)


def test_fields_of_another_size_are_refused():
    with pytest.raises(ConfigError, match=r"\{'old': 3\}"):
        build_micro([0], LENGTHS, TOKENS, RESPONSE, {"old": torch.zeros(3)}, {}, "padded")
    with pytest.raises(ConfigError, match="without sequences"):
        build_micro([], LENGTHS, TOKENS, RESPONSE, {}, {}, "padded")
