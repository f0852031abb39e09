"""Ray on one node: its environment, its command line, and its process."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from rlprm.errors import ConfigError
from rlprm.launch.processes import bound, end, start, tail
from rlprm.launch.task import Task

LOOPBACK = "127.0.0.1"
START_S = 120.0  # for Ray's processes to come up on one node
END_S = 20.0
STARTED = "Ray runtime started"
PROGRAM = ("-m", "rlprm.actors.ray_program")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# A lost node is noticed after some 5 s and not after a minute.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
# Ray's exporter asks nobody who they are and listens on every address: it runs on the head at most.
NO_METRICS = {"RAY_enable_metrics_collection": "0"}


def environment(task: Task, token: str | None, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of Ray and of all that runs in it.

    What ``base`` has set wins over what is only a good default; what the cluster's own section sets wins over both.
    """
    defaults = {
        "OMP_NUM_THREADS": "1",
        # with more processes than cores, spinning threads make everything ten times slower
        "OMP_WAIT_POLICY": "PASSIVE",
        "RAY_USAGE_STATS_ENABLED": "0",
        # nodes that ssh or a queue starts have not read anybody's profile; nothing is downloaded in a run
        "HF_HUB_OFFLINE": "1",
        **HEALTH,
    }
    authentication = {} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    return {**defaults, **base, **task.environment, **authentication}


def common_options(task: Task, *, name: str | None, ip: str | None) -> list[str]:
    """Options of ``ray start`` on every node."""
    options = [f"--num-cpus={max(task.cpus, os.cpu_count() or 1)}", "--block"]
    if name is not None:
        options.append(f"--node-name={name}")
    if ip is not None:
        options.append(f"--node-ip-address={ip}")
    if task.object_store_bytes is not None:
        options.append(f"--object-store-memory={task.object_store_bytes}")
    if ip == LOOPBACK:  # several nodes share the address: no fixed ports
        options += ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port(ip)}"]
    return options


def head_options(task: Task, *, name: str | None, ip: str, port: int, metrics: int | None) -> list[str]:
    """Options of the first node; ``metrics``: the port of Ray's exporter, None where there is none."""
    return [
        "--head",
        f"--port={port}",
        f"--include-dashboard={'true' if task.dashboard else 'false'}",
        f"--dashboard-host={LOOPBACK}",
        *([] if metrics is None else [f"--metrics-export-port={metrics}"]),
        f"--ray-client-server-port={free_port(ip)}",  # its own: two heads on one machine must not want the same
        *common_options(task, name=name, ip=ip),
    ]


def worker_options(task: Task, *, name: str | None, ip: str | None, address: str) -> list[str]:
    """Options of every other node."""
    return [f"--address={address}", *common_options(task, name=name, ip=ip)]


class RayNode:
    """``ray start --block`` and all that it starts; ``end`` leaves nothing of it."""

    def __init__(self, python: str, options: list[str], variables: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._from = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self.process = start(
                [python, *PROGRAM, "start", *options],
                environment=bound(variables),
                directory=None,
                output=output,
            )

    def wait_ready(self, leave: Callable[[], bool]) -> None:
        """Return when Ray runs on this node, or as soon as ``leave`` says so.

        Raises:
            ConfigError: it ended or did not come up; with the last lines of its log.
        """
        deadline = time.monotonic() + START_S
        while not leave():
            text = self.said()
            if STARTED in text:
                return
            code = self.process.poll()
            if code is not None:
                raise ConfigError(
                    f"Ray ended with code {code} instead of starting; the end of {self.log}:\n{self.tail()}"
                )
            if time.monotonic() > deadline:
                raise ConfigError(f"Ray did not start within {START_S:.0f} s; the end of {self.log}:\n{self.tail()}")
            time.sleep(0.1)

    def said(self) -> str:
        """What it has printed since this start."""
        with self.log.open("rb") as file:
            file.seek(self._from)
            return _COLOUR.sub("", file.read().decode("utf-8", errors="replace"))

    def tail(self) -> str:
        """The end of what it has printed."""
        return _COLOUR.sub("", tail(self.log))

    def end(self, grace_s: float = END_S) -> None:
        """Ask Ray to end, and kill what is left of it."""
        end(self.process, grace_s)


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def refuse_taken(host: str, port: int) -> None:
    """Find out before anything starts.

    Raises:
        ConfigError: the port is in use, or the address is not one of this machine.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"Ray's head cannot have {host}:{port} ({error.strerror}); choose another cluster.port, 0 for any, and an "
                f"address of this machine ({socket.gethostname()})"
            ) from error


def own_address(towards: str = "8.8.8.8") -> str:
    """This machine's address as others see it; nothing is sent for it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((towards, 80))
        return str(probe.getsockname()[0])
    return socket.gethostbyname(socket.gethostname())


def answers(address: str, timeout_s: float = 2.0) -> bool:
    """Does anything listen at HOST:PORT?"""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=timeout_s):
            return True
    except OSError:
        return False
