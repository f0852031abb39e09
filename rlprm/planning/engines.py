"""Bytes of a rollout engine: weights, keys and values, and how many sequences that is room for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlprm.planning.activations import ITEM
from rlprm.planning.memory import Parts
from rlprm.planning.shapes import Shape

BATCHED_TOKENS = 8192  # tokens of prompts that vLLM puts through at once, for which it keeps room
GRAPHS = 1 << 30  # CUDA graphs of decoding, outside vLLM's own share: an assumption
CONTEXT = 1 << 30  # CUDA context and libraries, inside its share: an assumption


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One engine on each of its devices."""

    parts: Parts  # device bytes (host bytes on a CPU)
    cache: int  # bytes of keys and values
    sequences: int  # of the longest length, that the cache holds at once
    together: int  # sequences decoded together
    problem: str | None  # why it could not start


def engine(
    shape: Shape, rollout: Mapping[str, Any], *, dtype: str, longest: int, tensor_parallel: int, gpu_memory: int | None,
    bucket: int,
) -> Engine:  # fmt: skip
    """An engine of ``rollout.engine``; ``gpu_memory`` None: on a CPU. ``bucket``: bytes of weights received at a time."""
    item = ITEM[dtype]
    weights = item * shape.parameters // tensor_parallel
    token = -(-shape.kv_bytes(item) // tensor_parallel)
    together = int(rollout["max_num_seqs"])
    bucket = max(bucket, item * shape.embedding)
    share, cache = rollout.get("gpu_memory_utilization"), rollout.get("kv_cache_bytes")
    vllm = "kv_cache_bytes" in rollout
    work = _work(shape, together, item, tensor_parallel)
    problem = None
    if not vllm:  # transformers: the cache grows with what is decoded, and is copied as it grows
        cache = 2 * together * longest * token
        parts: Parts = {"weights": weights, "keys and values": cache, "activations": work}
    elif gpu_memory is None:
        assert cache is not None, "the configuration check demands one of the two"
        # matrices that vLLM packs for the CPU, and what loading leaves: half as much again at both sizes measured
        parts = {"weights": weights * 3 // 2, "keys and values": cache, "activations": _decoding(shape, together, item)}
    else:
        assert share is not None, "the configuration check demands one of the two"
        room = int(share * gpu_memory)
        cache = room - weights - work - CONTEXT
        parts = {"weights": weights, "keys and values": max(cache, 0), "activations": work, "framework": CONTEXT}
        if not rollout.get("enforce_eager"):
            parts["CUDA graphs"] = GRAPHS
        parts["transfer bucket"] = bucket
    sequences = max(0, cache) // (token * longest)
    if vllm and sequences < 1:
        have = f"{max(cache, 0) / 2**30:.2f} GiB" if gpu_memory is not None else f"{cache} bytes"
        problem = (
            f"its KV cache has {have} and one sequence of {longest} tokens takes {token * longest / 2**30:.2f} GiB"
        )
    if shape.positions is not None and longest > shape.positions:
        problem = f"a sequence may have {longest} tokens and {shape.name} has {shape.positions} positions"
    if (shape.kv_heads % tensor_parallel and tensor_parallel % shape.kv_heads) or shape.heads % tensor_parallel:
        problem = (
            f"{shape.heads} attention heads ({shape.kv_heads} of keys) cannot be split over {tensor_parallel} GPUs"
        )
    return Engine(
        parts=parts,
        cache=max(cache, 0),
        sequences=sequences,
        together=max(1, min(together, sequences) if vllm else together),
        problem=problem,
    )


def _work(shape: Shape, together: int, item: int, tensor_parallel: int) -> int:
    """What vLLM finds it needs when it tries its largest batch: one layer, and float32 logits for sampling."""
    layer = BATCHED_TOKENS * item * (2 * shape.intermediate // tensor_parallel + 4 * shape.hidden)
    return layer + together * shape.vocabulary * 12


def _decoding(shape: Shape, together: int, item: int) -> int:
    return together * (item * (2 * shape.intermediate + 4 * shape.hidden) + shape.vocabulary * 12)
