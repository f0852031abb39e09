"""Preference optimisation on a table learner: value and gradient by hand, and the same for any split and any ranks."""

from __future__ import annotations

import math

import pytest
import torch

from rlprm.core.metrics import numbers
from rlprm.core.preference import Pair
from rlprm.core.reduce import Identity
from rlprm.engine.offline import Turns
from rlprm.engine.preference import Preference, inside
from rlprm.records import JaggedShard
from tests.unit.made import TableLearner, shard

# Rows of 2, 1 and 3 response tokens: token ids (1, 2), (3), (4, 5, 6), each after a prompt token 0.
TABLE = [-1.0, -2.0, -0.5, -1.0, -1.5, -2.0]


def rows() -> JaggedShard:
    return shard([2, 1, 3], [1.0, 0.0, 0.0])


def pair(preferred: int, other: int, spans=((0, 9), (0, 9)), weight: float = 1.0) -> Pair:
    return Pair(preferred=preferred, other=other, preferred_span=spans[0], other_span=spans[1], weight=weight)


class Sum:
    """A reduction over ranks that have been summed already."""

    def __init__(self, whole: torch.Tensor) -> None:
        self._whole = whole

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return self._whole

    def max(self, value: torch.Tensor) -> torch.Tensor:
        return value


def learner_of(learner: TableLearner, pairs: list[Pair], *, batch_size: int, token_budget: int = 1000, layout="padded",
               rank: int = 0, world_size: int = 1, reduce=None) -> Preference:  # fmt: skip
    return Preference(
        learner,
        rows(),
        pairs,
        Turns(
            batch_size=batch_size,
            seed=0,
            token_budget=token_budget,
            layout=layout,
            rank=rank,
            world_size=world_size,
            reduce=reduce or Identity(),
            tokenizer_path="",
        ),
        beta=0.5,
    )


def moved(**settings) -> tuple[Preference, TableLearner]:
    """A learner whose reference is the table, and whose policy has moved since: token n by 0.1 n."""
    learner = TableLearner(TABLE)
    made = learner_of(learner, **settings)
    learner.table = learner.table + torch.arange(7) * 0.1
    return made, learner


def test_value_and_gradient_by_hand():
    # moved: tokens 1, 2 by 0.1, 0.2; token 3 by 0.3; tokens 4, 5, 6 by 0.4, 0.5, 0.6
    # pair (0, 1): margin 0.3 - 0.3 = 0, weight 1: log 2, pull 0.5 * 1/2 = 0.25
    # pair (0, 2): margin 0.3 - 1.5 = -1.2, weight 2: 2 log(1 + e^0.6) = 2 * 1.0374879 = 2.0749758
    #              pull 2 * 0.5 / (1 + e^-0.6) = 0.6456563
    made, learner = moved(pairs=[pair(0, 1), pair(0, 2, weight=2.0)], batch_size=2)
    found = made.advance(1)
    told = numbers(found.partial)
    assert told["dpo/loss"] == pytest.approx((math.log(2) + 2.0749758) / 2, abs=1e-6)
    assert told["dpo/margin"] == pytest.approx(-0.6, abs=1e-6)
    assert told["dpo/accuracy"] in (0.0, 0.25, 0.5)  # a margin of 0 may round to either side
    assert told["dpo/preferred_log_ratio"] == pytest.approx(0.3, abs=1e-6)
    assert told["dpo/other_log_ratio"] == pytest.approx(0.9, abs=1e-6)
    assert told["dpo/weight"] == 1.5
    both = (0.25 + 0.6456563) / 2
    expected = [0.0, -both, -both, 0.125, *[0.6456563 / 2] * 3]
    assert learner.gradients[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_only_the_spans_are_scored():
    # of row 0 its second token, of row 2 its first two: margin 0.2 - 0.9 = -0.7; pull 0.5 / (1 + e^-0.35) = 0.2933087
    made, learner = moved(pairs=[pair(0, 2, spans=((1, 2), (0, 2)))], batch_size=1)
    told = numbers(made.advance(1).partial)
    assert told["dpo/margin"] == pytest.approx(-0.7, abs=1e-6)
    assert learner.gradients[0].tolist() == pytest.approx([0, 0, -0.2933087, 0, 0.2933087, 0.2933087, 0], abs=1e-6)


@pytest.mark.parametrize("token_budget", [3, 6, 8, 1000])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_split_into_micro_batches_leaves_no_trace(token_budget, layout):
    pairs = [pair(0, 1), pair(0, 2, weight=2.0), pair(1, 2, spans=((0, 1), (1, 3)))]
    whole, reference = moved(pairs=pairs, batch_size=3)
    split, learner = moved(pairs=pairs, batch_size=3, token_budget=token_budget, layout=layout)
    assert numbers(split.advance(1).partial) == pytest.approx(numbers(whole.advance(1).partial))
    assert torch.allclose(learner.gradients[0], reference.gradients[0], rtol=0, atol=1e-7)


def test_two_ranks_share_the_pairs_and_the_reference():
    pairs = [pair(0, 1), pair(0, 2, weight=2.0), pair(1, 2)]
    whole, reference = moved(pairs=pairs, batch_size=3)
    whole.advance(1)
    table = torch.tensor([0.0, *TABLE])
    full = torch.where(rows().tokens > 0, table[rows().tokens], 0.0)
    gradients, asked = [], []
    for rank in range(2):
        learner = TableLearner(TABLE)
        made = learner_of(learner, pairs, batch_size=3, rank=rank, world_size=2, reduce=Sum(full))
        learner.table = learner.table + torch.arange(7) * 0.1
        made.advance(1)
        gradients.append(learner.gradients[0])
        asked.append(learner.rows[0])
    assert sorted(asked) == [2, 4]  # sequences: one pair and two
    assert torch.allclose(sum(gradients), reference.gradients[0], rtol=0, atol=1e-7)


def test_the_reference_is_the_model_before_the_first_step():
    learner = TableLearner(TABLE, shift=0.25)
    made = learner_of(learner, [pair(0, 1)], batch_size=1)
    first = numbers(made.advance(1).partial)
    assert first["dpo/margin"] == 0.0
    assert first["dpo/loss"] == pytest.approx(math.log(2))
    # every log-prob has moved by 0.25: two tokens against one
    assert numbers(made.advance(1).partial)["dpo/margin"] == pytest.approx(0.25)


def test_spans_count_from_the_first_response_token():
    assert inside(rows(), [(1, 2), (0, 1), (0, 2)]).tolist() == [
        *(False, False, True), *(False, True), *(False, True, True, False)
    ]  # fmt: skip
