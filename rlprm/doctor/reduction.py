"""An all-reduce with a known sum: is it right, how fast, and between whom not?

:func:`measure` is one rank's part, in whatever process; :func:`pairs` says who tries with whom when all together fail;
:func:`findings` judges. ``python -m rlprm.doctor.reduction`` runs a rank of this machine, told by JSON on stdin.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlprm.doctor.finding import ALL, Finding, fail, ok, warn

LOOPBACK = "127.0.0.1"
PERIOD = 251  # of the pattern; small whole numbers, so that every sum is exact in float32
# backend -> (bytes, rounds, slowest bandwidth in GB/s that is no reason to look)
SIZES = {"gloo": (8 << 20, 5, 0.05), "nccl": (256 << 20, 10, 1.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where ranks meet, and what they do there."""

    host: str
    port: int
    world: int
    backend: str
    timeout_s: float


def measure(meeting: Meeting, rank: int) -> dict[str, Any]:
    """``{"right", "gb_s", "problem"}``: this rank's view of a few all-reduces; ``problem`` is "" where they ended.

    The bandwidth is that of the bus, ``2 (n - 1) / n`` times the bytes by the time of one all-reduce.
    """
    import torch

    from rlprm.engine.weights import make_group
    from rlprm.errors import ConfigError

    size, rounds, _ = SIZES[meeting.backend]
    device = "cuda" if meeting.backend == "nccl" else "cpu"
    try:
        group = make_group(meeting.host, meeting.port, rank, meeting.world, meeting.backend, meeting.timeout_s)
        pattern = (torch.arange(size // 4, device=device) % PERIOD).float()
        expected = meeting.world * pattern + meeting.world * (meeting.world - 1) / 2
        right, seconds = True, 0.0
        for number in range(rounds + 1):
            mine = pattern + rank
            begin = time.perf_counter()
            group.process_group.allreduce([mine]).wait()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds += time.perf_counter() - begin if number else 0.0  # the first one sets up the connections
            right = right and bool(torch.equal(mine, expected))
    except (ConfigError, RuntimeError) as error:  # torch's own errors are RuntimeErrors
        lines = [line for line in str(error).splitlines() if line.strip()]
        return {"right": False, "gb_s": 0.0, "problem": lines[0][:200] if lines else type(error).__name__}
    moved = 2 * (meeting.world - 1) / meeting.world * size * rounds
    return {"right": right, "gb_s": moved / max(seconds, 1e-9) / 1e9, "problem": ""}


def pairs(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Rounds in which every two meet once, and nobody is in two places at a time.

    >>> pairs(["a", "b", "c"])
    [[('b', 'c')], [('a', 'c')], [('a', 'b')]]
    """
    ring = [*names] if len(names) % 2 == 0 else [*names, ""]
    found = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        met = zip(ring[:half], reversed(ring[half:]), strict=True)
        found.append([(one, other) for one, other in met if one and other])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return [sorted((min(pair), max(pair)) for pair in each) for each in found]


def suspicious(answers: Mapping[str, Mapping[str, Any]], backend: str) -> bool:
    """Is it worth trying each two by themselves?"""
    return any(each["problem"] or not each["right"] or each["gb_s"] < SIZES[backend][2] for each in answers.values())


def findings(
    answers: Mapping[str, Mapping[str, Any]],
    backend: str,
    between: Mapping[tuple[str, str], Mapping[str, Any]],
    tried: str = "",
) -> Iterator[Finding]:
    """``answers``: of all together, by node or rank; ``between``: of two by themselves, where they were tried."""
    name = f"all-reduce ({backend})" if len(f"all-reduce ({backend})") <= 14 else "all-reduce"
    slow = SIZES[backend][2]
    named = False
    for (one, other), each in between.items():
        if each["problem"] or not each["right"]:
            named = True
            what = each["problem"] or "the sum is wrong"
            yield fail(name, one, f"with {other} ({backend}): {what}", _cure(backend))
        elif each["gb_s"] < slow:
            named = True
            yield warn(
                name,
                one,
                f"with {other} ({backend}): {each['gb_s']:.3f} GB/s, expected {slow:g} or more",
                _cure(backend),
            )
    wrong = [node for node, each in answers.items() if not each["problem"] and not each["right"]]
    silent = {node: each["problem"] for node, each in answers.items() if each["problem"]}
    for node in wrong:
        yield fail(name, node, f"a sum over {len(answers)} ranks ({backend}) is wrong",
                   "something on the way changes data: look at the node's memory, network card and NCCL_* settings")  # fmt: skip
    if silent and not (named and between):
        for node, why in silent.items():
            yield fail(name, node, f"among {len(answers)} ranks ({backend}): {why}", _cure(backend))
    if wrong or silent:
        return
    slowest = min((each["gb_s"] for each in answers.values()), default=0.0)
    said = f"{len(answers)} ranks ({backend}) sum rightly, {slowest:.2f} GB/s{tried}"
    if slowest < slow and not named:
        yield warn(name, ALL, f"{said}, expected {slow:g} or more", _cure(backend))
    elif not named:
        yield ok(name, ALL, said)


def _cure(backend: str) -> str:
    variable = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME (and NCCL_DEBUG=INFO says more)"
    return f"open all ports between these nodes, and name the right network card in {variable}"


def here(world: int, backend: str, timeout_s: float, visible: Sequence[str]) -> list[Finding]:
    """Ranks of this machine, a process each. ``visible``: GPUs by rank; empty on CPU."""
    from rlprm.actors.network import addresses, variables

    meeting = Meeting(host=LOOPBACK, port=free_port(LOOPBACK), world=world, backend=backend, timeout_s=timeout_s)
    common = {**os.environ, **variables(LOOPBACK, addresses()), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "rlprm.doctor.reduction"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=common | ({"CUDA_VISIBLE_DEVICES": visible[rank]} if visible else {}),
        )
        for rank in range(world)
    ]
    try:
        for rank, process in enumerate(processes):
            assert process.stdin is not None
            process.stdin.write(json.dumps({**plain(meeting), "rank": rank}) + "\n")
            process.stdin.flush()
        deadline = time.monotonic() + timeout_s
        answers = {f"rank{rank}": _answer(process, deadline) for rank, process in enumerate(processes)}
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return list(findings(answers, backend, {}))


def _answer(process: subprocess.Popen[str], deadline: float) -> dict[str, Any]:
    try:
        said, complaint = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return {"right": False, "gb_s": 0.0, "problem": "no answer in time"}
    try:
        return json.loads(said.strip().splitlines()[-1])
    except (ValueError, IndexError):
        lines = complaint.strip().splitlines()
        return {"right": False, "gb_s": 0.0, "problem": lines[-1][:200] if lines else f"exit code {process.returncode}"}


def plain(meeting: Meeting) -> dict[str, Any]:
    """As JSON."""
    return {name: getattr(meeting, name) for name in ("host", "port", "world", "backend", "timeout_s")}


def free_port(host: str) -> int:
    """A port of ``host`` that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """One rank."""
    told = json.loads(sys.stdin.readline())
    rank = told.pop("rank")
    print(json.dumps(measure(Meeting(**told), rank)), flush=True)


if __name__ == "__main__":
    main()
