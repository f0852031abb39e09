"""Steps of reasoning: how a response is split, and rewards per step.

A step is a span of the response's tokens. ``step_index[b, t]`` counts the steps of row b from 0 and never decreases
within a response; it is -1 off the response.

A splitter is a function ``(pieces, **settings) -> starts``: given the decoded text of each response token, the token
positions at which a new step starts. :func:`step_indices` turns starts into an index and repairs degenerate splits, so
that a new splitter needs no care for them.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlprm.core.groups import known
from rlprm.errors import ConfigError

Splitter = Callable[[Sequence[str]], list[int]]


def step_indices(pieces: Sequence[str], splitter: Splitter) -> list[int]:
    """The step of each response token, from 0 without gaps; no step is blank.

    ``pieces[i]`` is the text that token i adds to the response (special tokens such as EOS add ``""``). A span of blank
    text is no step: it belongs to the step before it, or, at the start of the response, to the step after it. So the
    trailing EOS belongs to the last step, and a run of separators ends one step, not many.

    >>> from functools import partial
    >>> step_indices(["1+1", "=2", ";", "\\n", "2", ";", ""], partial(separator, text=";"))
    [0, 0, 0, 1, 1, 1, 1]
    """
    starts = sorted({0, *splitter(pieces)})
    spans = [span for span in zip(starts, [*starts[1:], len(pieces)], strict=True) if span[0] < span[1]]
    indices: list[int] = []
    step, seen_text = 0, False
    for start, end in spans:
        filled = any(piece.strip() for piece in pieces[start:end])
        step += filled and seen_text
        seen_text = seen_text or filled
        indices += [step] * (end - start)
    return indices


def separator(pieces: Sequence[str], *, text: str) -> list[int]:
    """A step ends with the token in which ``text`` is complete; the separator may straddle tokens.

    >>> separator(["a\\n", "\\nb", "\\n\\nc", "d"], text="\\n\\n")
    [2, 3]

    Raises:
        ConfigError: an empty separator.
    """
    if not text:
        raise ConfigError("the step separator is empty; give the text that ends a step, or use the `whole` splitter")
    joined = "".join(pieces)
    ends = list(accumulate(len(piece) for piece in pieces))
    found = [match.end() for match in re.finditer(re.escape(text), joined)]
    return [_token_of(ends, end - 1) + 1 for end in found]


def regex(pieces: Sequence[str], *, pattern: str) -> list[int]:
    """Each match of ``pattern`` starts a new step, with the token that holds its first character.

    Text before the first match is a step of its own.

    >>> regex(["Step", " 1: a", "\\nStep", " 2: b"], pattern=r"Step \\d+:")
    [0, 2]

    Raises:
        ConfigError: a pattern that does not compile, or that matches the empty string (it would match everywhere).
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"the step pattern {pattern!r} is no regular expression: {error}; correct it") from error
    if compiled.match(""):
        raise ConfigError(f"the step pattern {pattern!r} matches the empty string; make it match the start of a step")
    ends = list(accumulate(len(piece) for piece in pieces))
    return [_token_of(ends, match.start()) for match in compiled.finditer("".join(pieces))]


def fixed_length(pieces: Sequence[str], *, tokens: int) -> list[int]:
    """A step is ``tokens`` tokens long; the last one may be shorter.

    >>> fixed_length(["a", "b", "c"], tokens=2)
    [0, 2]

    Raises:
        ConfigError: a length below 1.
    """
    if tokens < 1:
        raise ConfigError(f"a step of {tokens} tokens cannot be; give at least 1")
    return list(range(0, len(pieces), tokens))


def whole(pieces: Sequence[str]) -> list[int]:
    """The whole response is one step.

    >>> whole(["a", "b"])
    [0]
    """
    return [0]


def _token_of(ends: list[int], character: int) -> int:
    """The token that holds a character; tokens without text (``ends`` repeats) hold none."""
    return bisect_right(ends, character)


def num_steps(step_index: Int[Tensor, "B T"]) -> int:
    """``S``, the largest number of steps in a row.

    >>> num_steps(torch.tensor([[-1, 0, 0, 1], [0, -1, -1, -1]]))
    2
    """
    return int(step_index.max()) + 1 if step_index.numel() else 0


def step_counts(step_index: Int[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Steps of each row; 0 for a row without any, also where no row has a token.

    >>> step_counts(torch.tensor([[-1, 0, 0, 1], [-1, -1, -1, -1]])).tolist()
    [2, 0]
    """
    if step_index.shape[1] == 0:  # nothing to take the largest of: a rank without rows
        return torch.zeros(len(step_index), dtype=step_index.dtype, device=step_index.device)
    return step_index.amax(1) + 1


def step_sums(
    values: Float[Tensor, "B T"], present: Bool[Tensor, "B T"], step_index: Int[Tensor, "B T"]
) -> Float[Tensor, "B S"]:
    """``R[b, h] = sum_{t in step h, present} values[b, t]``, in float64.

    >>> everywhere = torch.tensor([[True, True, True]])
    >>> step_sums(torch.tensor([[1.0, 2.0, 4.0]]), everywhere, torch.tensor([[0, 0, 1]])).tolist()
    [[3.0, 4.0]]
    """
    sums = torch.zeros(len(values), num_steps(step_index), dtype=torch.float64, device=values.device)
    if sums.shape[1] == 0:
        return sums
    return sums.scatter_add(1, step_index.clamp_min(0), known(values, present & (step_index >= 0)))


def spread_over_step(step_values: Float[Tensor, "B S"], step_index: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Each token gets the value of its step, undivided; 0 off the response.

    >>> spread_over_step(torch.tensor([[3.0, 4.0]]), torch.tensor([[-1, 0, 0, 1]])).tolist()
    [[0.0, 3.0, 3.0, 4.0]]
    """
    if step_values.shape[1] == 0:
        return torch.zeros(step_index.shape, dtype=step_values.dtype, device=step_values.device)
    spread = step_values.gather(1, step_index.clamp_min(0))
    return torch.where(step_index >= 0, spread, torch.zeros_like(spread))


def step_ends(step_index: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True on the last token of each step, ``end(h) = b_h - 1``.

    >>> step_ends(torch.tensor([[-1, 0, 0, 1, -1]])).tolist()
    [[False, False, True, True, False]]
    """
    return last_of(step_index >= 0, step_index)


def last_of(present: Bool[Tensor, "B T"], step_index: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True on the last present token of each step.

    >>> last_of(torch.tensor([[True, True, False, True]]), torch.tensor([[0, 0, 0, 1]])).tolist()
    [[False, True, False, True]]
    """
    position = torch.arange(step_index.shape[1], device=step_index.device).expand_as(step_index)
    counts = present & (step_index >= 0)
    latest = torch.full((len(step_index), num_steps(step_index)), -1, dtype=torch.int64, device=step_index.device)
    if latest.shape[1] == 0:
        return counts
    candidates = torch.where(counts, position, torch.full_like(position, -1))
    latest = latest.scatter_reduce(1, step_index.clamp_min(0), candidates, "amax")
    return counts & (latest.gather(1, step_index.clamp_min(0)) == position)


def to_step_ends(
    rewards: Float[Tensor, "B T"], present: Bool[Tensor, "B T"], step_index: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """The sum of each step's present rewards at the step's last token, and where there is one.

    A step without any present reward stays absent.

    >>> moved = to_step_ends(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, False]]),
    ...                      torch.tensor([[0, 0, 1]]))
    >>> moved[0].tolist(), moved[1].tolist()
    ([[0.0, 3.0, 0.0]], [[False, True, False]])
    """
    there = step_sums(torch.ones_like(rewards), present, step_index) > 0
    return place_at_step_ends(step_sums(rewards, present, step_index).to(rewards.dtype), there, step_index)


def place_at_step_ends(
    step_values: Float[Tensor, "B S"], step_present: Bool[Tensor, "B S"], step_index: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Rewards given per step (a judge, exact labels) as rewards per token: step h's value at ``end(h)``.

    >>> placed = place_at_step_ends(torch.tensor([[3.0, 4.0]]), torch.tensor([[True, False]]),
    ...                             torch.tensor([[0, 0, 1]]))
    >>> placed[0].tolist(), placed[1].tolist()
    ([[0.0, 3.0, 0.0]], [[False, True, False]])
    """
    ends = step_ends(step_index)
    present = ends & (spread_over_step(step_present.double(), step_index) > 0)
    rewards = spread_over_step(step_values, step_index)
    return torch.where(present, rewards, torch.zeros_like(rewards)), present
