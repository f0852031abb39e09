"""Micro-batches under a token budget, padded or packed; each sequence lies whole in exactly one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlprm.errors import ConfigError
from rlprm.records import MicroBatch

Layout = Literal["padded", "packed"]


def micro_batches(lengths: Sequence[int], token_budget: int, max_sequences: int, layout: Layout) -> list[list[int]]:
    """Which sequences go through the model together: sorted by length, longest first, filled up to the budget.

    Budget: padded tokens (longest length times number of sequences) for the padded layout, real tokens for the packed
    one. Longest first, so that memory runs out at once or never. A sequence that is longer than the budget gets a
    micro-batch of its own.

    >>> micro_batches([3, 8, 5, 20], 16, 8, "padded"), micro_batches([3, 8, 5, 20], 16, 8, "packed")
    ([[3], [1, 2], [0]], [[3], [1, 2, 0]])

    Raises:
        ConfigError: a budget or a number of sequences below 1, or an unknown layout.
    """
    if token_budget < 1 or max_sequences < 1:
        raise ConfigError(f"token budget {token_budget}, at most {max_sequences} sequences; both must be at least 1")
    if layout not in ("padded", "packed"):
        raise ConfigError(f"layout is {layout!r}; expected padded or packed")
    batches: list[list[int]] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # Sorted, so the first member is the longest: padding makes every later one as expensive as that.
        cost = lengths[batches[-1][0]] if batches and layout == "padded" else lengths[index]
        if not batches or len(batches[-1]) == max_sequences or used + cost > token_budget:
            batches.append([])
            used, cost = 0, lengths[index]
        batches[-1].append(index)
        used += cost
    return batches


def build_micro(
    members: Sequence[int],
    lengths: Int[Tensor, " B"],
    tokens: Int[Tensor, " N"],
    response_mask: Bool[Tensor, " N"],
    token_fields: Mapping[str, Tensor],
    sequence_fields: Mapping[str, Tensor],
    layout: Layout,
) -> MicroBatch:
    """The micro-batch of ``members`` (indices of sequences), from flat per-token and per-sequence arrays.

    Flat arrays lay all B sequences end to end in order; a flat array of shape [N] becomes [b, t]. Padding is 0 (False),
    and -1 in ``sequence``. Sequence i of the micro-batch is ``members[i]``.

    >>> flat = torch.tensor([5, 6, 7])
    >>> build_micro([1, 0], torch.tensor([1, 2]), flat, flat > 5, {}, {}, "padded").tokens.tolist()
    [[6, 7], [5, 0]]
    >>> build_micro([1, 0], torch.tensor([1, 2]), flat, flat > 5, {}, {}, "packed").positions.tolist()
    [[0, 1, 0]]

    Raises:
        ConfigError: no members, an unknown layout, or arrays of other sizes than ``lengths`` says.
    """
    if not members:
        raise ConfigError("a micro-batch without sequences cannot be built; skip it, or run any sequence with weight 0")
    total, rows = int(lengths.sum()), len(lengths)
    wrong = {name: len(field) for name, field in token_fields.items() if len(field) != total}
    wrong |= {name: len(field) for name, field in sequence_fields.items() if len(field) != rows}
    if wrong or len(tokens) != total or len(response_mask) != total:
        raise ConfigError(
            f"{rows} sequences of {total} tokens, but {len(tokens)} tokens, {len(response_mask)} mask entries and "
            f"fields of other sizes {wrong}; flatten all fields with the same lengths"
        )
    chosen = torch.tensor(members, dtype=torch.int64, device=lengths.device)
    if layout == "padded":
        source, sequence, positions = _padded(chosen, lengths)
    elif layout == "packed":
        source, sequence, positions = _packed(chosen, lengths)
    else:
        raise ConfigError(f"layout is {layout!r}; expected padded or packed")

    def laid_out(flat: Tensor) -> Tensor:
        return torch.where(sequence >= 0, flat[source], torch.zeros((), dtype=flat.dtype, device=flat.device))

    return MicroBatch(
        tokens=laid_out(tokens),
        positions=positions,
        sequence=sequence,
        response_mask=laid_out(response_mask),
        packed=layout == "packed",
        num_sequences=len(members),
        token_fields={name: laid_out(field) for name, field in token_fields.items()},
        sequence_fields={name: field[chosen] for name, field in sequence_fields.items()},
    )


def _padded(chosen: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each entry comes from in the flat array, whose it is, and its position."""
    starts = (lengths.cumsum(0) - lengths)[chosen]
    position = torch.arange(int(lengths[chosen].max()), device=lengths.device).expand(len(chosen), -1)
    real = position < lengths[chosen][:, None]
    row = torch.arange(len(chosen), device=lengths.device)[:, None]
    zero = torch.zeros_like(position)
    source = torch.where(real, starts[:, None] + position, zero)
    return source, torch.where(real, row, -1), torch.where(real, position, zero)


def _packed(chosen: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    source, sequence, position = _padded(chosen, lengths)
    real = sequence >= 0
    return source[real][None], sequence[real][None], position[real][None]
