"""The worked example that most golden values come from.

One group of three responses after one prompt token each, padded to T = 4:

    token process rewards  y1 = [0.2, -0.1]   y2 = [0.1, 0.3, -0.2]   y3 = [0.4]
    outcomes               1                  0                       1
    steps                  each token is one step, unless said otherwise
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlprm.contract.samples import shard_of
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
