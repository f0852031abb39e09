"""The nearest change that fits: overrides, tried from the smallest effort on until the plan holds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlprm.config import TrainConfig
from rlprm.errors import ConfigError
from rlprm.planning.arithmetic import arithmetic, learners
from rlprm.planning.hardware import Hardware, gpus_like
from rlprm.planning.plan import overfull, problems
from rlprm.planning.processes import layout, store_use
from rlprm.planning.shapes import Shape

TRIES = 1500  # combinations at most
LIMIT_S = 15.0  # and no longer than this
SEATS = 12  # other numbers of processes that are looked at, where the run's own find no room
LISTS = ("policy_nodes", "prm_nodes", "engine_nodes")
SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
STORE_HEADROOM = 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One change. Moves of the same kind exclude each other; effort: what it costs in speed and in trouble."""

    kind: str
    effort: float
    changes: Mapping[str, Any]
    helps: frozenset[str] = frozenset()  # the roles that take less by it; none: all


def nearest(
    config: TrainConfig,
    shapes: Mapping[str, Shape],
    hardware: Hardware,
    composed: Callable[[Sequence[str]], TrainConfig],
) -> dict[str, Any] | None:
    """Overrides under which the run fits, checked by planning it again; None where none of those tried does.

    Where the processes find no room at all, other numbers of them come first, and what their memory asks on top.
    ``composed``: the run's configuration with further overrides, as if they were pasted behind its command.
    """
    begin = time.monotonic()
    for changes in itertools.islice(_tries(config, shapes, hardware), TRIES):
        if time.monotonic() - begin > LIMIT_S:
            return None
        if fits(changed(config, changes), shapes, hardware) and pasted(changes, shapes, hardware, composed):
            return changes
    return None


def why_not(config: TrainConfig, shapes: Mapping[str, Shape], hardware: Hardware) -> str | None:
    """What stands in the way even of the nearest numbers of processes that find room; None: none do, or it is not memory."""
    for move in _seated(config, shapes, hardware)[:1]:
        other = changed(config, move.changes)
        where = layout(other, shapes, _as_many(other, hardware), arithmetic(other))
        if said := "; ".join(f"{each.where}: {each.what}" for each in problems(where)):
            return f"With {written(move.changes)} all processes find room, and then: {said}"
    return None


def _tries(config: TrainConfig, shapes: Mapping[str, Shape], hardware: Hardware) -> Iterator[dict[str, Any]]:
    """Changes to try, the smallest effort first."""
    try:
        roles = overfull(layout(config, shapes, hardware, arithmetic(config)))
    except ConfigError:  # no seats at all
        several = [
            (move.effort + effort, {**move.changes, **changes})
            for move in _seated(config, shapes, hardware)
            for effort, changes in _on_top(changed(config, move.changes), shapes, hardware)
        ]
        several.sort(key=lambda each: round(each[0], 6))
        yield from (changes for _, changes in several)
        return
    moves = [move for move in _moves(config, shapes) if not move.helps or move.helps & roles]
    yield from (changes for _, changes in _combined(moves, (1, 2, 3)))


def _on_top(config: TrainConfig, shapes: Mapping[str, Shape], hardware: Hardware) -> list[tuple[float, dict[str, Any]]]:
    """What more to change of a run that has seats: nothing where its memory suffices."""
    roles = overfull(layout(config, shapes, _as_many(config, hardware), arithmetic(config)))
    if not roles:
        return [(0.0, {})]
    moves = [move for move in _moves(config, shapes) if move.helps & roles and move.kind != "parallel"]
    return _combined(moves, (1, 2, 3))


def _combined(moves: Sequence[Move], counts: Sequence[int]) -> list[tuple[float, dict[str, Any]]]:
    """So many moves of different kinds at once, with their effort; the smallest first."""
    several = [
        chosen
        for count in counts
        for chosen in itertools.combinations(moves, count)
        if len({move.kind for move in chosen}) == count
    ]
    found = [(sum(move.effort for move in chosen) + 0.5 * len(chosen), chosen) for chosen in several]
    found.sort(key=lambda each: (round(each[0], 6), len(each[1])))
    return [
        (effort, {key: value for move in chosen for key, value in move.changes.items()}) for effort, chosen in found
    ]


def _seated(config: TrainConfig, shapes: Mapping[str, Shape], hardware: Hardware) -> list[Move]:
    """Other numbers of processes that find room: on these nodes, those that give up least; or unchanged on more."""
    placement = config.placement
    lists: dict[str, Any] = {f"placement.{key}": None for key in LISTS if getattr(placement, key) is not None}

    def move(changes: Mapping[str, Any], effort: float) -> Iterator[Move]:
        both = {**lists, **changes}
        if both and _has_seats(changed(config, both), shapes, hardware):
            yield Move(kind="split", effort=effort, changes=both)

    found = [*move({}, 1.0)]
    now, wide = (placement.policy_ranks, placement.prm_ranks, placement.engines), placement.tensor_parallel
    for *numbers, parallel in itertools.product(*map(_fewer, now), _halved(wide)):
        given_up = sum(a - b for a, b in zip(now, numbers, strict=True)) / sum(now)
        changes = _numbers((numbers[0], numbers[1], numbers[2])) if tuple(numbers) != now else {}
        narrower = {"placement.tensor_parallel": parallel} if parallel != wide else {}
        if changes or narrower:
            found += move({**changes, **narrower}, 2.0 + 4.0 * given_up + 2.0 * (1 - parallel / wide))
    if not found:
        shares = [share for share in (0.5, 0.25, 0.125) if share < placement.gpus_per_rank]
        found += [each for share in shares for each in move({"placement.gpus_per_rank": share}, 3.0 + 1 / share)]
    found.sort(key=lambda each: each.effort)
    more = ([*move({"placement.nodes": nodes}, 4.0 + nodes / hardware.nodes)]
            for nodes in range(hardware.nodes + 1, 8 * hardware.nodes + 1))  # fmt: skip
    return [*found[:SEATS], *next(filter(None, more), [])]


def _fewer(count: int) -> list[int]:
    """
    >>> _fewer(6), _fewer(64)
    ([6, 5, 4, 3, 2, 1], [64, 32, 16, 8, 4, 2, 1])
    """
    return list(range(count, 0, -1)) if count <= 8 else _halved(count)


def _halved(count: int) -> list[int]:
    return [count >> halvings for halvings in range(count.bit_length())]


def _has_seats(config: TrainConfig, shapes: Mapping[str, Shape], hardware: Hardware) -> bool:
    try:
        layout(config, shapes, _as_many(config, hardware), arithmetic(config))
    except ConfigError:
        return False
    return True


def _as_many(config: TrainConfig, hardware: Hardware) -> Hardware:
    """The nodes that the placement asks for, where that is more."""
    return replace(hardware, nodes=max(hardware.nodes, config.placement.nodes))


def pasted(
    changes: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    hardware: Hardware,
    composed: Callable[[Sequence[str]], TrainConfig],
) -> bool:
    """Is the run with these overrides valid, and does it fit? Other values may follow those that are changed."""
    try:
        return fits(composed(written(changes).split()), shapes, hardware)
    except ConfigError:
        return False


def fits(config: TrainConfig, shapes: Mapping[str, Shape], hardware: Hardware) -> bool:
    """Does every process have room?"""
    try:
        return not problems(layout(config, shapes, _as_many(config, hardware), arithmetic(config)))
    except ConfigError:
        return False


def gpus_that_fit(config: TrainConfig, shapes: Mapping[str, Shape], hardware: Hardware) -> list[str]:
    """GPUs with which the unchanged run would fit on as many nodes."""
    return [each.gpu.name for each in gpus_like(hardware)
            if each.gpu is not None and fits(config, shapes, each)]  # fmt: skip


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """``config`` with other values at these dotted keys, not yet validated."""
    for key, value in changes.items():
        config = _set(config, key.split("."), value)
    return config


def written(changes: Mapping[str, Any]) -> str:
    """As overrides of the command line.

    >>> written({"model.gradient_checkpointing": True, "policy.zero_stage": 3, "placement.object_store_bytes": None})
    'model.gradient_checkpointing=true policy.zero_stage=3 placement.object_store_bytes=null'
    """
    words = {True: "true", False: "false", None: "null"}
    return " ".join(f"{key}={words[value] if value is None or value is True or value is False else value}"
                    for key, value in changes.items())  # fmt: skip


def _set(node: Any, path: Sequence[str], value: Any) -> Any:
    key, *rest = path
    inner = value if not rest else _set(node[key] if isinstance(node, Mapping) else getattr(node, key), rest, value)
    return {**node, key: inner} if isinstance(node, Mapping) else node.model_copy(update={key: inner})


def _moves(config: TrainConfig, shapes: Mapping[str, Shape]) -> Iterator[Move]:
    yield from _learning(config)
    yield from _engines(config, shapes)
    yield from _split(config)
    placement = config.placement
    if placement.object_store_bytes is not None:
        size = 4 if config.model.dtype == "float32" else 2
        needed = store_use(config, size * shapes["model"].parameters, STORE_HEADROOM)
        if needed > placement.object_store_bytes:
            changes = {"placement.object_store_bytes": needed}
            yield Move(kind="store", effort=0.5, changes=changes, helps=frozenset({"store"}))


def _learning(config: TrainConfig) -> Iterator[Move]:
    longest = config.data.max_prompt_tokens + config.max_response_tokens
    if not config.model.gradient_checkpointing:
        changes = {"model.gradient_checkpointing": True}
        yield Move(kind="checkpointing", effort=1.0, changes=changes, helps=frozenset({"policy", "prm"}))
    roles = {
        "policy": [(key, section) for key, section, _ in learners(config) if not key.startswith("streams.")],
        "prm": [(key, section) for key, section, _ in learners(config) if key.startswith("streams.")],
    }
    for role, sections in roles.items():
        helps = frozenset({role})
        for halvings in (1, 2, 3):
            smaller = {
                f"{key}.token_budget": max(longest, section.token_budget >> halvings)
                for key, section in sections
                if max(longest, section.token_budget >> halvings) < section.token_budget
            }
            if smaller:
                yield Move(kind=f"budget of {role}", effort=0.4 + 0.3 * halvings, changes=smaller, helps=helps)
        for stage in (1, 2, 3):
            higher = {f"{key}.zero_stage": stage for key, section in sections if section.zero_stage < stage}
            if higher:
                yield Move(kind=f"stage of {role}", effort=0.6 + 0.4 * stage, changes=higher, helps=helps)
        if config.placement.device == "cuda":
            away = {f"{key}.offload": "cpu" for key, section in sections if section.offload == "none"}
            if away and all(section.zero_stage > 0 for _, section in sections):
                yield Move(kind=f"offload of {role}", effort=3.0, changes=away, helps=helps)
        padded = {f"{key}.layout": "padded" for key, section in sections if section.layout == "packed"}
        if padded and config.model.attention != "flash_attention_2":
            yield Move(kind=f"layout of {role}", effort=1.0, changes=padded, helps=helps)


def _engines(config: TrainConfig, shapes: Mapping[str, Shape]) -> Iterator[Move]:
    rollout, placement, helps = config.rollout.engine, config.placement, frozenset({"rollout engine"})
    share, cache = rollout.get("gpu_memory_utilization"), rollout.get("kv_cache_bytes")
    if share is not None:
        for other in SHARES:
            if other != share:
                effort = 0.6 + 2 * abs(share - other)
                changes = {"rollout.engine.gpu_memory_utilization": other}
                yield Move(kind="share", effort=effort, changes=changes, helps=helps)
    longest = config.data.max_prompt_tokens + config.max_response_tokens
    item = 4 if config.model.dtype == "float32" else 2
    if cache is not None:
        needed = shapes["model"].kv_bytes(item) * longest
        if needed > cache:
            yield Move(kind="cache", effort=0.5, changes={"rollout.engine.kv_cache_bytes": needed}, helps=helps)
    for halvings in (1, 2, 3):
        fewer = int(rollout["max_num_seqs"]) >> halvings
        if fewer:
            changes = {"rollout.engine.max_num_seqs": fewer}
            yield Move(kind="together", effort=0.8 + 0.4 * halvings, changes=changes, helps=helps)
    positions = shapes["model"].positions
    if positions is not None and longest > positions > config.data.max_prompt_tokens:
        shorter = {"max_response_tokens": positions - config.data.max_prompt_tokens}
        yield Move(kind="length", effort=0.5, changes=shorter, helps=helps)
    if placement.device != "cuda" or placement.gpus_per_engine != 1:
        return
    for wider in (2, 4, 8):
        if wider > placement.tensor_parallel and shapes["model"].heads % wider == 0:
            fewer = max(1, placement.engines * placement.tensor_parallel // wider)
            other = {"placement.tensor_parallel": wider, "placement.engines": fewer}
            yield Move(kind="parallel", effort=1.0 + 0.2 * wider, changes=other, helps=helps)


def _split(config: TrainConfig) -> Iterator[Move]:
    """Other numbers of ranks and engines: on the same GPUs, with fewer of them, or on more nodes."""
    placement = config.placement
    if placement.device != "cuda" or placement.gpus_per_rank != 1 or placement.gpus_per_engine != 1:
        return
    wide, now = placement.tensor_parallel, (placement.policy_ranks, placement.prm_ranks, placement.engines)
    total = now[0] + now[1] + wide * now[2]
    for policy, prm in itertools.product(range(1, min(total, 64)), repeat=2):
        left = total - policy - prm
        if left < wide or left % wide:
            continue
        other = (policy, prm, left // wide)
        if other != now and all(number & (number - 1) == 0 for number in other):
            distance = sum(abs(a - b) for a, b in zip(other, now, strict=True))
            yield Move(kind="split", effort=2.0 + 0.1 * distance, changes=_numbers(other))
    for policy, prm, engines in itertools.product((now[0], now[0] // 2), (now[1], now[1] // 2), (now[2], now[2] // 2)):
        other = (policy, prm, engines)
        if other != now and min(other) > 0:
            yield Move(
                kind="split", effort=3.5 + (total - policy - prm - wide * engines) / total, changes=_numbers(other)
            )
    for factor in (2, 4, 8):
        more = {
            "placement.nodes": placement.nodes * factor,
            **_numbers((now[0] * factor, now[1] * factor, now[2] * factor)),
        }
        yield Move(kind="split", effort=4.0 + factor / 2, changes=more)


def _numbers(numbers: tuple[int, int, int]) -> dict[str, Any]:
    return dict(zip(("placement.policy_ranks", "placement.prm_ranks", "placement.engines"), numbers, strict=True))
