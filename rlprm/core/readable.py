"""Rollouts as people read them: what was asked, what was answered, and what each step earned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlprm.records import Advantages, Shard, Stream


def readable(
    shard: Shard,
    streams: Mapping[str, Stream],
    advantages: Advantages,
    rows: Sequence[int],
    decode: Callable[[Sequence[int]], str],
) -> list[dict[str, Any]]:
    """One plain dictionary per row of ``rows``, ready for ``rollouts.jsonl``.

    Per step: its text, its exact label where known, the *sum* of each stream's rewards over its tokens (null where the
    stream says nothing), and the *mean* advantage and its parts over its tokens. ``outcome`` is null where the verifier
    failed. Tokens that belong to no step are in ``response`` and in no step.

    ``tokens`` holds what the policy read and sampled, with ``logprobs`` (nats, when sampled), and each step's ``span`` the
    first of the response's tokens and the one after the last: enough to learn from the row without tokenising it again.
    """
    return [_row(shard, streams, advantages, row, decode) for row in rows]


def _row(
    shard: Shard,
    streams: Mapping[str, Stream],
    advantages: Advantages,
    row: int,
    decode: Callable[[Sequence[int]], str],
) -> dict[str, Any]:
    tokens, response = shard.tokens[row], shard.response_mask[row]
    prompt = shard.attention_mask[row] & ~response
    index = shard.step_index[row]
    num_steps = int(index.max().item()) + 1 if index.numel() else 0
    return {
        "group": int(shard.group[row]),
        "version": int(shard.version[row]),
        "prompt": _text(tokens, prompt, decode),
        "response": _text(tokens, response, decode),
        "outcome": float(shard.outcome[row]) if bool(shard.outcome_present[row]) else None,
        "truncated": bool(shard.truncated[row]),
        "train": bool(shard.train[row]),
        "reward": {name: _sum(stream, row, response) for name, stream in streams.items()},
        "steps": [
            _step(shard, streams, advantages, row, response & (index == step), decode) for step in range(num_steps)
        ],
        "tokens": {
            "prompt": tokens[prompt].tolist(),
            "response": tokens[response].tolist(),
            "logprobs": [_plain(value) for value in shard.rollout_logprobs[row][response]],
        },
    }


def _step(
    shard: Shard,
    streams: Mapping[str, Stream],
    advantages: Advantages,
    row: int,
    inside: Bool[Tensor, " T"],
    decode: Callable[[Sequence[int]], str],
) -> dict[str, Any]:
    label = int(shard.step_label[row][inside][0]) if bool(inside.any()) else -1
    return {
        "text": _text(shard.tokens[row], inside, decode),
        "label": None if label < 0 else label,
        "span": _span(shard.response_mask[row], inside),
        "reward": {name: _sum(stream, row, inside) for name, stream in streams.items()},
        "advantage": _mean(advantages.total[row][inside]),
        "parts": {name: _mean(part[row][inside]) for name, part in advantages.parts.items()},
    }


def _span(response: Bool[Tensor, " T"], inside: Bool[Tensor, " T"]) -> list[int]:
    """Places of a step among the response's tokens; a step is never interrupted."""
    places = inside[response].nonzero().flatten().tolist()
    return [places[0], places[-1] + 1] if places else [0, 0]


def _text(tokens: Int[Tensor, " T"], inside: Bool[Tensor, " T"], decode: Callable[[Sequence[int]], str]) -> str:
    return decode(tokens[inside].tolist())


def _sum(stream: Stream, row: int, inside: Bool[Tensor, " T"]) -> float | None:
    counted = stream.present[row] & inside
    return _plain(stream.rewards[row][counted].double().sum()) if bool(counted.any()) else None


def _mean(values: Tensor) -> float | None:
    return _plain(values.double().mean()) if values.numel() else None


def _plain(value: Tensor) -> float | None:
    # JSON has no NaN; a rollout that is not finite must still be readable, it is the one somebody wants to see.
    return round(float(value), 6) if bool(torch.isfinite(value)) else None
