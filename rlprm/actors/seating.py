"""The nodes of a run and the seats of its processes on them, while nodes come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from ray._private import state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlprm.actors import nodes as cluster_nodes
from rlprm.actors import places
from rlprm.actors.nodes import Node
from rlprm.errors import ConfigError
from rlprm.placement import Seats, seats

LISTS = ("policy_nodes", "prm_nodes", "engine_nodes")


def numbered(alive: Sequence[Node], known: Mapping[int, Node]) -> dict[int, Node]:
    """Numbers for the nodes that are alive: a node keeps its own, one that came back under its name has its old one.

    Nodes of one name (several on one machine) take the free numbers of that name in turn; new ones come last.

    >>> a, b, again = (Node(index=0, id=key, name=key[0], address="", cpus=1.0, gpus=0.0) for key in ("a", "b", "b2"))
    >>> numbered([a], known := numbered([a, b], {})).keys() | numbered([again], known).keys()
    {0, 1}
    """
    by_id = {node.id: number for number, node in known.items()}
    ids = {node.id for node in alive}
    found = {by_id[node.id]: node for node in alive if node.id in by_id}
    for node in alive:
        if node.id in by_id:
            continue
        returned = (n for n, old in known.items() if old.name == node.name and old.id not in ids and n not in found)
        found[next(returned, max([-1, *known, *found]) + 1)] = node
    return {number: replace(found[number], index=number) for number in sorted(found)}


class Seating:
    """Where a run's processes sit. Every process gets its node by name, so none of them waits where it cannot start."""

    def __init__(self, found: Sequence[Node]) -> None:
        self._known = numbered(found, {})
        self._taken = _gpus_in_use(found)
        self._engines: dict[int, int] = {}  # rollout engine -> its node
        self._own: tuple[int, ...] = ()
        self._learners: tuple[tuple[int, ...], tuple[int, ...]] = (), ()
        self._held: dict[int, int] = {}  # processes of each node when the run began

    def nodes(self) -> tuple[Node, ...]:
        """Those alive now, with what other users of the cluster have left of them when the run began."""
        alive = numbered(cluster_nodes.nodes(), self._known)
        self._known |= alive
        return tuple(replace(node, gpus=max(0.0, node.gpus - self._taken.get(node.id, 0.0))) for node in alive.values())

    def lost(self) -> tuple[str, ...]:
        """Names of nodes that the run has had and that are not alive now."""
        here = {node.index for node in self.nodes()}
        return tuple(node.name for number, node in self._known.items() if number not in here)

    def node(self, number: int) -> Node:
        """The node that has the number, or had it last."""
        return self._known[number]

    def preview(self, placement: Any, own_engines: int, *, prm: bool = True) -> Seats:
        """Seats for a run that would begin now; nothing is remembered. ``prm``: will there be PRM ranks?

        Raises:
            ConfigError: it does not fit.
        """
        here = self.nodes()
        return seats(self._possible(placement, here), here, own_engines, prm=prm)

    def engines(self, placement: Any, own_engines: int, *, prm: bool = True) -> Seats:
        """Seats for a run that begins; rollout engines and engines of process sources are taken as seated.

        Raises:
            ConfigError: it does not fit.
        """
        found = self.preview(placement, own_engines, prm=prm)
        self._engines, self._own = dict(enumerate(found.engines)), found.own_engines
        self._held = {number: found.on(number) for number in self._known}
        return found

    def learners(self, placement: Any, *, prm: bool = True) -> Seats:
        """Seats of the ranks beside the engines that are seated already, on the nodes alive now.

        Raises:
            ConfigError: they do not fit.
        """
        here = self.nodes()
        found = seats(self._beside_engines(self._possible(placement, here), here), here, 0, prm=prm)
        self._learners = found.policy, found.prm
        return found

    def again(self, number: int, placement: Any) -> int | None:
        """A node for rollout engine ``number``, which was lost: its own if that is alive, else the emptiest with room.

        Without GPUs nothing tells how much a node holds: it is given no more processes than it had when the run began,
        and a new node no more than the fullest had.
        """
        here = self.nodes()
        alive = [node.index for node in here]
        if self._engines[number] in alive:
            return self._engines[number]
        policy, prm = ([place for place in places if place in alive] for places in self._learners)
        others = [place for engine, place in self._engines.items() if engine != number]
        busy = [place for place in [*policy, *prm, *others, *self._own] if place in alive]
        fullest = max(self._held.values())
        for candidate in sorted(here, key=lambda node: (node.cpus == 0, busy.count(node.index), node.index)):
            if not placement.gpus_per_engine and busy.count(candidate.index) >= self._held.get(
                candidate.index, fullest
            ):
                continue
            wanted = _fixed(
                placement,
                policy=policy,
                prm=prm,
                engines=[place for place in [*others, *self._own, candidate.index] if place in alive],
            )
            try:
                seats(wanted, here, 0)
            except ConfigError:
                continue
            self._engines[number] = candidate.index
            return candidate.index
        return None

    def head(self) -> int:
        """The node of processes that only compute a little, and for the driver: the first that offers CPUs."""
        here = self.nodes()
        return next((node.index for node in here if node.cpus > 0), here[0].index)

    def options(self, number: int) -> dict[str, Any]:
        """Ray options that put an actor on node ``number`` and nowhere else."""
        # the seat decides; Ray's own count of CPUs would make processes wait that can very well take turns
        return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(self.node(number).id, soft=False)}

    def sits(self, actor: Any, what: str, number: int) -> None:
        """Remember it for errors."""
        places.sits(actor, what, self.node(number))

    def _possible(self, placement: Any, here: Sequence[Node]) -> Any:
        """The placement without those entries of its lists that name a lost node; a list without any other is null."""
        alive = {node.index for node in here}
        lost = self._known.keys() - alive
        lists = {
            key: [number for number in getattr(placement, key) or () if number not in lost] or None for key in LISTS
        }
        return _view(placement, **lists)

    def _beside_engines(self, placement: Any, here: Sequence[Node]) -> Any:
        alive = {node.index for node in here}
        standing = [place for place in [*self._engines.values(), *self._own] if place in alive]
        return _view(placement, engines=len(standing), engine_nodes=standing or None)


def _fixed(placement: Any, *, policy: Sequence[int], prm: Sequence[int], engines: Sequence[int]) -> Any:
    """Nothing left to choose: each process where it is."""
    return _view(
        placement,
        policy_ranks=len(policy),
        policy_nodes=policy or None,
        prm_ranks=len(prm),
        prm_nodes=prm or None,
        engines=len(engines),
        engine_nodes=engines or None,
    )


def _view(placement: Any, **changed: Any) -> Any:
    keys = ("policy_ranks", "gpus_per_rank", "prm_ranks", "engines", "tensor_parallel", "gpus_per_engine", *LISTS)
    return SimpleNamespace(**{**{key: getattr(placement, key) for key in keys}, **changed})


def _gpus_in_use(found: Sequence[Node]) -> dict[str, float]:
    """GPUs that somebody else has on each node."""
    free = state.available_resources_per_node()
    return {node.id: node.gpus - free[node.id].get("GPU", 0.0) for node in found if node.id in free and node.gpus}
