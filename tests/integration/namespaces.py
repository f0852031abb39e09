"""Ray nodes for tests: each in a network namespace with an address of its own, or several on this machine's loopback."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from rlprm.actors.network import addresses

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster" / "namespaces.sh"
STORE_BYTES = 150_000_000
START_S = 90.0  # a raylet of a loaded machine

# A node that does not answer counts as dead after about six seconds; by itself Ray waits for a minute.
FAST_DETECTION = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


def unavailable() -> str | None:
    """Why there are no namespaces on this machine; None where there are."""
    done = subprocess.run(
        [str(SCRIPT), "up", "1"], env={**os.environ, "RLPRM_TAG": "probe"}, capture_output=True, text=True
    )
    subprocess.run([str(SCRIPT), "down"], env={**os.environ, "RLPRM_TAG": "probe"}, capture_output=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@dataclass(kw_only=True)
class Nodes:
    """Ray nodes that are started, cut off, killed and started again; all of them end with :func:`nodes`."""

    folder: Path  # of logs
    ray: str  # of Ray's sockets, whose names must be short
    count: int
    separate: bool  # each in a namespace of its own
    tag: str
    port: int
    token: str
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Of the head."""
        return f"{self.ip(0)}:{self.port}"

    def ip(self, node: int) -> str:
        return f"10.99.0.{node + 1}" if self.separate else "127.0.0.1"

    @property
    def environment(self) -> dict[str, str]:
        """Of every process that talks to this Ray."""
        return {
            **os.environ,
            **FAST_DETECTION,
            "RLPRM_TAG": self.tag,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }

    def words(self, node: int, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` on a node."""
        return [str(SCRIPT), "run", str(node), *command] if self.separate else list(command)

    def log(self, node: int) -> Path:
        return self.folder / f"ray{node}.log"

    def start(self, node: int) -> None:
        """Start a node's Ray (0: the head), and wait until it is up."""
        where = ["--head", f"--port={self.port}", "--include-dashboard=false", f"--temp-dir={self.ray}"]
        options = where if node == 0 else [f"--address={self.address}"]
        command = [
            *(sys.executable, "-m", "rlprm.actors.ray_program", "start", "--block", *options),
            *(f"--node-ip-address={self.ip(node)}", f"--node-name=node{node}", "--num-cpus=4"),
            f"--object-store-memory={STORE_BYTES}",
        ]
        if not self.separate:  # several nodes share the address, and perhaps the machine with another Ray
            command += ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
            command += [f"--ray-client-server-port={free_port()}"] if node == 0 else []
        before = self.log(node).read_text().count("Ray runtime started") if self.log(node).exists() else 0
        with self.log(node).open("ab") as log:
            self.running[node] = subprocess.Popen(
                self.words(node, command), env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(
            lambda: self.log(node).read_text().count("Ray runtime started") > before, START_S, f"node {node}: {self.log(node)}",
            failed=lambda: self.running[node].poll() is not None,
        )  # fmt: skip

    def spawn(self, node: int, command: Sequence[str], screen: Path, **variables: str) -> subprocess.Popen[bytes]:
        """A process on a node, with its output in ``screen``."""
        with screen.open("ab") as out:
            process = subprocess.Popen(
                self.words(node, command), env={**self.environment, **variables}, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip
        self.others.append(process)
        return process

    def cut(self, node: int) -> None:
        """No packet reaches the node any more, or leaves it."""
        self._script("link", str(node), "down")

    def mend(self, node: int) -> None:
        self._script("link", str(node), "up")

    def kill(self, node: int) -> None:
        """``kill -9`` of the node's raylet, which takes its workers with it."""
        for process in tree(self.running[node].pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "raylet":
                    process.kill()
        self.running.pop(node).wait(timeout=60)

    def on(self, node: int) -> list[psutil.Process]:
        """Everything that runs on a node of its own namespace."""
        listed = subprocess.run(
            ["ip", "netns", "pids", f"rlprm{self.tag}{node}"], capture_output=True, text=True, check=True
        )
        found = []
        for line in listed.stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(line)))
        return found

    def stop(self) -> None:
        """End everything: with links up, because a node that is cut off takes half a minute and leaves its agents."""
        if self.separate:
            for node in range(self.count):
                self.mend(node)
        first = [*self.others, *(self.running[node] for node in sorted(self.running, reverse=True))]  # the head last
        everything = [process for each in first for process in tree(each.pid)]
        for each in first:
            each.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.wait(timeout=10)
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for each in first:
            each.wait(timeout=30)
        if self.separate:
            self._script("down")
        shutil.rmtree(self.ray, ignore_errors=True)

    def _script(self, *words: str) -> None:
        subprocess.run([str(SCRIPT), *words], env=self.environment, check=True, capture_output=True, timeout=60)


@contextlib.contextmanager
def nodes(folder: Path, count: int, *, separate: bool, start: Sequence[int] | None = None) -> Iterator[Nodes]:
    """``count`` nodes, those of ``start`` (all, unless given) with Ray on them."""
    tag = "t" + "".join(chr(ord("a") + byte % 26) for byte in secrets.token_bytes(4))
    made = Nodes(
        folder=folder,
        ray=tempfile.mkdtemp(prefix="rl"),
        count=count,
        separate=separate,
        tag=tag,
        port=6399 if separate else free_port(),
        token=secrets.token_hex(16),
    )
    try:
        if separate:
            made._script("up", str(count))
        for node in range(count) if start is None else start:
            made.start(node)
        yield made
    finally:
        made.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it; nothing where it has ended."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_until(
    done: Callable[[], bool], seconds: float, what: str, *, failed: Callable[[], bool] = lambda: False
) -> float:
    """Seconds until ``done``; an error that says what was waited for."""
    begin = time.monotonic()
    while not done():
        if failed() or time.monotonic() - begin > seconds:
            raise AssertionError(f"{what}: not after {time.monotonic() - begin:.0f} s")
        time.sleep(0.1)
    return time.monotonic() - begin


def own_address(environment: Mapping[str, str]) -> bool:
    """Does ``GLOO_SOCKET_IFNAME`` name the interface with the address in ``VLLM_HOST_IP``? For use inside an actor."""
    return environment["VLLM_HOST_IP"] in addresses()[environment["GLOO_SOCKET_IFNAME"]]
