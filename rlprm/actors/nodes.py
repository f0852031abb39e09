"""The nodes of a Ray cluster: which there are, a wait that names who is missing, and a question to each of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlprm.errors import ConfigError

HEAD = "node:__internal_head__"
POLL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node that is alive."""

    index: int  # 0: the head; the others by name
    id: str
    name: str  # what it was started as; its address where it has no name
    address: str
    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Why a node gave no answer."""

    reason: str


def nodes() -> tuple[Node, ...]:
    """Nodes that are alive, in an order that does not depend on when they came: the head, then by name."""
    alive = [each for each in ray.nodes() if each["Alive"]]
    ordered = sorted(alive, key=lambda each: (HEAD not in each["Resources"], _name(each), each["NodeID"]))
    return tuple(
        Node(
            index=index,
            id=each["NodeID"],
            name=_name(each),
            address=each["NodeManagerAddress"],
            cpus=each["Resources"].get("CPU", 0.0),
            gpus=each["Resources"].get("GPU", 0.0),
        )
        for index, each in enumerate(ordered)
    )


def _name(node: dict[str, Any]) -> str:
    return str(node.get("NodeName") or node["NodeManagerAddress"])


def wait_for_nodes(
    count: int, *, timeout_s: float, say: Callable[[str], None], expected: Sequence[str] = ()
) -> tuple[Node, ...]:
    """The cluster's nodes once there are ``count``; while it waits it says who is missing.

    ``expected``: names that the nodes were started with, where somebody knows them.

    Raises:
        ConfigError: too few after ``timeout_s`` seconds: who is there, who is missing, and since when.
    """
    begin, told = time.monotonic(), None
    while True:
        found = nodes()
        if len(found) >= count:
            return found
        names = [node.name for node in found]
        missing = [name for name in expected if name not in names]
        who = f": {', '.join(missing)}" if missing else ""
        waited = time.monotonic() - begin
        sentence = f"{len(found)} of {count} nodes are there ({', '.join(names)}); missing {count - len(found)}{who}"
        if waited >= timeout_s:
            since = time.strftime("%H:%M:%S", time.localtime(time.time() - waited))
            raise ConfigError(
                f"{sentence}, since {since} ({waited:.0f} s). Look at the log of each missing node, give it more time "
                "(cluster.wait_s, or placement.start_timeout_s), or ask for fewer nodes (placement.nodes)"
            )
        if sentence != told:
            say(f"waiting: {sentence}")
            told = sentence
        time.sleep(min(POLL_S, timeout_s))


def on_each(
    asked: Sequence[Node], function: Callable[..., Any], *arguments: Any, timeout_s: float, options: dict[str, Any]
) -> list[Any]:
    """``function(*arguments)`` once on every node, at the same time, on no CPU; an answer or :class:`Failed` for each.

    ``function`` must be importable on the nodes, or defined so that it travels. ``options``: further options of the
    Ray task, for example its runtime_env.
    """
    references = [
        ray.remote(function)
        .options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            **options,
        )
        .remote(*arguments)
        for node in asked
    ]
    ray.wait(references, num_returns=len(references), timeout=timeout_s)
    return [answered(reference, timeout_s) for reference in references]


def answered(reference: Any, timeout_s: float) -> Any:
    """What a reference holds, or why it holds nothing; it was waited for already."""
    try:
        return ray.get(reference, timeout=0.1)
    except GetTimeoutError:
        return Failed(reason=f"no answer within {timeout_s:.0f} s")
    except RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Failed(reason=lines[-1] if lines else type(error).__name__)
