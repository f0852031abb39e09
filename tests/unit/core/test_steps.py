from __future__ import annotations

from functools import partial

import pytest
import torch

from rlprm.core.steps import (
    fixed_length,
    last_of,
    place_at_step_ends,
    regex,
    separator,
    spread_over_step,
    step_indices,
    step_sums,
    to_step_ends,
    whole,
)
from rlprm.errors import ConfigError

LINES = partial(separator, text="\n")
BLANK = partial(separator, text="\n\n")


@pytest.mark.parametrize(
    ("pieces", "splitter", "expected"),
    [
        (["a", "\n", "b", "\n", "c"], LINES, [0, 0, 1, 1, 2]),
        (["a", "\n", ""], LINES, [0, 0, 0]),  # EOS after the last separator belongs to the last step
        (["a", "\n", "\n", "\n", "b"], LINES, [0, 0, 0, 0, 1]),  # a run of separators ends one step, not three
        (["\n", "a", "\n", "b"], LINES, [0, 0, 0, 1]),  # blank text at the start belongs to the first step
        (["a\n", "\nb", "c"], BLANK, [0, 0, 1]),  # straddled: complete within the second token
        (["a\n\nb", "c"], BLANK, [0, 1]),  # complete inside the first token
        (["a", "b"], LINES, [0, 0]),  # nothing to split at
        (["", "", "a"], LINES, [0, 0, 0]),
        ([], LINES, []),
        (["Step", " 1:", " x", " Step", " 2:"], partial(regex, pattern=r"Step \d+:"), [0, 0, 0, 1, 1]),
        (["hm ", "Step 1:", "x"], partial(regex, pattern=r"Step \d+:"), [0, 1, 1]),  # a preamble is a step
        (["hm Step", " 1:", "x"], partial(regex, pattern=r"Step \d+:"), [0, 0, 0]),  # starts inside the first token
        (["a", "b", "c", "d", "e"], partial(fixed_length, tokens=2), [0, 0, 1, 1, 2]),
        (["a", "b", ""], partial(fixed_length, tokens=2), [0, 0, 0]),
        (["a", "\n", "b"], whole, [0, 0, 0]),
    ],
)
def test_step_indices(pieces, splitter, expected):
    assert step_indices(pieces, splitter) == expected


@pytest.mark.parametrize(
    ("splitter", "message"),
    [
        (partial(separator, text=""), "empty"),
        (partial(regex, pattern="(["), "no regular expression"),
        (partial(regex, pattern="a*"), "matches the empty string"),
        (partial(fixed_length, tokens=0), "at least 1"),
    ],
)
def test_a_splitter_that_cannot_be_is_refused(splitter, message):
    with pytest.raises(ConfigError, match=message):
        step_indices(["a"], splitter)


# prompt, two steps of two and one tokens, padding; the other row: one step
INDEX = torch.tensor([[-1, 0, 0, 1, -1], [-1, 0, -1, -1, -1]])
VALUES = torch.tensor([[torch.nan, 1.0, 2.0, 4.0, torch.nan], [torch.nan, 8.0, torch.nan, torch.nan, torch.nan]])


def test_sums_and_spread_of_steps():
    sums = step_sums(VALUES, INDEX >= 0, INDEX)
    assert sums.tolist() == [[3.0, 4.0], [8.0, 0.0]]
    assert spread_over_step(sums, INDEX).tolist() == [[0.0, 3.0, 3.0, 4.0, 0.0], [0.0, 8.0, 0.0, 0.0, 0.0]]


def test_to_step_ends_keeps_an_absent_step_absent():
    present = torch.tensor([[False, True, False, False, False], [False, True, False, False, False]])
    rewards, there = to_step_ends(VALUES, present, INDEX)
    assert rewards.tolist() == [[0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 8.0, 0.0, 0.0, 0.0]]
    assert there.tolist() == [[False, False, True, False, False], [False, True, False, False, False]]


def test_step_values_are_placed_at_step_ends():
    rewards, there = place_at_step_ends(
        torch.tensor([[3.0, torch.nan], [5.0, torch.nan]]), torch.tensor([[True, False], [True, False]]), INDEX
    )
    assert rewards.tolist() == [[0.0, 0.0, 3.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0, 0.0]]
    assert there.sum() == 2


def test_last_of_a_step_is_its_last_present_token():
    present = torch.tensor([[True, True, False, True, True], [False] * 5])
    assert last_of(present, INDEX).nonzero().tolist() == [[0, 1], [0, 3]]


def test_a_shard_without_responses_has_no_steps():
    nothing = torch.full((1, 2), -1)
    assert step_sums(torch.ones(1, 2), nothing >= 0, nothing).shape == (1, 0)
    assert spread_over_step(torch.ones(1, 0), nothing).tolist() == [[0.0, 0.0]]
