"""From stored rollouts to pairs of rows: mapped, limited, seeded and counted."""

from __future__ import annotations

from functools import partial

import pytest

from rlprm.core.preference import outcome_pairs, weighted_pairs
from rlprm.errors import DataError
from rlprm.roles import StoredRollout
from rlprm.run.preference import paired


def rollout(prompt: int, token: int, outcome: float, labels: tuple[int, ...] = (1,)) -> StoredRollout:
    return StoredRollout(
        where=f"file:{token}",
        step=1,
        prompt=(prompt,),
        response=(token,),
        logprobs=(-0.5,),
        outcome=outcome,
        truncated=False,
        version=0,
        spans=((0, 1),),
        labels=labels,
        rewards={},
    )


ROLLOUTS = [
    rollout(1, 10, 1.0),
    rollout(2, 20, 1.0),  # prompt 2: right only
    rollout(1, 11, 0.0),
    rollout(3, 30, 0.0),
    rollout(1, 12, 0.0),
    rollout(3, 31, 1.0),
    rollout(2, 21, 1.0),
]


def tokens(found) -> list[tuple[int, int]]:
    """Response tokens of each pair, looked up in the shard."""
    responses = found.shard.tokens.tolist()[1::2]  # prompts and responses of one token each
    return [(responses[pair.preferred], responses[pair.other]) for pair in found.pairs]


def test_pairs_name_rows_of_a_shard_that_holds_no_other_response():
    found = paired(ROLLOUTS, outcome_pairs, limit=None, seed=0)
    assert tokens(found) == [(10, 11), (10, 12), (31, 30)]
    assert found.shard.tokens.tolist() == [1, 10, 1, 11, 1, 12, 3, 30, 3, 31]
    assert (found.num_prompts, found.num_without) == (3, 1)
    assert [pair.weight for pair in found.pairs] == [1.0, 1.0, 1.0]


def test_at_most_so_many_pairs_of_a_prompt_by_the_seed():
    drawn = [tokens(paired(ROLLOUTS, outcome_pairs, limit=1, seed=seed)) for seed in range(20)]
    assert {pairs[0] for pairs in drawn} == {(10, 11), (10, 12)}
    assert all(pairs[1:] == [(31, 30)] for pairs in drawn)
    assert drawn[3] == tokens(paired(ROLLOUTS, outcome_pairs, limit=1, seed=3))


def test_weights_are_scaled_over_all_prompts():
    rollouts = [
        rollout(1, 10, 1.0, (1, 1)),
        rollout(1, 11, 0.0, (0, 0)),  # difference 1
        rollout(2, 20, 1.0, (1, 0)),
        rollout(2, 21, 0.0, (0, 0)),  # difference 1/2
    ]
    found = paired(rollouts, partial(weighted_pairs, quality="labels"), limit=None, seed=0)
    assert [pair.weight for pair in found.pairs] == pytest.approx([4 / 3, 2 / 3])


def test_no_pair_at_all_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match=r"no pair in 2 stored rollouts of 1 prompts.*tracker.rollout_groups=null"):
        paired([ROLLOUTS[1], ROLLOUTS[6]], outcome_pairs, limit=None, seed=0)
