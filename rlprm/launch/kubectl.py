"""Calls of kubectl: what it answers, and what a job's program prints."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import IO, Any

from rlprm.config_cluster import KubeRayCluster
from rlprm.errors import ConfigError
from rlprm.launch.backends import Say

CALL_S = 60.0  # longest wait for one answer
LAST_S = 15.0  # for the last lines of a job that has ended
_STAMPED = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d) ?(.*)", re.DOTALL)


class Unreachable(Exception):
    """No answer now, or none that can be read; what was asked about may well go on."""


def kubectl(cluster: KubeRayCluster, *arguments: str) -> list[str]:
    """The command."""
    context = [] if cluster.context is None else ["--context", cluster.context]
    return ["kubectl", *context, "-n", cluster.namespace, *arguments]


def require() -> None:
    """There is a kubectl here.

    Raises:
        ConfigError: there is none.
    """
    if shutil.which("kubectl") is None:
        raise ConfigError("kubectl is not on PATH; install it, or apply the output of --dry-run by other means")


def ask(cluster: KubeRayCluster, *arguments: str, given: str | None = None, within_s: float = CALL_S) -> str:
    """What one call prints.

    Raises:
        Unreachable: kubectl is missing, does not answer, or fails; its last line says why.
    """
    try:
        done = subprocess.run(
            kubectl(cluster, *arguments),
            input=given,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=within_s,
            check=False,
            start_new_session=True,  # the terminal's Ctrl-C is for the launcher
        )
    except subprocess.TimeoutExpired as error:
        raise Unreachable(
            f"kubectl {arguments[0]} gave no answer within {within_s:.0f} s; is the cluster up?"
        ) from error
    except OSError as error:
        raise Unreachable(f"kubectl cannot be run here: {error.strerror}") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Unreachable(f"kubectl {arguments[0]} failed: {said[-1]}")
    return done.stdout


def ask_object(cluster: KubeRayCluster, *arguments: str) -> dict[str, Any] | None:
    """What one call of ``get`` finds; None: the cluster says that there is no such object.

    Raises:
        Unreachable: as :func:`ask`.
    """
    text = ask(cluster, "get", *arguments, "--ignore-not-found", "-o", "json")
    if not text.strip():
        return None
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise Unreachable(f"kubectl get printed no JSON object ({error})") from error


class Log:
    """What a job's program prints. A stream that breaks is opened again, and goes on where it broke."""

    def __init__(self, cluster: KubeRayCluster, name: str, say: Say) -> None:
        self._cluster = cluster
        self._name = name
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints: IO[bytes] | None = None
        self._told = ""
        self._rest = b""  # of a line that has not ended
        self._last: tuple[float, bytes] | None = None  # time of the last line
        self._since: list[str] = []

    def pieces(self, ended: Callable[[], bool]) -> Iterator[str]:
        """Lines, until ``ended``, which is asked every ``cluster.poll_s`` seconds."""
        try:
            while not ended():
                yield from self._lines(self._cluster.poll_s)
            if self._process is not None:
                yield from self._lines(LAST_S, again=False)
            # whether that stream has ended or broken cannot be told, so what is missing is asked for
            self._close()
            self._open("logs")
            yield from self._lines(LAST_S, again=False, quiet=True)
            if self._rest:
                yield from self._new(self._rest)
        finally:
            self._close()

    def _lines(self, seconds: float, again: bool = True, quiet: bool = False) -> Iterator[str]:
        deadline = time.monotonic() + seconds
        if again and self._process is None:
            self._open("logs", "-f")
        while self._process is not None and (left := deadline - time.monotonic()) > 0:
            assert self._process.stdout is not None
            if not select.select([self._process.stdout], [], [], left)[0]:
                break
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                self._close(quiet)
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                yield from self._new(line + b"\n")
        if again:
            time.sleep(max(0.0, deadline - time.monotonic()))

    def _new(self, line: bytes) -> Iterator[str]:
        """The line without its time, unless it was printed before."""
        found = _STAMPED.fullmatch(line)
        if found is None:
            yield line.decode("utf-8", errors="replace")
            return
        second = (found[1] + found[3]).decode()
        at = (datetime.fromisoformat(second).timestamp(), (found[2] or b"").ljust(9, b"0"))
        if self._last is None or at > self._last:
            self._last, self._since = at, [f"--since-time={second}"]  # Kubernetes counts in whole seconds here
            yield found[4].decode("utf-8", errors="replace")

    def _open(self, *verb: str) -> None:
        command = kubectl(self._cluster, *verb, "--timestamps", *self._since, f"job/{self._name}")
        self._rest = b""  # comes again, whole
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed in _close
        try:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=self._complaints, start_new_session=True
            )
        except OSError as error:
            self._complain(f"kubectl cannot be run here: {error.strerror}")

    def _close(self, quiet: bool = False) -> None:
        process, self._process = self._process, None
        if process is not None and self._complaints is not None:
            try:
                code = process.wait(1.0)  # it may have closed its output a moment before it ends
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = 0
            assert process.stdout is not None
            process.stdout.close()
            self._complaints.seek(0)
            said = self._complaints.read().decode("utf-8", errors="replace").strip().splitlines()
            if code != 0 and not quiet:
                self._complain(f"kubectl logs failed ({said[-1] if said else f'exit code {code}'})")
        if self._complaints is not None:
            self._complaints.close()
            self._complaints = None

    def _complain(self, sentence: str) -> None:
        if sentence != self._told:
            self._say(f"{sentence}; it is tried again while the job runs")
            self._told = sentence
