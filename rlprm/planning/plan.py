"""A run's plan: where its processes sit, what they hold, how a batch is divided, how long a step takes, what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlprm.errors import ConfigError
from rlprm.planning.arithmetic import Batch, arithmetic
from rlprm.planning.hardware import Hardware
from rlprm.planning.processes import Layout, Room, layout
from rlprm.planning.shapes import Shape, shape_of
from rlprm.planning.times import Times, times
from rlprm.run import factories

TIGHT = 0.93  # of a room: above it a prediction within a few per cent is no promise


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that cannot be."""

    where: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is known before anything starts. ``layout`` and ``times`` are None where the processes find no room."""

    name: str
    hardware: Hardware
    shapes: Mapping[str, Shape]
    batch: Batch
    layout: Layout | None
    times: Times | None
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems


def shapes_for(config: Any, chosen: Mapping[str, str]) -> dict[str, Shape]:
    """The shape of every model of the run by the key that names it. ``chosen``: key -> name ("": of all models).

    Raises:
        ConfigError: a shape that nothing says, or a key that names no model of this run.
    """
    models = {"model": config.model.path}
    if config.critic is not None:
        models["critic.model"] = config.critic.model
    for name, section in factories.sources(config).items():
        if section.model is not None:
            models[f"streams.{name}.source.model"] = section.model
    given = {"model" if key == "model.path" else key: name for key, name in chosen.items()}
    if unknown := sorted(set(given) - set(models) - {""}):
        raise ConfigError(f"--shape {unknown[0]}=...: this run has no such model; it has {', '.join(models)}")
    own = given.get("model", given.get(""))
    found = {}
    for key, path in models.items():
        same = own if path == config.model.path else None
        found[key] = shape_of(path, given.get(key, same or given.get("")))
    return found


def made_plan(config: Any, shapes: Mapping[str, Shape], hardware: Hardware, response: int | None) -> Plan:
    """The plan of a validated configuration; ``response``: mean length that is assumed for times (None: half of the
    longest).

    Raises:
        ConfigError: the placement wants GPUs and the hardware has none.
    """
    if config.placement.device == "cuda" and (hardware.gpu is None or not hardware.node_gpus):
        raise ConfigError(
            f"placement.device is cuda and {hardware.told_by} has no GPUs; say what a node has, for example "
            "cluster.node.gpu=H100-80GB cluster.node.gpus=8"
        )
    batch = arithmetic(config)
    try:
        where = layout(config, shapes, hardware, batch)
    except ConfigError as error:
        problem = Problem(where="placement", what=str(error))
        return Plan(
            name=config.name, hardware=hardware, shapes=shapes, batch=batch, layout=None, times=None,
            problems=(problem,), warnings=batch.warnings,
        )  # fmt: skip
    mean = config.max_response_tokens // 2 if response is None else min(response, config.max_response_tokens)
    return Plan(
        name=config.name,
        hardware=hardware,
        shapes=shapes,
        batch=batch,
        layout=where,
        times=times(config, shapes, hardware, batch, where, max(1, mean)),
        problems=tuple(problems(where)),
        warnings=(*batch.warnings, *_warnings(config, where, batch)),
    )


def problems(where: Layout) -> list[Problem]:
    """Rooms that are too small, and engines that could not start."""
    found = []
    for name, each in where.engines.items():
        if each.problem is not None:
            found.append(Problem(where=name, what=each.problem))
    alike: dict[str, list[str]] = {}
    for room in _rooms(where):
        if not room.fits:
            who = ", ".join(_counted(room)) or "a step's batch and the weights"
            what = f"{who} would take {_gib(room.total)} and there are {_gib(room.capacity)}"
            alike.setdefault(what, []).append(room.name)
    for what, names in alike.items():
        more = f" and {len(names) - 1} more like it" if len(names) > 1 else ""
        found.append(Problem(where=names[0] + more, what=what))
    return found


def overfull(where: Layout) -> set[str]:
    """Roles that sit where room is missing, or cannot start."""
    found = {name for name, each in where.engines.items() if each.problem is not None}
    rooms = [room for room in _rooms(where) if not room.fits]
    found |= {name.rpartition(" ")[0] for room in rooms for name in room.processes}
    return found | ({"store"} if where.store in rooms else set())


def _counted(room: Room) -> list[str]:
    """Its processes by role.

    >>> _counted(Room(name="", capacity=0, parts={}, processes=("policy 0", "policy 1", "prm 0")))
    ['2 x policy', 'prm']
    """
    roles = [name.rpartition(" ")[0] for name in room.processes]
    return [f"{roles.count(role)} x {role}" if roles.count(role) > 1 else role for role in dict.fromkeys(roles)]


def _rooms(where: Layout) -> list[Room]:
    return [*where.gpus, *where.hosts, *([where.store] if where.store is not None else [])]


def _warnings(config: Any, where: Layout, batch: Batch) -> list[str]:
    found = [
        f"{room.name} is {100 * room.total / room.capacity:.0f} % full; predictions are off by a few per cent"
        for room in _rooms(where)
        if room.fits and room.total > TIGHT * room.capacity
    ]
    engine = where.engines["rollout engine"]
    each = -(-batch.prompts * batch.responses // config.placement.engines)
    if engine.together < min(each, int(config.rollout.engine["max_num_seqs"])) and engine.problem is None:
        found.append(
            f"an engine's KV cache holds {engine.sequences} sequences of the longest length and has {each} to decode; longer "
            "responses will wait for room"
        )
    packed = [share.key for share in batch.learners if share.micro.layout == "packed"]
    if packed and config.model.attention == "sdpa" and config.placement.device == "cuda":
        found.append(
            f"{packed[0]}.layout=packed with model.attention=sdpa: each layer keeps a mask of the token budget squared; "
            "flash_attention_2 keeps none"
        )
    return found


def as_json(
    plan: Plan,
    nearest: Mapping[str, Any] | None,
    other_gpus: list[str],
    *,
    why: str | None = None,
    status: str | None = None,
) -> dict[str, Any]:
    """The plan in plain types; ``why`` and ``status`` as :func:`rlprm.planning.report.report` says them."""
    return {
        "name": plan.name,
        "status": status,
        "fits": plan.fits,
        "hardware": asdict(plan.hardware),
        "shapes": {key: {**asdict(shape), "parameters": shape.parameters} for key, shape in plan.shapes.items()},
        "batch": asdict(plan.batch),
        "layout": None if plan.layout is None else asdict(plan.layout),
        "times": None if plan.times is None else asdict(plan.times),
        "problems": [asdict(problem) for problem in plan.problems],
        "warnings": list(plan.warnings),
        "nearest": None if nearest is None else dict(nearest),
        "why_not": why,
        "other_gpus": other_gpus,
    }


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
