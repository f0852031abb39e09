"""From verified rollouts to shards: masks, padding, and what may not pass."""

from __future__ import annotations

import pytest
import torch

from rlprm.batch import (
    Batch,
    Row,
    balance,
    chosen_rows,
    flat_response_mask,
    flat_rows,
    flatten,
    jagged,
    jagged_texts,
    pad,
    shards_needed,
    unflatten,
)
from rlprm.errors import AlignmentError
from rlprm.records import cat
from tests.unit.made import prompt, rollout, shard, verified


def two_rows():
    first = verified((5, 6, 7), 1.0, of=prompt(0, (1, 2)), labels=(1, 0))
    second = verified((8,), None, of=prompt(1, (3,)), finish="length")
    return jagged(
        [first, second],
        [[0, 0, 1], [0]],
        groups=[4, 9],
        rows=[11, 12],
        fresh=[True, False],
        train=[False, True],
    )


def test_jagged_lays_prompt_and_response_end_to_end():
    made = two_rows()
    assert made.lengths.tolist() == [5, 2]
    assert made.prompt_lengths.tolist() == [2, 1]
    assert made.tokens.tolist() == [1, 2, 5, 6, 7, 3, 8]
    assert made.rollout_logprobs.tolist() == [0.0, 0.0, -0.5, -0.5, -0.5, 0.0, -0.5]
    assert made.step_index.tolist() == [-1, -1, 0, 0, 1, -1, 0]
    assert made.step_label.tolist() == [-1, -1, 1, 1, 0, -1, -1]  # the second verdict has no labels
    assert made.outcome.tolist() == [1.0, 0.0]
    assert made.outcome_present.tolist() == [True, False]  # absent is not a true 0
    assert made.group.tolist() == [4, 9]
    assert made.row.tolist() == [11, 12]
    assert made.version.tolist() == [3, 3]
    assert made.truncated.tolist() == [False, True]
    assert made.fresh.tolist() == [True, False]
    assert made.train.tolist() == [False, True]


def test_pad_makes_every_mask():
    padded = pad(two_rows())
    yes, no = True, False
    assert padded.tokens.tolist() == [[1, 2, 5, 6, 7], [3, 8, 0, 0, 0]]
    assert padded.attention_mask.tolist() == [[yes] * 5, [yes, yes, no, no, no]]
    assert padded.response_mask.tolist() == [[no, no, yes, yes, yes], [no, yes, no, no, no]]
    assert padded.step_index.tolist() == [[-1, -1, 0, 0, 1], [-1, 0, -1, -1, -1]]
    assert padded.step_label.tolist() == [[-1, -1, 1, 1, 0], [-1, -1, -1, -1, -1]]


def test_flat_response_mask_is_the_padded_one_flattened():
    made = two_rows()
    assert flat_response_mask(made).tolist() == [False, False, True, True, True, False, True]
    assert torch.equal(flat_response_mask(made), flatten(pad(made).response_mask, made.lengths))


def test_flatten_undoes_unflatten_for_any_dtype():
    lengths = torch.tensor([2, 0, 3])
    for flat in (torch.arange(5), torch.arange(5) > 2, torch.arange(5.0)):
        padded = unflatten(flat, lengths)
        assert padded.shape == (3, 3)
        assert torch.equal(flatten(padded, lengths), flat)
    assert flatten(torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_unflatten_refuses_another_number_of_tokens():
    with pytest.raises(AlignmentError, match="4 flat tokens for rows of 5 tokens in all"):
        unflatten(torch.arange(4), torch.tensor([2, 3]))


def test_aborted_rollout_never_becomes_a_row():
    aborted = verified((5,), 1.0, finish="abort")
    with pytest.raises(AlignmentError, match="a/0#0 was aborted"):
        jagged([aborted], [[0]], groups=[0], rows=[0], fresh=[True], train=[True])


@pytest.mark.parametrize("steps", [[0, 0], []])
def test_step_indices_must_describe_the_tokens(steps):
    with pytest.raises(AlignmentError, match=f"3 tokens, 3 log-probs and {len(steps)} step indices"):
        jagged([verified((5, 6, 7), 1.0)], [steps], groups=[0], rows=[0], fresh=[True], train=[True])


def test_logprobs_must_describe_the_tokens():
    from dataclasses import replace

    item = verified((5, 6), 1.0)
    short = replace(item, rollout=replace(rollout((5, 6)), logprobs=(-0.5,)))
    with pytest.raises(AlignmentError, match="2 tokens, 1 log-probs"):
        jagged([short], [[0, 0]], groups=[0], rows=[0], fresh=[True], train=[True])


def test_shards_join_as_one():
    joined = cat([shard([2], [1.0]), shard([1, 3], [0.0, None])])
    assert joined.lengths.tolist() == [3, 2, 4]
    assert pad(joined).tokens.shape == (3, 4)


def test_texts_are_rows_that_train_and_have_no_outcome():
    made = jagged_texts([((1, 2), (3,)), ((4,), (5, 6))])
    assert made.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert made.step_index.tolist() == [-1, -1, 0, -1, 0, 0]
    assert flat_response_mask(made).tolist() == [False, False, True, False, True, True]
    assert not made.outcome_present.any()
    assert made.train.all()
    assert made.group.tolist() == [0, 1]


def test_balance_is_even_and_gives_every_shard_a_group():
    # largest first: 9 -> A, 7 -> B, 5 -> B (7 < 9), 4 -> A, 3 -> B (12 < 13), 1 -> A (13 < 15): A = 14, B = 15
    assert balance([5, 9, 1, 7, 3, 4], 2) == [[1, 2, 5], [0, 3, 4]]
    parts = balance([10, 1, 1, 1], 3)
    assert sorted(index for part in parts for index in part) == [0, 1, 2, 3]
    assert all(parts)
    assert balance([0, 0, 0], 3) == [[0], [1], [2]]  # groups of no tokens still go one to each
    assert balance([4], 2) == [[0], []]


def test_shards_are_shared_evenly_by_every_role():
    assert shards_needed(4, 2) == 4
    assert shards_needed(2, 3) % 2 == shards_needed(2, 3) % 3 == 0


def test_number_of_groups_counts_the_accepted_ones():
    def row(group: int, train: bool) -> Row:
        return Row(
            group=group, prompt_id="a/0", source="a", sample=0, outcome=None, reason="", finish="stop",
            prompt_length=1, response_length=1, num_steps=1, version=0, repetition=0.0, copy=False, fresh=True,
            train=train,
        )  # fmt: skip

    rows = (row(0, True), row(0, True), row(1, True), row(2, False))
    batch = Batch(step=1, rows=rows, shards=(), texts=(), members=(), selected=(True, True, True, False), counts={})
    assert batch.num_groups == 2


def test_chosen_rows_are_a_shard_of_their_own():
    given = shard([2, 1, 3], [1.0, 0.0, None])
    rows = torch.tensor([2, 0])
    chosen = chosen_rows(given, rows)
    whole, part = pad(given), pad(chosen)
    assert chosen.lengths.tolist() == [4, 3]
    assert torch.equal(part.tokens, whole.tokens[rows])
    assert torch.equal(part.response_mask, whole.response_mask[rows])
    assert torch.equal(chosen.row, given.row[rows])
    assert torch.equal(given.tokens[flat_rows(given.lengths, rows)], chosen.tokens)


def test_no_rows_are_an_empty_shard():
    chosen = chosen_rows(shard([2, 1], [1.0, 0.0]), torch.tensor([], dtype=torch.int64))
    assert len(chosen) == len(chosen.tokens) == len(flat_response_mask(chosen)) == 0
