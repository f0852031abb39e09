"""Bytes of a learner process, part by part, as DeepSpeed and the engine really hold them.

P parameters over n ranks, in bf16 (float32), bytes on each rank:

    ZeRO   weights    gradients                    master      moments   buckets on a GPU (500M elements each)
    0      2P (4P)    2P (4P), 4P in a bf16 step   4P (-)      8P        flat copy for the all-reduce
    1      2P (4P)    4P (4P)                      4P/n        8P/n      flat copy (two, and a flat copy)
    2      2P (4P)    4P/n                         4P/n        8P/n      two, and flat copies of one
    3      2P/n       4P/n                         4P/n (-)    8P/n      one in float32, a copy, gathered parameters
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlprm.planning.activations import ITEM, Micro, head_peak, kept, scoring_peak
from rlprm.planning.shapes import Shape

BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size, which is left as it is
LIVE = 1_000_000_000  # elements that ZeRO-3 keeps gathered at most (stage3_max_live_parameters)
GIB = 1 << 30

Parts = dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one model holds in a process: all the time, and on top of that in each phase; and in host memory."""

    always: Parts
    phases: Mapping[str, Parts]
    host: Parts = field(default_factory=dict)
    loaded: int = 0  # bytes of the whole model, which each rank reads into host memory first


@dataclass(frozen=True, slots=True, kw_only=True)
class Learns:
    """How a model learns, as far as memory is concerned."""

    micro: Micro
    ranks: int
    zero: int
    offload: bool
    dtype: str
    attention: Any
    checkpointing: bool
    on_gpu: bool
    accumulates: bool  # several micro-batches for one optimizer step
    entropy: bool = False
    value: bool = False


def learner(shape: Shape, how: Learns) -> Held:
    """A model that learns under DeepSpeed."""
    item, ranks = ITEM[how.dtype], how.ranks
    number = shape.value_parameters if how.value else shape.parameters
    own = -(-number // ranks)
    wide = item == 4
    always: Parts = {"weights": item * (own if how.zero == 3 else number)}
    always["optimizer"] = _optimizer(number, ranks, how.zero, wide)
    gradients, at_step = _gradients(how, number, own, wide)
    host: Parts = {}
    if how.offload:
        host = offloaded(number, ranks=ranks, zero=how.zero, dtype=how.dtype)
        del always["optimizer"]
        gradients, at_step = (0 if how.zero != 1 else gradients), 0
        if how.zero == 3:
            del always["weights"]
            always["gathered"] = 0
    bucket, copies = _buckets(how, number, shape.embedding, item, wide)
    if how.zero == 3:
        always["gathered"] = item * min(number, LIVE)
        always["gradients"] = gradients
        if how.on_gpu:
            always["buckets"] = bucket
    kept_bytes = kept(shape, how.micro, dtype=how.dtype, attention=how.attention, checkpointing=how.checkpointing)
    head = 0 if how.value else head_peak(shape, how.micro, dtype=how.dtype, entropy=how.entropy)
    own_bucket = 0 if how.zero == 3 and how.on_gpu else bucket
    later = 0 if how.zero == 3 else gradients
    backward: Parts = {"activations": kept_bytes, "logits and their gradients": head}
    if how.on_gpu and own_bucket:
        backward["buckets"] = own_bucket  # allocated whole, when the backward pass begins
    if later and (how.accumulates or (how.zero in (0, 1) and not wide)):
        backward["gradients"] = later
    embedding = item * shape.embedding  # its gradient is dense, and comes last
    reduce: Parts = {
        "buckets": own_bucket + copies,
        "gradients": later,
        "logits and their gradients": embedding if shape.tied else 0,
    }
    step: Parts = {"gradients": later + at_step}
    phases = {"backward": backward, "reduce": reduce, "step": step}
    return Held(always=always, phases=phases, host=host, loaded=item * number)


def offloaded(number: int, *, ranks: int, zero: int, dtype: str) -> Parts:
    """Bytes in host memory of one rank with offload=cpu, of a model of ``number`` parameters: moments, master weights, the
    gradients' partition and a copy of the updated weights; under ZeRO-3 the weights as well.

    >>> sum(offloaded(1000, ranks=1, zero=2, dtype="bfloat16").values()), offloaded(1000, ranks=4, zero=3, dtype="bfloat16")
    (18000, {'optimizer': 3000, 'gradients': 1000, 'staging': 500, 'weights': 500})
    """
    item, own = ITEM[dtype], -(-number // ranks)
    host = {"optimizer": _optimizer(number, ranks, zero, item == 4), "gradients": 4 * own, "staging": item * own}
    return {**host, "weights": item * own} if zero == 3 else host


def _optimizer(number: int, ranks: int, zero: int, wide: bool) -> int:
    """Two moments, and master weights in float32 unless the weights themselves are."""
    master = 0 if (wide and zero in (0, 3)) else 4
    return (master + 8) * (-(-number // ranks) if zero > 0 else number)


def _gradients(how: Learns, number: int, own: int, wide: bool) -> tuple[int, int]:
    """Bytes of gradients when all are there, and what the optimizer step makes beside them."""
    if how.zero == 0:
        return (4 * number, 0) if wide else (2 * number, 4 * number)
    if how.zero == 1:
        if wide:
            return 4 * number, 4 * own
        return (4 if not how.offload else 6) * number, 0
    if how.zero == 2:
        return (4 * own, 8 * own) if wide else (4 * own, 0)
    return 4 * own, 0


def _buckets(how: Learns, number: int, largest: int, item: int, wide: bool) -> tuple[int, int]:
    """DeepSpeed's buckets, and the flat copies of what is being reduced.

    On a GPU buckets are allocated whole, whatever the model's size; on a CPU only what is written takes memory.
    """
    reduced = min(number, max(BUCKET, largest))
    flat = reduced * item + (0 if wide else 4 * reduced)  # the all-reduce is in float32
    filled = BUCKET if how.on_gpu else min(number, BUCKET)
    if how.zero == 0 or (how.zero == 1 and not wide and not how.offload):
        return 0, 4 * reduced
    if how.zero == 3:
        return 4 * filled, 4 * reduced
    return (2 if how.on_gpu else 1) * item * filled, flat


def frozen(shape: Shape, micro: Micro, *, dtype: str) -> Held:
    """A model that only scores: whole on every rank."""
    size = ITEM[dtype] * shape.parameters
    phases = {"score": {"activations": scoring_peak(shape, micro, dtype=dtype)}}
    return Held(always={"frozen models": size}, phases=phases, loaded=size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """A process at its highest."""

    phase: str
    parts: Parts

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def peak(held: Mapping[str, Held], *, framework: int, slack: float) -> Peak:
    """All models of a process: what each always holds, and the largest phase of any. ``slack``: lost by the allocator."""
    always: Parts = {}
    for each in held.values():
        for part, size in each.always.items():
            always[part] = always.get(part, 0) + size
    phases = {f"{name}: {phase}": parts for name, each in held.items() for phase, parts in each.phases.items()}
    name, parts = max(phases.items(), key=lambda item: sum(item[1].values()), default=("idle", {}))
    total = {part: always.get(part, 0) + parts.get(part, 0) for part in {**always, **parts}}
    total = {part: size for part, size in total.items() if size}
    if slack:
        total["allocator"] = int(slack * sum(total.values()))
    return Peak(phase=name, parts={**total, "framework": framework})
