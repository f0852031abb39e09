"""Mini-batches have the same members whatever the number of ranks; micro-batches cut all fields alike."""

from __future__ import annotations

import pytest
import torch

from rlprm.engine.batching import micros, mini_batches
from tests.unit.made import shard


def members(
    groups: list[int], parts: int, num_groups: int, seed: int, chosen: list[bool] | None = None
) -> list[set[int]]:
    """Groups of each mini-batch on a rank that holds ``groups``."""
    group = torch.tensor(groups)
    selected = torch.ones(len(groups), dtype=torch.bool) if chosen is None else torch.tensor(chosen)
    return [
        {groups[index] for index in rows.tolist()}
        for rows in mini_batches(group, selected, num_groups=num_groups, parts=parts, seed=seed)
    ]


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_membership_does_not_depend_on_the_number_of_ranks(seed):
    whole = members([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], 3, 5, seed)
    first, second = members([0, 0, 3, 3, 4, 4], 3, 5, seed), members([1, 1, 2, 2], 3, 5, seed)
    assert [one | other for one, other in zip(first, second, strict=True)] == whole
    assert sorted(group for part in whole for group in part) == [0, 1, 2, 3, 4]
    assert sorted(len(part) for part in whole) == [1, 2, 2]  # 5 groups in 3 parts, evenly


def test_another_seed_deals_other_mini_batches():
    dealt = {str(members(list(range(8)), 2, 8, seed)) for seed in range(5)}
    assert len(dealt) == 5


def test_a_rank_without_a_row_still_takes_every_part():
    # rank with group 1 only: one of the two parts is empty there, but both come
    parts = members([1, 1], 2, 2, 0)
    assert sorted(len(part) for part in parts) == [0, 1]


def test_rows_that_are_not_selected_are_in_no_part():
    parts = list(
        mini_batches(torch.tensor([0, 0, 1]), torch.tensor([True, False, True]), num_groups=2, parts=1, seed=0)
    )
    assert [rows.tolist() for rows in parts] == [[0, 2]]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_micro_batches_keep_to_the_budget_and_cut_fields_along(layout):
    given = shard([3, 1, 5, 2], [1.0, 0.0, 1.0, 0.0])
    values = torch.arange(float(len(given.tokens)))
    found = micros(
        given,
        torch.tensor([0, 2, 3]),
        token_fields={"place": values},
        sequence_fields={"outcome": given.outcome, "row": given.row},
        token_budget=8,
        layout=layout,
    )
    rows = [int(row) for micro in found for row in micro.sequence_fields["row"]]
    assert sorted(rows) == [0, 2, 3]  # every asked row once, no other
    for micro in found:
        assert micro.packed is (layout == "packed")
        assert micro.num_sequences == len(micro.sequence_fields["outcome"])
        assert micro.tokens.numel() <= 8
        real = micro.sequence >= 0
        assert torch.equal(given.tokens[micro.token_fields["place"][real].long()], micro.tokens[real])
        for index in range(micro.num_sequences):
            own = micro.sequence == index
            row = int(micro.sequence_fields["row"][index])
            assert int(own.sum()) == int(given.lengths[row])
            assert int((own & micro.response_mask).sum()) == int(given.lengths[row] - 1)


def test_no_rows_are_no_micro_batches():
    given = shard([2], [1.0])
    none = torch.zeros(0, dtype=torch.int64)
    assert micros(given, none, token_fields={}, sequence_fields={}, token_budget=8, layout="padded") == []
