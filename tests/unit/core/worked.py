"""The worked example that most golden values come from.

One group of three responses after one prompt token each, padded to T = 4:

    token process rewards  y1 = [0.2, -0.1]   y2 = [0.1, 0.3, -0.2]   y3 = [0.4]
    outcomes               1                  0                       1
    steps                  each token is one step, unless said otherwise
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlprm.records import Shard, Stream

PROCESS = [[0.2, -0.1], [0.1, 0.3, -0.2], [0.4]]
OUTCOMES = [1.0, 0.0, 1.0]
NO_AXES = {
    "unit": "token",
    "subset": "all",
    "clip_first": None,
    "accumulate": "none",
    "centre": "none",
    "scale": "none",
    "order": "none",
    "bound": "none",
    "eps": 0.0,
    "decay": None,
}


def shard_of(
    lengths: list[int],
    outcomes: list[float | None],
    groups: list[int] | None = None,
    steps: list[list[int]] | None = None,
    prompt: int = 1,
    padding: int = 0,
) -> Shard:
    """A shard of responses of these lengths; None as outcome: the verifier failed."""
    size, width = len(lengths), prompt + max(lengths) + padding
    position = torch.arange(width)[None, :]
    end = prompt + torch.tensor(lengths)[:, None]
    step_index = torch.full((size, width), -1)
    for row, length in enumerate(lengths):
        step_index[row, prompt : prompt + length] = torch.tensor(steps[row] if steps else range(length))
    return Shard(
        tokens=torch.zeros(size, width, dtype=torch.int64),
        attention_mask=position < end,
        response_mask=(position >= prompt) & (position < end),
        rollout_logprobs=torch.zeros(size, width),
        step_index=step_index,
        step_label=torch.full((size, width), -1),
        outcome=torch.tensor([0.0 if outcome is None else outcome for outcome in outcomes]),
        outcome_present=torch.tensor([outcome is not None for outcome in outcomes]),
        greedy_outcome=torch.zeros(size),
        greedy_present=torch.zeros(size, dtype=torch.bool),
        group=torch.tensor(groups or [0] * size),
        version=torch.zeros(size, dtype=torch.int64),
        truncated=torch.zeros(size, dtype=torch.bool),
        fresh=torch.ones(size, dtype=torch.bool),
        train=torch.ones(size, dtype=torch.bool),
        row=torch.arange(size),
    )


def example() -> Shard:
    return shard_of([2, 3, 1], list(OUTCOMES), groups=[5, 5, 5])


def on_response(shard: Shard, rows: list[list[float]]) -> Tensor:
    """Per-token values laid out on the response, NaN everywhere else, so that a leak shows."""
    values = torch.full(shard.tokens.shape, torch.nan)
    for row, entries in enumerate(rows):
        values[row, shard.response_mask[row]] = torch.tensor(entries)
    return values


def process_stream(shard: Shard) -> Stream:
    return Stream(rewards=on_response(shard, PROCESS), present=shard.response_mask)


def off_response(values: Tensor, shard: Shard) -> list[list[float]]:
    """Each row's response entries; everything else must be 0."""
    assert torch.all(values[~shard.response_mask] == 0)
    return [values[row, shard.response_mask[row]].tolist() for row in range(len(values))]


def close(found: list[list[float]], expected: list[list[float]], tolerance: float = 2e-6) -> None:
    flat_found = [entry for row in found for entry in row]
    flat_expected = [entry for row in expected for entry in row]
    assert [len(row) for row in found] == [len(row) for row in expected]
    worst = max(abs(a - b) for a, b in zip(flat_found, flat_expected, strict=True))
    assert worst <= tolerance, f"found {found}, expected {expected}"
