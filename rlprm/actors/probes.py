"""A temporary actor on each node, by which nodes try each other: addresses, clocks and an all-reduce."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlprm.actors.network import use_own_interface
from rlprm.actors.nodes import Failed, Node, answered
from rlprm.doctor.reduction import Meeting, measure

ROUNDS = 5  # of asking for the time; the quickest answer says most
CONNECT_S = 3.0


class Probe:
    """Lives on one node for as long as it is examined."""

    def __init__(self) -> None:
        use_own_interface()
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._listener: socket.socket | None = None
        self._word = secrets.token_hex(8)

    def now(self) -> float:
        return time.time()

    def listen(self) -> tuple[str, int, str]:
        """An address where whoever connects is told a word, so that nobody takes another service for this one."""
        host = ray.util.get_node_ip_address()
        listener = socket.create_server((host, 0))
        self._listener = listener
        threading.Thread(target=self._serve, args=(listener,), name="rlprm-probe", daemon=True).start()
        return host, int(listener.getsockname()[1]), self._word

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(self._word.encode("ascii"))
            except OSError:
                return  # closed

    def connect(self, others: Mapping[str, tuple[str, int, str]]) -> dict[str, str]:
        """Why each of the others cannot be reached; "" where it can."""
        with ThreadPoolExecutor(max_workers=max(1, min(32, len(others)))) as threads:
            return dict(zip(others, threads.map(reach, others.values()), strict=True))

    def reserve(self) -> tuple[str, int]:
        """Where this node's process will be rank 0; held until then."""
        from rlprm.engine.distributed import reserve

        host = ray.util.get_node_ip_address()
        return host, reserve(host)

    def reduce(self, meeting: dict[str, Any], rank: int) -> dict[str, Any]:
        return measure(Meeting(**meeting), rank)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()


def reach(other: tuple[str, int, str]) -> str:
    """Connect, and hear the word that belongs there."""
    host, port, word = other
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
            connection.settimeout(CONNECT_S)
            heard = connection.recv(len(word)).decode("ascii", "replace")
    except OSError as error:
        return f"{host}:{port}: {error.strerror or error}"
    return "" if heard == word else f"{host}:{port}: somebody else answers there"


class Probes:
    """One :class:`Probe` on each node, by its name; those that do not start are in ``silent``."""

    def __init__(self, nodes: Sequence[Node], *, gpus: float, timeout_s: float) -> None:
        self._actors: dict[str, Any] = {
            node.name: ray.remote(Probe)
            .options(
                num_cpus=0,
                num_gpus=gpus,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            )
            .remote()
            for node in nodes
        }
        self.silent: dict[str, str] = {}
        self.ask(lambda probe: probe.now.remote(), timeout_s)

    @property
    def names(self) -> tuple[str, ...]:
        """Nodes that have answered so far."""
        return tuple(name for name in self._actors if name not in self.silent)

    def actor(self, name: str) -> Any:
        """The probe of one node."""
        return self._actors[name]

    def ask(
        self, question: Callable[[Any], Any], timeout_s: float, names: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """The same question to all (or ``names``), at the same time; who gives no answer is left out from now on."""
        return self.each(
            {name: question(self._actors[name]) for name in (self.names if names is None else names)}, timeout_s
        )

    def each(self, references: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Answers to references by name."""
        ray.wait(list(references.values()), num_returns=len(references), timeout=timeout_s)
        answers = {name: answered(reference, timeout_s) for name, reference in references.items()}
        self.silent |= {name: each.reason for name, each in answers.items() if isinstance(each, Failed)}
        return {name: each for name, each in answers.items() if not isinstance(each, Failed)}

    def offsets(self, timeout_s: float) -> dict[str, tuple[float, float]]:
        """Seconds that each node's clock is ahead of the first one's, and how sure that is."""
        found: dict[str, tuple[float, float]] = {}
        for name in self.names:
            best = (0.0, float("inf"))
            for _ in range(ROUNDS):
                begin = time.time()
                answer = self.each({name: self._actors[name].now.remote()}, timeout_s)
                end = time.time()
                if name in answer and (end - begin) / 2 < best[1]:
                    best = (answer[name] - (begin + end) / 2, (end - begin) / 2)
            if best[1] < float("inf"):
                found[name] = best
        first, doubt = next(iter(found.values()), (0.0, 0.0))
        return {
            name: (value - first, own + doubt) if number else (0.0, 0.0)
            for number, (name, (value, own)) in enumerate(found.items())
        }

    def mesh(self, timeout_s: float) -> dict[str, dict[str, str]]:
        """What each node found on trying to reach every other one."""
        where = self.ask(lambda probe: probe.listen.remote(), timeout_s)
        asking = {
            name: self._actors[name].connect.remote({other: at for other, at in where.items() if other != name})
            for name in where
        }
        return self.each(asking, timeout_s)

    def reduced(self, names: Sequence[str], backend: str, timeout_s: float) -> dict[str, dict[str, Any]]:
        """An all-reduce between ``names``; who is lost in it has an answer that says so."""
        first = self.ask(lambda probe: probe.reserve.remote(), timeout_s, names[:1])
        if not first:
            return {names[0]: {"right": False, "gb_s": 0.0, "problem": self.silent[names[0]]}}
        host, port = first[names[0]]
        meeting = {"host": host, "port": port, "world": len(names), "backend": backend, "timeout_s": timeout_s}
        asking = {name: self._actors[name].reduce.remote(meeting, rank) for rank, name in enumerate(names)}
        # the group's own deadline comes first, and says more
        answers = self.each(asking, timeout_s + 5.0)
        return {
            name: answers[name] if name in answers else {"right": False, "gb_s": 0.0, "problem": self.silent[name]}
            for name in names
        }

    def close(self) -> None:
        """End all of them."""
        for actor in self._actors.values():
            ray.kill(actor)
