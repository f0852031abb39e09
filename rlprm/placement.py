"""Who sits where: from the placement and the nodes there are to the node of every rank and engine. Nothing is started.

    placement.policy_nodes etc.   a list is dealt out in turn: [0, 1] puts ranks 0, 2, 4 on node 0 and ranks 1, 3 on node 1
    null, with GPUs               nodes are filled in order: policy, PRM, engines; each process on the first that has room
    null, on CPU                  dealt over the nodes that have CPUs, in turn, without a gap between the roles

What has a list is seated first, for it can go nowhere else.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

from rlprm.errors import ConfigError

UNIT = 10_000  # Ray counts GPUs in ten-thousandths
NEAREST = "Nearest change that finds room for its processes (rlprm plan says whether their memory fits)"
MOST_NODES = 1024  # as far as the search for a cluster that is large enough goes
KEYS = (
    *("policy_ranks", "policy_nodes", "gpus_per_rank", "prm_ranks", "prm_nodes"),
    *("engines", "engine_nodes", "tensor_parallel", "gpus_per_engine"),
)


@runtime_checkable
class NodeLike(Protocol):
    """What is read of a node; :class:`rlprm.actors.nodes.Node` is one."""

    @property
    def index(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def cpus(self) -> float: ...

    @property
    def gpus(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Seats:
    """Numbers of nodes: of each policy rank, PRM rank, rollout engine, and engine of a process source."""

    policy: tuple[int, ...]
    prm: tuple[int, ...]
    engines: tuple[int, ...]
    own_engines: tuple[int, ...]

    def on(self, index: int) -> int:
        """Processes on node ``index``."""
        return sum(each.count(index) for each in (self.policy, self.prm, self.engines, self.own_engines))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Role:
    field: str  # of Seats
    word: str
    key: str  # of the placement, its count
    list_key: str
    count: int
    units: int  # of GPU, one process
    nodes: Sequence[int] | None


class _Room:
    """What is free on one node, GPU by GPU: a share of a GPU must come from one, more than one are taken whole."""

    def __init__(self, node: NodeLike) -> None:
        self.node = node
        whole, rest = divmod(round(node.gpus * UNIT), UNIT)
        self.free = [UNIT] * whole + ([rest] if rest else [])

    def take(self, units: int) -> bool:
        """Take them if they are free."""
        if units < UNIT:
            fitting = [number for number, free in enumerate(self.free) if free >= units]
            if not fitting:
                return False
            self.free[min(fitting, key=lambda number: self.free[number])] -= units  # as Ray does: the tightest fit
            return True
        whole = [number for number, free in enumerate(self.free) if free == UNIT]
        if len(whole) * UNIT < units:
            return False
        for number in whole[: units // UNIT]:
            self.free[number] = 0
        return True

    def __str__(self) -> str:
        have, free = _gpus(round(self.node.gpus * UNIT)), _amount(sum(self.free))
        return f"node {self.node.index} ({self.node.name}) has {have}, {free} free"


def check_placement(placement: Any) -> None:
    """What can be said of a placement before any node is there.

    Raises:
        ConfigError: a list names a node that the run does not have, or one that nobody would sit on; or shares of GPUs
            that cannot be handed out.
    """
    count = placement.nodes
    for role in _roles(placement, 0):
        if role.nodes is None or role.count == 0:
            continue
        beyond = [number for number in role.nodes if number >= count]
        if beyond:
            raise ConfigError(
                f"placement.{role.list_key} names node {beyond[0]} and placement.nodes is {count}, so the last node is "
                f"{count - 1}; set placement.nodes={max(beyond) + 1}, or placement.{role.list_key}="
                f"{_written(sorted({min(number, count - 1) for number in role.nodes}))}"
            )
        if len(role.nodes) > role.count:
            raise ConfigError(
                f"placement.{role.list_key} names {len(role.nodes)} nodes and placement.{role.key} is {role.count}: the last "
                f"{len(role.nodes) - role.count} would stay empty; set placement.{role.list_key}="
                f"{_written(role.nodes[: role.count])}, or placement.{role.key}={len(role.nodes)}"
            )
    for key in ("gpus_per_rank", "gpus_per_engine"):
        share = getattr(placement, key)
        if share > 1 and share != int(share):
            raise ConfigError(
                f"placement.{key} is {share:g}; more than one GPU are taken whole: use {int(share)} or {int(share) + 1}"
            )
    if placement.tensor_parallel > 1 and 0 < placement.gpus_per_engine != 1:
        raise ConfigError(
            f"placement.tensor_parallel is {placement.tensor_parallel} and placement.gpus_per_engine "
            f"{placement.gpus_per_engine:g}; each part of an engine has a GPU of its own: set placement.gpus_per_engine=1.0, "
            "or placement.tensor_parallel=1"
        )


def seats(
    placement: Any, nodes: Sequence[NodeLike], own_engines: int, *, prm: bool = True, advice: bool = True
) -> Seats:
    """The node of each process; ``nodes`` are those there are, with what is free on them.

    ``prm`` False: nothing of the run sits on PRM ranks, so none is started and none takes a seat. ``advice`` False: an
    error says what is missing and not which other numbers would find room; these are not checked against memory.

    >>> node = lambda index, gpus: SimpleNamespace(index=index, name=f"n{index}", cpus=8, gpus=gpus)
    >>> one = SimpleNamespace(policy_ranks=3, policy_nodes=None, gpus_per_rank=1.0, prm_ranks=1, prm_nodes=None,
    ...                       engines=1, engine_nodes=None, tensor_parallel=2, gpus_per_engine=1.0)
    >>> seats(one, [node(0, 4), node(1, 4)], 0)
    Seats(policy=(0, 0, 0), prm=(0,), engines=(1,), own_engines=())

    Raises:
        ConfigError: they do not fit: which node has what, what is asked, and the nearest change that finds room.
    """
    if not nodes:
        raise ConfigError("there is no node to place anything on; start one, or see placement.ray_address")
    without = {} if prm else {"prm_ranks": 0}
    asked = SimpleNamespace(**{key: getattr(placement, key) for key in KEYS} | without)
    unfit = _unfit(asked, nodes)
    found, no_room = (None, unfit) if unfit else _seated(asked, nodes, own_engines)
    if found is not None:
        return found
    without_gpus = not any(node.gpus for node in nodes) and asked.gpus_per_rank + asked.gpus_per_engine > 0
    if without_gpus or not advice:
        raise ConfigError(no_room)
    raise ConfigError(f"{no_room}. {_nearest(asked, nodes, own_engines)}")


def _roles(placement: Any, own_engines: int) -> tuple[_Role, ...]:
    rank = round(placement.gpus_per_rank * UNIT)
    engine = round(placement.gpus_per_engine * placement.tensor_parallel * UNIT)
    own = "engine of a process source"
    return (
        _Role(field="policy", word="policy rank", key="policy_ranks", list_key="policy_nodes", units=rank,
              count=placement.policy_ranks, nodes=placement.policy_nodes),
        _Role(field="prm", word="PRM rank", key="prm_ranks", list_key="prm_nodes", units=rank,
              count=placement.prm_ranks, nodes=placement.prm_nodes),
        _Role(field="engines", word="rollout engine", key="engines", list_key="engine_nodes", units=engine,
              count=placement.engines, nodes=placement.engine_nodes),
        _Role(field="own_engines", word=own, key="", list_key="", units=engine, count=own_engines, nodes=None),
    )  # fmt: skip


def _unfit(placement: Any, nodes: Sequence[NodeLike]) -> str | None:
    """What no order of seating could mend."""
    there = {node.index for node in nodes}
    named = ", ".join(f"{node.index}: {node.name}" for node in nodes)
    for role in _roles(placement, 0):
        absent = sorted(set(role.nodes or ()) - there)
        if absent and role.count:
            return f"placement.{role.list_key} names node {absent[0]} and the nodes are {named}"
    largest = max(nodes, key=lambda node: (node.gpus, -node.index))
    if not largest.gpus and any(role.units for role in _roles(placement, 0) if role.count):
        return f"the placement needs GPUs and the nodes have none ({named}); use placement=cpu, or nodes with GPUs"
    engine = round(placement.gpus_per_engine * placement.tensor_parallel * UNIT)
    if placement.engines and engine > UNIT * largest.gpus:
        return (
            f"an engine takes {_gpus(engine)} of one node (placement.tensor_parallel {placement.tensor_parallel} x "
            f"placement.gpus_per_engine {placement.gpus_per_engine:g}) and the largest node, {largest.index} "
            f"({largest.name}), has {_amount(round(largest.gpus * UNIT))}"
        )
    return None


def _seated(placement: Any, nodes: Sequence[NodeLike], own_engines: int) -> tuple[Seats | None, str]:
    """The seats, or what stands in the way. In order first; where that leaves a hole, the largest first."""
    roles = _roles(placement, own_engines)
    listed = [role for role in roles if role.nodes is not None]
    others = [role for role in roles if role.nodes is None]
    in_order, problem = _dealt([*listed, *others], nodes)
    if in_order is not None:
        return in_order, ""
    largest_first, _ = _dealt([*listed, *sorted(others, key=lambda role: -role.units)], nodes)
    return largest_first, problem


def _dealt(roles: Sequence[_Role], nodes: Sequence[NodeLike]) -> tuple[Seats | None, str]:
    rooms = {node.index: _Room(node) for node in nodes}
    turn = _turns(nodes)
    found: dict[str, tuple[int, ...]] = {}
    for role in roles:
        places: list[int] = []
        for number in range(role.count):
            if role.nodes is not None:
                wanted = [role.nodes[number % len(role.nodes)]]
            else:
                wanted = list(rooms) if role.units else [next(turn)]
            seat = next((index for index in wanted if not role.units or rooms[index].take(role.units)), None)
            if seat is None:
                return None, _no_room(role, number, [rooms[index] for index in wanted], roles)
            places.append(seat)
        found[role.field] = tuple(places)
    return Seats(**found), ""


def _turns(nodes: Sequence[NodeLike]) -> Iterator[int]:
    """Numbers of nodes in turn, for processes without a GPU; a head that offers no CPUs wants no work."""
    willing = [node.index for node in nodes if node.cpus > 0] or [node.index for node in nodes]
    while True:
        yield from willing


def _no_room(role: _Role, number: int, rooms: Sequence[_Room], roles: Sequence[_Role]) -> str:
    sums = ", ".join(f"{each.count} x {_amount(each.units)} for {each.word}s" for each in roles if each.count)
    total = _gpus(sum(each.count * each.units for each in roles))
    why = f", which placement.{role.list_key} puts there," if role.nodes is not None else ""
    return (
        f"{role.word} {number} of {role.count} takes {_gpus(role.units)}{why} and finds no room: "
        f"{'; '.join(map(str, rooms))}. The placement asks for {total} in all ({sums})"
    )


def _nearest(placement: Any, nodes: Sequence[NodeLike], own_engines: int) -> str:
    """The change that gives up least, and the nodes that would need none; seats only, for memory is not known here."""
    values = {key: getattr(placement, key) for key in KEYS}

    def fits(where: Sequence[NodeLike] = nodes, **changed: Any) -> bool:
        one = SimpleNamespace(**{**values, **changed})
        return _unfit(one, where) is None and _seated(one, where, own_engines)[0] is not None

    lists = {key: None for key in ("policy_nodes", "prm_nodes", "engine_nodes") if values[key] is not None}
    for key in lists:
        if fits(**{key: None}):
            return f"{NEAREST}: placement.{key}=null"
    if lists and fits(**lists):
        return f"{NEAREST}: {' '.join(f'placement.{key}=null' for key in lists)}"
    options = []
    engine = placement.gpus_per_engine * placement.tensor_parallel
    for key, each in (("engines", engine), ("prm_ranks", placement.gpus_per_rank),
                      ("policy_ranks", placement.gpus_per_rank)):  # fmt: skip
        smaller = next((count for count in range(values[key] - 1, 0, -1) if fits(**lists, **{key: count})), None)
        if smaller is not None:
            options.append(((values[key] - smaller) * each, f"placement.{key}={smaller}"))
    narrow = next((one for one in range(placement.tensor_parallel - 1, 0, -1)
                   if placement.tensor_parallel % one == 0 and fits(**lists, tensor_parallel=one)), None)  # fmt: skip
    if narrow is not None:
        given_up = (placement.engines + own_engines) * (placement.tensor_parallel - narrow) * placement.gpus_per_engine
        options.append((given_up, f"placement.tensor_parallel={narrow}"))
    options = options or _all_smaller(placement, lambda changed: fits(**lists, **changed))
    words = [f"{NEAREST}: {min(options)[1]}"] if options else []
    if lists and words:
        words[0] += "".join(f" placement.{key}=null" for key in lists)
    more = _more_nodes(nodes, lambda where: fits(where, **lists))
    if more:
        words.append(f"{'or' if words else 'They find room on'} {more}")
    return ", ".join(words) if words else "No number of such nodes has room for them; use nodes with more GPUs"


def _all_smaller(placement: Any, fits: Callable[[dict[str, Any]], bool]) -> list[tuple[float, str]]:
    """Where no single count helps: all of them halved as often as it takes, or shares of a GPU for the ranks."""
    counts = {key: getattr(placement, key) for key in ("policy_ranks", "prm_ranks", "engines", "tensor_parallel")}
    for halvings in range(1, max(counts.values()).bit_length() + 1):
        halved = {key: max(min(value, 1), value >> halvings) for key, value in counts.items()}
        if fits(halved):
            changed = [f"placement.{key}={value}" for key, value in halved.items() if value != counts[key]]
            return [(float(halvings), " ".join(changed))]
    shares = (1 / 2, 1 / 4, 1 / 8)
    share = next((each for each in shares if each < placement.gpus_per_rank and fits({"gpus_per_rank": each})), None)
    return [] if share is None else [(share, f"placement.gpus_per_rank={share:g}")]


def _more_nodes(nodes: Sequence[NodeLike], fits: Callable[[Sequence[NodeLike]], bool]) -> str:
    """How many nodes as large as the largest would have to be added; nothing where no number helps."""
    largest = max(nodes, key=lambda node: node.gpus)
    after = max(node.index for node in nodes) + 1

    def enough(count: int) -> bool:
        new = (
            SimpleNamespace(index=after + number, name="new", cpus=largest.cpus, gpus=largest.gpus)
            for number in range(count)
        )
        return fits([*nodes, *new])

    count = 1 + bisect.bisect_left(range(1, MOST_NODES + 1), True, key=enough)
    gpus = _gpus(round(largest.gpus * UNIT))
    return f"{count} more node{'s' if count > 1 else ''} of {gpus}" if count <= MOST_NODES else ""


def _amount(units: int) -> str:
    return f"{units / UNIT:g}"


def _gpus(units: int) -> str:
    """
    >>> _gpus(UNIT), _gpus(5000)
    ('1 GPU', '0.5 GPUs')
    """
    return f"{_amount(units)} GPU{'' if units == UNIT else 's'}"


def _written(numbers: Sequence[int]) -> str:
    return f"[{','.join(map(str, numbers))}]"
