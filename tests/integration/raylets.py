"""Several Ray nodes on this machine's loopback address, each a `ray start` of its own, with token authentication."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Raylets:
    """``environment``: what a process needs to join; ``processes``: one per node, the head first."""

    address: str
    environment: Mapping[str, str]
    processes: Sequence[subprocess.Popen[bytes]]


@contextmanager
def raylets(folder: Path, count: int) -> Iterator[Raylets]:
    """Nodes named node0, node1, ...; all of them end with the block."""
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    common = ["--node-ip-address=127.0.0.1", "--num-cpus=4", "--object-store-memory=150000000", "--block"]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            where = (
                ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]
                if number == 0
                else [f"--address={address}"]
            )
            log = folder / f"node{number}.log"
            with log.open("wb") as output:
                words = [sys.executable, "-m", "rlprm.actors.ray_program", "start", *where, *common]
                started.append(
                    subprocess.Popen(
                        [*words, f"--node-name=node{number}"],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                    )
                )
            _wait(started[-1], log)
        yield Raylets(address=address, environment=environment, processes=started)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(45.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while b"Ray runtime started" not in log.read_bytes():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
