"""Which process sits on which node, remembered by the driver so that an error can name the node that is lost.

Only runs whose processes were given seats (:mod:`rlprm.actors.seating`) fill it; elsewhere every answer is empty.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from rlprm.actors.nodes import Node

# Long enough for Ray to notice a raylet that was killed (13 s by itself, 4 s with fast health checks).
NOTICE_S = 20.0
# What a rank says when the other end of a connection is gone, whatever library says it.
BROKEN = ("connection", "timed out", "timeout", "peer", "socket", "gloo", "nccl", "unreachable", "lost", "died")

_sitting: dict[str, tuple[str, Node]] = {}  # by Ray's id of the actor


def sits(actor: Any, what: str, node: Node) -> None:
    """``actor`` is ``what``, for example "policy rank 1", on ``node``; whoever was that before is forgotten."""
    for before in [each for each, (name, _) in _sitting.items() if name == what]:
        del _sitting[before]
    _sitting[actor._actor_id.hex()] = (what, node)


def forget() -> None:
    """The cluster is left: nobody sits anywhere."""
    _sitting.clear()


def described(error: RayActorError) -> str:
    """The process that an error is about with its node, or nothing."""
    found = _sitting.get(str(error.actor_id))
    return "" if found is None else f"{found[0]} on node {named(found[1])}"


def named(node: Node) -> str:
    """A node's name, and its address where that is another word."""
    return node.name if node.name == node.address else f"{node.name} ({node.address})"


def looks_broken(cause: BaseException | None) -> bool:
    """Does the error speak of a connection?"""
    return any(word in f"{type(cause).__name__} {cause}".lower() for word in BROKEN)


def who_is_lost(references: Any, *, wait_s: float) -> str:
    """After a connection broke: which process or node is gone, as the end of a sentence; nothing where nobody knows.

    It takes Ray a while to notice, so it is asked for up to ``wait_s`` seconds.
    """
    if not _sitting:
        return ""
    asked = list(references) if isinstance(references, Sequence) else [references]
    deadline = time.monotonic() + wait_s
    while True:
        found = _lost_nodes() or _dead_actors(asked)
        if found or time.monotonic() >= deadline:
            return f"; {found}" if found else ""
        time.sleep(0.5)


def _lost_nodes() -> str:
    try:
        alive = {each["NodeID"] for each in ray.nodes() if each["Alive"]}
    except (RayError, RuntimeError, ConnectionError):
        return ""  # Ray itself is gone; what has happened is said already
    gone: dict[str, tuple[Node, list[str]]] = {}
    for what, node in _sitting.values():
        if node.id not in alive:
            gone.setdefault(node.id, (node, []))[1].append(what)
    return "; ".join(
        f"node {named(node)} is gone, and with it {', '.join(dict.fromkeys(lost))}" for node, lost in gone.values()
    )


def _dead_actors(references: Sequence[Any]) -> str:
    found = []
    for reference in references:
        try:
            ray.get(reference, timeout=0.0)
        except RayActorError as error:
            found.append(described(error))
        except RayError:
            continue
    dead = [what for what in dict.fromkeys(found) if what]
    return f"{', '.join(dead)} cannot be reached" if dead else ""
