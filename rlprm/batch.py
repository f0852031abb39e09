"""From verified rollouts to shards: the only place where masks are made and padding is added or removed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from rlprm.errors import AlignmentError
from rlprm.records import JaggedShard, Shard
from rlprm.roles import Verified


def unflatten(flat: Tensor, lengths: Int[Tensor, " B"], fill: float | int | bool = 0) -> Tensor:
    """``[N] -> [B, T]``: lay flat tokens out in rows, right-padded with ``fill``.

    >>> unflatten(torch.tensor([1, 2, 3]), torch.tensor([2, 1]), fill=-1).tolist()
    [[1, 2], [3, -1]]
    """
    if int(lengths.sum()) != flat.shape[0]:
        raise AlignmentError(
            f"{flat.shape[0]} flat tokens for rows of {int(lengths.sum())} tokens in all; both must be equal"
        )
    padded = flat.new_full((len(lengths), int(lengths.max()) if len(lengths) else 0), fill)
    padded[attention(lengths)] = flat
    return padded


def flatten(padded: Tensor, lengths: Int[Tensor, " B"]) -> Tensor:
    """``[B, T] -> [N]``: drop the padding; the inverse of :func:`unflatten`.

    >>> flatten(torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1])).tolist()
    [1, 2, 3]
    """
    return padded[attention(lengths)]


def attention(lengths: Int[Tensor, " B"]) -> Tensor:
    """True on the first ``lengths[b]`` entries of row ``b``.

    >>> attention(torch.tensor([2, 1])).tolist()
    [[True, True], [True, False]]
    """
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest)[None, :] < lengths[:, None]


def flat_response_mask(jagged: JaggedShard) -> Tensor:
    """True on response tokens, flat: ``[N]``."""
    position = torch.arange(int(jagged.lengths.max()) if len(jagged) else 0)[None, :]
    return (position >= jagged.prompt_lengths[:, None])[attention(jagged.lengths)]


def flat_rows(lengths: Int[Tensor, " B"], rows: Int[Tensor, " b"]) -> Int[Tensor, " n"]:
    """Where the tokens of ``rows`` lie among the flat tokens of all rows, row by row.

    >>> flat_rows(torch.tensor([2, 1, 3]), torch.tensor([2, 0])).tolist()
    [3, 4, 5, 0, 1]
    """
    starts, own = (lengths.cumsum(0) - lengths)[rows], lengths[rows]
    place = torch.arange(int(own.sum())) - (own.cumsum(0) - own).repeat_interleave(own)
    return starts.repeat_interleave(own) + place


def chosen_rows(jagged: JaggedShard, rows: Int[Tensor, " b"]) -> JaggedShard:
    """The shard restricted to ``rows``, in their order."""
    places = flat_rows(jagged.lengths, rows)
    flat = ("tokens", "rollout_logprobs", "step_index", "step_label")
    chosen = {
        field.name: getattr(jagged, field.name)[places if field.name in flat else rows] for field in fields(jagged)
    }
    return JaggedShard(**chosen)


def pad(jagged: JaggedShard) -> Shard:
    """The padded view that the maths of one shard works on; masks are made here and nowhere else."""
    present = attention(jagged.lengths)
    position = torch.arange(present.shape[1])[None, :]
    return Shard(
        tokens=unflatten(jagged.tokens, jagged.lengths),
        attention_mask=present,
        response_mask=present & (position >= jagged.prompt_lengths[:, None]),
        rollout_logprobs=unflatten(jagged.rollout_logprobs, jagged.lengths),
        step_index=unflatten(jagged.step_index, jagged.lengths, fill=-1),
        step_label=unflatten(jagged.step_label, jagged.lengths, fill=-1),
        outcome=jagged.outcome,
        outcome_present=jagged.outcome_present,
        greedy_outcome=jagged.greedy_outcome,
        greedy_present=jagged.greedy_present,
        group=jagged.group,
        version=jagged.version,
        truncated=jagged.truncated,
        fresh=jagged.fresh,
        train=jagged.train,
        row=jagged.row,
    )


def jagged(
    verified: Sequence[Verified],
    step_indices: Sequence[Sequence[int]],
    *,
    groups: Sequence[int],
    rows: Sequence[int],
    fresh: Sequence[bool],
    train: Sequence[bool],
    greedy: Sequence[float | None] | None = None,
) -> JaggedShard:
    """Lay verified rollouts end to end; ``step_indices[i]`` gives the reasoning step of each response token of row i.

    ``greedy[i]`` is the outcome of the greedy response to the prompt of row i; None where there is none.

    Raises:
        AlignmentError: a rollout whose log-probs or step indices do not describe its tokens one by one, or an
            aborted rollout or a greedy baseline, which must never train.
    """
    tokens, logprobs, steps, labels = [], [], [], []
    for item, indices in zip(verified, step_indices, strict=True):
        rollout = item.rollout
        size = len(rollout.tokens)
        if rollout.finish == "abort":
            raise AlignmentError(f"rollout {rollout.prompt.id}#{rollout.sample} was aborted; it must be sampled again")
        if rollout.greedy:
            raise AlignmentError(f"rollout {rollout.prompt.id} is a greedy baseline; it belongs to no batch")
        if len(rollout.logprobs) != size or len(indices) != size:
            raise AlignmentError(
                f"rollout {rollout.prompt.id}#{rollout.sample} has {size} tokens, {len(rollout.logprobs)} log-probs "
                f"and {len(indices)} step indices; all three must be equal"
            )
        prompt_size = len(rollout.prompt.tokens)
        exact = item.verdict.steps or ()
        tokens += [*rollout.prompt.tokens, *rollout.tokens]
        logprobs += [0.0] * prompt_size + list(rollout.logprobs)
        steps += [-1] * prompt_size + list(indices)
        labels += [-1] * prompt_size + [exact[i] if 0 <= i < len(exact) else -1 for i in indices]
    rollouts = [item.rollout for item in verified]
    outcomes = [item.verdict.outcome for item in verified]
    baselines = [None] * len(outcomes) if greedy is None else list(greedy)
    return JaggedShard(
        lengths=torch.tensor([len(r.prompt.tokens) + len(r.tokens) for r in rollouts], dtype=torch.int64),
        prompt_lengths=torch.tensor([len(r.prompt.tokens) for r in rollouts], dtype=torch.int64),
        outcome=torch.tensor([0.0 if outcome is None else float(outcome) for outcome in outcomes]),
        outcome_present=torch.tensor([outcome is not None for outcome in outcomes], dtype=torch.bool),
        greedy_outcome=torch.tensor([0.0 if outcome is None else float(outcome) for outcome in baselines]),
        greedy_present=torch.tensor([outcome is not None for outcome in baselines], dtype=torch.bool),
        group=torch.tensor(groups, dtype=torch.int64),
        version=torch.tensor([r.version for r in rollouts], dtype=torch.int64),
        truncated=torch.tensor([r.finish == "length" for r in rollouts], dtype=torch.bool),
        fresh=torch.tensor(fresh, dtype=torch.bool),
        train=torch.tensor(train, dtype=torch.bool),
        row=torch.tensor(rows, dtype=torch.int64),
        tokens=torch.tensor(tokens, dtype=torch.int64),
        rollout_logprobs=torch.tensor(logprobs, dtype=torch.float32),
        step_index=torch.tensor(steps, dtype=torch.int64),
        step_label=torch.tensor(labels, dtype=torch.int64),
    )


def jagged_texts(examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> JaggedShard:
    """(prompt tokens, response tokens) pairs as a shard to learn from; each is a group and a step of its own."""
    prompts, lengths = [len(p) for p, _ in examples], [len(p) + len(r) for p, r in examples]
    count, total = len(examples), sum(lengths)
    no, yes = torch.zeros(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
    return JaggedShard(
        lengths=torch.tensor(lengths, dtype=torch.int64),
        prompt_lengths=torch.tensor(prompts, dtype=torch.int64),
        outcome=torch.zeros(count),
        outcome_present=no,
        greedy_outcome=torch.zeros(count),
        greedy_present=no,
        group=torch.arange(count),
        version=torch.zeros(count, dtype=torch.int64),
        truncated=no,
        fresh=no,
        train=yes,
        row=torch.arange(count),
        tokens=torch.tensor([token for p, r in examples for token in (*p, *r)], dtype=torch.int64),
        rollout_logprobs=torch.zeros(total),
        step_index=torch.tensor([step for p, r in examples for step in [-1] * len(p) + [0] * len(r)]),
        step_label=torch.full((total,), -1),
    )


def balance(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Which groups go to which shard: largest first onto the lightest shard, so that tokens are even.

    Every shard gets at least one group where there are enough of them; the order within a shard is ascending.

    >>> balance([5, 1, 1, 4], 2)
    [[0, 2], [1, 3]]
    """
    loads = [(0, 0)] * parts  # (tokens, groups): the second breaks ties between groups of no tokens
    members: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        lightest = min(range(parts), key=lambda part: (loads[part], part))
        members[lightest].append(index)
        loads[lightest] = (loads[lightest][0] + sizes[index], loads[lightest][1] + 1)
    return [sorted(group) for group in members]


def shards_needed(*world_sizes: int) -> int:
    """The smallest number of shards that every role's ranks can share evenly.

    >>> shards_needed(2, 1), shards_needed(2, 3)
    (2, 6)
    """
    return math.lcm(*world_sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the driver knows of one sequence; nothing of token length."""

    group: int  # equal value = same prompt; also the order in which groups were accepted
    prompt_id: str
    source: str
    sample: int
    outcome: float | None  # None: the verifier gave no verdict
    reason: str
    finish: str
    prompt_length: int
    response_length: int
    num_steps: int
    version: int
    repetition: float  # share of repeated n-grams
    copy: bool  # token by token an earlier response of its group
    fresh: bool  # sampled in the first round
    train: bool  # its group was accepted by `keep`


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A row per sequence, and references to the shards that hold the tokens.

    ``selected[i]`` says whether row i trains the policy. ``counts`` are the numbers of what was sampled, filtered,
    truncated or not judged on the way here.
    """

    step: int
    rows: tuple[Row, ...]
    shards: tuple[Any, ...]
    texts: tuple[Any, ...]  # of each shard, a text per row; read by sources that read text, and by nobody else
    members: tuple[tuple[int, ...], ...]  # rows of each shard, in the shard's order
    selected: tuple[bool, ...]
    counts: Mapping[str, float]

    @property
    def num_groups(self) -> int:
        """Accepted groups; they are numbered first."""
        return len({row.group for row in self.rows if row.train})
