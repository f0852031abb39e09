"""A learner's state on another number of ranks than wrote it: each rank takes its part of every parameter, by name.

DeepSpeed cuts weights and Adam's moments into one part per rank and reads them back on as many ranks only. Here the parts
are put together again by the name of the parameter (what is not needed stays on disk, the files are mapped), cut for the
ranks there are now, and handed to DeepSpeed's own reader of parts. Nothing is converted and no file is written.

DeepSpeed's universal checkpoints are not used: under ZeRO-3 their reader gives every parameter group the weight decay of
the first and lets all groups count their steps in one tensor, and both directions unpickle whatever the files hold.

    ZeRO 1 and 2   all parameters of a group end to end, the whole cut by ranks; `param_slice_mappings` says what is where
    ZeRO 3         each parameter cut by ranks, rounded up; the parts of a sub-group end to end
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlprm.engine import distributed
from rlprm.engine.checkpoints import safe_load
from rlprm.errors import CheckpointError

MASTER = "fp32"  # the float32 weights among the quantities of a parameter; Adam's have torch's names


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What all ranks of a checkpoint have written, by parameter: the pieces of each flattened quantity, in order."""

    pieces: Mapping[str, Mapping[str, Sequence[Tensor]]]
    scalars: Mapping[str, Any]  # of the optimizer, equal for all parameters: the step
    first: Mapping[str, Any]  # the optimizer's state as rank 0 wrote it
    buffers: Mapping[str, Tensor]
    counters: Mapping[str, int]  # of the engine

    def fill(self, into: Tensor, name: str, quantity: str, start: int) -> None:
        """Copy the elements of a flattened quantity from ``start`` on into all of ``into``."""
        place = 0
        for piece in self.pieces[name][quantity]:
            begin, end = max(start, place), min(start + len(into), place + len(piece))
            if begin < end:
                into[begin - start : end - start].copy_(piece[begin - place : end - place])
            place += len(piece)

    def full(self, name: str, quantity: str) -> Tensor:
        """The whole flattened quantity."""
        return torch.cat(list(self.pieces[name][quantity]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a parameter in a flat tensor of this rank."""

    name: str
    start: int  # in the flattened parameter
    place: int  # in the flat tensor
    count: int


def read(folder: Path, ranks: int) -> Saved:
    """The state under ``folder`` that ``ranks`` ranks have written, by parameter.

    Raises:
        CheckpointError: a file is missing or damaged, or the parts do not make whole parameters.
    """
    model = safe_load(_only(folder, "*mp_rank_00_model_states.pt", rank=0), mmap=True)
    states = [
        safe_load(_only(folder, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", rank), mmap=True)[
            "optimizer_state_dict"
        ]
        for rank in range(ranks)
    ]
    shapes = {name: math.prod(shape) for group in model["param_shapes"] for name, shape in group.items()}
    pieces: dict[str, dict[str, list[Tensor]]] = {name: {} for name in shapes}
    for rank, state in enumerate(states):
        groups = list(_groups(state))
        if "fp32_flat_groups" in state:
            parts = [_parts_of_shapes(group, rank, ranks) for group in model["param_shapes"]]
        else:
            parts = [
                [Part(name=name, start=0, place=each.start, count=each.numel) for name, each in group.items()]
                for group in state["param_slice_mappings"]
            ]
        for flats, group in zip(groups, parts, strict=True):
            for part in group:
                for quantity, flat in flats.items():
                    piece = flat[part.place : part.place + part.count]
                    pieces[part.name].setdefault(quantity, []).append(piece)
    for name, count in shapes.items():
        sizes = {quantity: sum(map(len, found)) for quantity, found in pieces[name].items()}
        if MASTER not in sizes or set(sizes.values()) != {count}:
            raise CheckpointError(
                f"{folder}: {name} has {count} elements and its parts on {ranks} ranks have {sizes}; the checkpoint is "
                "damaged or of another version of DeepSpeed: resume an older one, or with as many ranks as wrote it"
            )
    return Saved(
        pieces=pieces,
        scalars=_scalars(folder, states),
        first=states[0],
        buffers={name: model["module"][name] for name in model["buffer_names"] if name in model["module"]},
        counters={name: int(model[name]) for name in ("global_steps", "skipped_steps", "global_samples")},
    )


def load(engine: Any, folder: Path, ranks: int) -> None:
    """Give a DeepSpeed engine (ZeRO 1 to 3) its part of what ``ranks`` other ranks have written; collective.

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    saved = read(folder, ranks)
    ours = set(engine.param_names.values())
    if ours != saved.pieces.keys():
        differing = sorted(ours ^ saved.pieces.keys())
        raise CheckpointError(f"{folder} is of another model: {differing[0]!r} is in one of them only")
    optimizer = engine.optimizer
    sharded = hasattr(optimizer, "fp16_groups")  # ZeRO-3
    if sharded:
        optimizer.checkpoint_event_prologue()
    state = _own_stage3(optimizer, saved) if sharded else _own_flat(optimizer, saved)
    optimizer.load_state_dict(
        [state] * distributed.world_size(), load_optimizer_states=True, load_from_fp32_weights=True
    )
    if sharded:
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
    for name, buffer in engine.module.named_buffers():
        if name in saved.buffers:
            buffer.data.copy_(saved.buffers[name])
    for counter, value in saved.counters.items():
        setattr(engine, counter, value)


def _own_flat(optimizer: Any, saved: Saved) -> dict[str, Any]:
    """This rank's state under ZeRO 1 and 2, as DeepSpeed itself would have written it."""
    masters, states = [], {}
    if hasattr(optimizer, "bf16_groups"):  # ZeRO-1 in bf16 has an optimizer of its own
        groups, flats = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    else:
        groups, flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    for index, (group, flat) in enumerate(zip(groups, flats, strict=True)):
        parts = []
        for parameter in group:
            link = parameter._hp_mapping
            if link is not None:  # some of it is on this rank
                into, of = link.hp_fragment_address, link.lp_fragment_address
                name = optimizer.param_names[parameter]
                parts.append(Part(name=name, start=of.start, place=into.start, count=into.numel))
        quantities = _assembled(saved, parts, len(flat))
        masters.append(quantities.pop(MASTER))
        states[index] = quantities
    return {
        **saved.first,
        "base_optimizer_state": _torch_state(optimizer.optimizer, states, saved),
        "single_partition_of_fp32_groups": masters,
    }


def _own_stage3(optimizer: Any, saved: Saved) -> dict[str, Any]:
    """This rank's state under ZeRO 3, as DeepSpeed itself would have written it."""
    masters, states = [], {}
    rank, ranks = distributed.rank(), distributed.world_size()
    for index, (group, flat) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        shapes = {optimizer.param_names[parameter]: parameter.ds_shape for parameter in group}
        quantities = _assembled(saved, _parts_of_shapes(shapes, rank, ranks), len(flat))
        masters.append(quantities.pop(MASTER))
        states[index] = quantities
    optimizer._set_fp32_optimizer_param_groups()  # DeepSpeed hides its flat parameters from torch's optimizer
    try:
        inner = _torch_state(optimizer.optimizer, states, saved)
    finally:
        optimizer._clear_fp32_optimizer_param_groups()
    return {**saved.first, "optimizer_state_dict": inner, "fp32_flat_groups": masters}


def _assembled(saved: Saved, parts: Sequence[Part], size: int) -> dict[str, Tensor]:
    """Each quantity of a group on this rank, end to end in a flat tensor; padding is 0."""
    quantities = sorted({quantity for found in saved.pieces.values() for quantity in found})
    flats = {quantity: torch.zeros(size, dtype=torch.float32) for quantity in quantities}
    for part in parts:
        for quantity, flat in flats.items():
            saved.fill(flat[part.place : part.place + part.count], part.name, quantity, part.start)
    return flats


def _torch_state(optimizer: Any, states: Mapping[int, Mapping[str, Tensor]], saved: Saved) -> dict[str, Any]:
    """What torch's optimizer loads; before its first step it has no state."""
    scalars = saved.scalars
    filled = {
        index: {**quantities, **{name: _copied(value) for name, value in scalars.items()}}
        for index, quantities in states.items()
        if quantities
    }
    return {"state": filled, "param_groups": optimizer.state_dict()["param_groups"]}


def _copied(value: Any) -> Any:
    # each parameter counts its own steps in place, so they must not share a tensor
    return value.clone() if isinstance(value, Tensor) else value


def _parts_of_shapes(shapes: Mapping[str, Sequence[int]], rank: int, ranks: int) -> list[Part]:
    """Where a rank's part of each parameter lies under ZeRO 3.

    >>> [(part.name, part.start, part.place, part.count) for part in _parts_of_shapes({"a": (5,), "b": (2, 2)}, 1, 2)]
    [('a', 3, 0, 2), ('b', 2, 3, 2)]
    """
    parts, place = [], 0
    for name, shape in shapes.items():
        whole = math.prod(shape)
        share = math.ceil(whole / ranks)
        count = max(0, min(share, whole - rank * share))
        parts.append(Part(name=name, start=rank * share, place=place, count=count))
        place += share
    return parts


def _groups(state: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Flat tensors of each group (or sub-group) of one rank, by quantity."""
    masters = state["fp32_flat_groups"] if "fp32_flat_groups" in state else state["single_partition_of_fp32_groups"]
    for index, flat in enumerate(masters):
        yield {MASTER: flat, **{name: value for name, value in _inner(state).get(index, {}).items() if _is_flat(value)}}


def _inner(state: Mapping[str, Any]) -> Mapping[int, Mapping[str, Any]]:
    torch_state = state["optimizer_state_dict"] if "fp32_flat_groups" in state else state["base_optimizer_state"]
    found: Mapping[int, Mapping[str, Any]] = torch_state["state"]
    return found


def _is_flat(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _scalars(folder: Path, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in (one for state in states for one in _inner(state).values()):
        for name, value in each.items():
            if not _is_flat(value) and found.setdefault(name, value) != value:
                raise CheckpointError(
                    f"{folder}: {name} is {found[name]} for some parameters and {value} for others; expected one value: "
                    "resume with as many ranks as wrote it"
                )
    return found


def _only(folder: Path, pattern: str, rank: int) -> Path:
    found = sorted(folder.glob(pattern))
    exact = [path for path in found if "model_states" not in path.name or _rank(path) == rank]
    if len(exact) != 1:
        raise CheckpointError(
            f"{folder} has {len(exact)} files {pattern} of rank {rank} and should have one; it is damaged, resume an older "
            "checkpoint"
        )
    return exact[0]


def _rank(path: Path) -> int:
    """The rank in the name of a file of DeepSpeed; 0 where all ranks share it.

    >>> _rank(Path("zero_pp_rank_3_mp_rank_00_model_states.pt")), _rank(Path("mp_rank_00_model_states.pt"))
    (3, 0)
    """
    _, found, after = path.name.partition("zero_pp_rank_")
    return int(after.partition("_")[0]) if found else 0
