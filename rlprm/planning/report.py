"""A plan in words and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlprm.planning.plan import Plan
from rlprm.planning.processes import Layout, Room
from rlprm.planning.search import written

ORDER = ("weights", "frozen models", "gathered", "optimizer", "gradients", "activations", "logits and their gradients",
         "buckets", "keys and values", "CUDA graphs", "transfer bucket", "allocator", "framework")  # fmt: skip


def report(
    plan: Plan,
    nearest: Mapping[str, Any] | None,
    other_gpus: Sequence[str],
    *,
    why: str | None = None,
    status: str | None = None,
) -> str:
    """What `rlprm plan` prints. ``why``: what stands in the way of other numbers of processes; ``status``: the recipe's,
    where it says more than that it was measured or not yet run."""
    lines = [f"{plan.name} on {_hardware(plan)}, as {plan.hardware.told_by} says"]
    lines += ["", *([f"status of the recipe: {status}", ""] if status is not None else [])]
    lines += [f"  {key:<30} {shape.name}: {_count(shape.parameters)} parameters" for key, shape in plan.shapes.items()]
    if plan.layout is not None:
        lines += ["", *_seats(plan.layout), "", *_memory(plan.layout)]
    lines += ["", *_batch(plan)]
    if plan.times is not None:
        lines += ["", *_times(plan)]
    if plan.warnings:
        lines += ["", "Warnings", *(f"  {warning}" for warning in plan.warnings)]
    lines.append("")
    if plan.fits:
        lines.append("It fits.")
    else:
        lines += ["It does not fit:", *(f"  {problem.where}: {problem.what}" for problem in plan.problems)]
        if nearest is not None:
            lines += ["Nearest change that fits (planned again with it):", f"  {written(nearest)}"]
        else:
            lines.append("None of the changes that were tried fits; use larger GPUs, more nodes or a smaller model.")
            lines += [f"  {why}"] if why is not None else []
        if other_gpus:
            lines.append(f"Unchanged, it would fit on nodes with {' or '.join(other_gpus)}.")
    return "\n".join(lines)


def _hardware(plan: Plan) -> str:
    each = plan.hardware
    gpus = f"{each.node_gpus} {each.gpu.name}, " if each.gpu is not None and each.node_gpus else ""
    nodes = f"{each.nodes} node{'s' if each.nodes > 1 else ''}"
    return f"{nodes} of {gpus}{each.node_cpus} CPUs and {each.node_memory / 1e9:.0f} GB"


def _seats(where: Layout) -> list[str]:
    rows = []
    for role, nodes in where.roles.items():
        here = [each for each in where.processes if each.role == role]
        alike: dict[str, list[int]] = {}
        for node in sorted(set(nodes)):
            alike.setdefault(_gpus([each.gpus for each in here if each.node == node]), []).append(node)
        places = [f"{_nodes(numbers)}: {gpus}" for gpus, numbers in alike.items()]
        rows.append([role, str(len(here)), "; ".join(places)])
    return ["Where processes sit", *_table(["role", "number", "where"], rows)]


def _nodes(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"node {numbers[0]}"
    whole = numbers[-1] - numbers[0] == len(numbers) - 1
    return f"each of nodes {numbers[0]} to {numbers[-1]}" if whole else f"each of nodes {', '.join(map(str, numbers))}"


def _gpus(places: Sequence[tuple[int, ...]]) -> str:
    if not places or not places[0]:
        return f"{len(places)} on CPU"
    return "GPU " + ", ".join("+".join(map(str, gpus)) for gpus in places)


def _memory(where: Layout) -> list[str]:
    kinds: dict[str, Any] = {}
    for each in where.processes:
        kinds.setdefault(each.role, each)
    present = {part for each in kinds.values() for part in each.peak.parts}
    parts = [part for part in ORDER if part in present] + sorted(present - set(ORDER))
    device = "each GPU" if where.gpus else "each process"
    rows = [[part, *(_gib(each.peak.parts.get(part, 0)) for each in kinds.values())] for part in parts]
    rows.append(["highest", *(_gib(each.peak.total) for each in kinds.values())])
    rows.append(["in phase", *(each.peak.phase for each in kinds.values())])
    lines = [f"Memory of {device}, GiB", *_table(["part", *kinds], rows), ""]
    rooms = [*_worst(where.gpus), *_worst(where.hosts), *([where.store] if where.store is not None else [])]
    table = [[room.name, _gib(room.total), _gib(room.capacity), f"{100 - 100 * room.total / room.capacity:.0f} %",
              ", ".join(f"{part} {_gib(size)}" for part, size in room.parts.items() if size)]
             for room in rooms]  # fmt: skip
    lines += ["Fullest of each kind, GiB", *_table(["where", "needed", "there", "free", "of which"], table)]
    for name, each in where.engines.items():
        lines.append(
            f"  {name}: KV cache {_gib(each.cache)} GiB, room for {each.sequences} sequences of the longest length; "
            f"{each.together} decoded together"
        )
    return lines


def _worst(rooms: Sequence[Room]) -> list[Room]:
    return [max(rooms, key=lambda room: room.total / room.capacity)] if rooms else []


def _batch(plan: Plan) -> list[str]:
    batch = plan.batch
    lines = [
        "Batch",
        f"  {batch.prompts} prompts x {batch.responses} responses = {batch.prompts * batch.responses} sequences of at most "
        f"{batch.longest} tokens",
        f"  {batch.shards} shard{'s' if batch.shards > 1 else ''} of {_range(batch.groups)} prompts each; "
        f"{batch.rollouts} rollouts in the whole run",
    ]
    rows = [
        [each.key, str(each.ranks), f"{each.epochs} x {each.mini_batches}", _range(each.prompts), str(each.sequences),
         f"{each.micro_batches} of {each.micro.rows} x {each.micro.longest}", str(each.steps_per_batch), str(each.steps)]
        for each in batch.learners
    ]  # fmt: skip
    head = ["learner", "ranks", "epochs x mini", "prompts", "sequences/rank", "micro-batches", "steps", "steps of run"]
    return [*lines, *_table(head, rows)]


def _times(plan: Plan) -> list[str]:
    assert plan.times is not None
    found = plan.times
    rows = [
        [phase.name, f"{phase.seconds:.1f} s", f"beside {phase.beside}" if phase.beside else ""]
        for phase in found.phases
    ]
    return [
        f"Time of a step (estimated from data sheets, responses of {found.response} tokens on the mean; not measured)",
        *_table(["phase", "time", ""], rows),
        f"  a step {found.step:.0f} s, {_hours(found.run)} for the run, without evaluations, checkpoints and verifiers",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)]  # fmt: skip


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}" if size < 2**30 else f"{size / 2**30:.1f}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"


def _range(both: tuple[int, int]) -> str:
    return str(both[0]) if both[0] == both[1] else f"{both[0]} to {both[1]}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
