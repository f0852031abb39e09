"""Hand-made batches that contract checks try pieces on: odd group sizes, absent rewards, NaN where nobody may look."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlprm.records import Shard

LENGTHS = [3, 5, 1, 4, 2, 6, 4, 4, 4, 5, 2, 3]
GROUPS = [7, 7, 7, 7, 2, 2, 9, 9, 9, 4, 11, 11]  # four, two, three (equal rewards), one, two members
OUTCOMES = [1.0, 0.0, 1.0, None, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, None, 1.0]
EQUAL = [row for row, group in enumerate(GROUPS) if group == 9]
LONE = GROUPS.index(4)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A batch, and one stream on it."""

    shard: Shard
    rewards: Tensor
    present: Tensor

    def select(self, rows: Tensor) -> Sample:
        return Sample(shard=self.shard.select(rows), rewards=self.rewards[rows], present=self.present[rows])

    def filled(self, value: float) -> Sample:
        """Something else where nothing is present."""
        return replace(self, rewards=torch.where(self.present, self.rewards, torch.tensor(value)))

    def widened(self, columns: int) -> Sample:
        """The same with more padding on the right, garbage in it."""

        def wide(tensor: Tensor, fill: float | int) -> Tensor:
            return torch.cat([tensor, torch.full((len(tensor), columns), fill).to(tensor.dtype)], dim=1)

        fills = {"step_index": -1, "step_label": -1}
        padded = {
            name: wide(getattr(self.shard, name), fills.get(name, 0))
            for name in ("tokens", "attention_mask", "response_mask", "rollout_logprobs", "step_index", "step_label")
        }
        return Sample(
            shard=replace(self.shard, **padded), rewards=wide(self.rewards, torch.nan), present=wide(self.present, 0)
        )


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


def sample(*, complete: bool = False) -> Sample:
    """Rewards on most response tokens (on all: ``complete``); NaN elsewhere. Group 9's rows are the same."""
    steps = [[position // 2 for position in range(length)] for length in LENGTHS]
    shard = shard_of(LENGTHS, OUTCOMES, groups=GROUPS, steps=steps, prompt=2, padding=1)
    answered = shard.group != 2  # the greedy response to that prompt got no verdict
    shard = replace(shard, greedy_outcome=(shard.group % 2).to(shard.outcome.dtype), greedy_present=answered)
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(shard.tokens.shape, generator=generator)
    present = shard.response_mask & (torch.rand(shard.tokens.shape, generator=generator) < (1.1 if complete else 0.7))
    rewards[EQUAL], present[EQUAL] = rewards[EQUAL[0]].clone(), present[EQUAL[0]].clone()
    assert complete or bool((shard.response_mask & ~present).any()), "some response tokens must have no reward"
    return Sample(shard=shard, rewards=torch.where(present, rewards, torch.nan), present=present)


def nothing_present() -> Sample:
    whole = sample()
    empty = torch.zeros_like(whole.present)
    return replace(whole, rewards=torch.full_like(whole.rewards, torch.nan), present=empty)


def in_shards(whole: Sample, count: int) -> list[Tensor]:
    """Rows of ``count`` shards, whole groups each, unevenly."""
    ids = sorted(set(GROUPS))
    return [
        torch.tensor([row for row, group in enumerate(GROUPS) if ids.index(group) % count == part])
        for part in range(count)
    ]
