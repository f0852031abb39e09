"""The parent's handle on one worker process: start it, ask it with a deadline, kill it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

MAX_ANSWER = 1 << 20  # bytes; a longer line is not an answer
# The path list is handed over as data, so a worker imports what its parent would, wherever it was started from.
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rlprm.verify.worker import main; "
    "main(int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))"
)
# No other variable reaches a worker: keys and tokens of the run are none of a verifier's business.
ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "LD_LIBRARY_PATH", "TZ", "PYTHONHASHSEED")


class ChildDied(Exception):
    """The process ended, or answered something that is no answer; the text says how."""


class Overdue(Exception):
    """The deadline passed without an answer."""


class Child:
    """One worker process. All methods but :meth:`kill` belong to the thread that made it."""

    def __init__(self, verifier: str, kwargs: str, memory_mb: int) -> None:
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process, closed in reap()
        self._process = subprocess.Popen(
            [sys.executable, "-c", BOOT, json.dumps(_paths()), str(os.getpid()), verifier, kwargs, str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            bufsize=0,
            start_new_session=True,  # its own group: Ctrl-C is the parent's, and killpg takes grandchildren along
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        for pipe in (self._requests, self._answers):
            os.set_blocking(pipe.fileno(), False)
        self._asked = 0
        self._lock, self._reaped = threading.Lock(), False

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, deadline: float) -> str:
        """Empty once the verifier is loaded, otherwise why it could not be."""
        try:
            answer = self._receive(deadline)
        except Overdue:
            return "it did not finish loading in time"
        except ChildDied as death:
            self._stderr.seek(0)
            said = self._stderr.read()[-400:].decode("utf-8", "replace").strip()
            return f"{death}; it said: {said}" if said else str(death)
        return "" if answer.get("ready") is True else str(answer.get("reason"))

    def ask(self, job: tuple[str, str, str], deadline: float) -> dict[str, Any]:
        """One job, one answer.

        Raises:
            Overdue: no answer at ``deadline`` (``time.monotonic()``).
            ChildDied: the process ended, or the answer is not one to this job.
        """
        self._asked += 1
        gold, response, prompt = job
        message = {"id": self._asked, "gold": gold, "response": response, "prompt": prompt}
        self._write(json.dumps(message, ensure_ascii=True).encode("ascii") + b"\n", deadline)
        answer = self._receive(deadline)
        if answer.get("id") != self._asked:
            raise ChildDied("it answered another question than the one asked")
        return answer

    def kill(self) -> None:
        """SIGKILL to the whole group. Safe from any thread, and on a process that has ended."""
        with self._lock:
            # Once reaped, the number may belong to somebody else's process.
            if not self._reaped:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self) -> None:
        """Collect a killed process and close its pipes."""
        with self._lock:
            self._process.wait()
            self._reaped = True
        for pipe in (self._requests, self._answers, self._stderr):
            pipe.close()

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            _wait(self._requests.fileno(), selectors.EVENT_WRITE, deadline)
            try:
                view = view[os.write(self._requests.fileno(), view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise ChildDied(self._how()) from None

    def _receive(self, deadline: float) -> dict[str, Any]:
        received = b""
        while not received.endswith(b"\n"):
            _wait(self._answers.fileno(), selectors.EVENT_READ, deadline)
            try:
                part = os.read(self._answers.fileno(), 1 << 16)
            except BlockingIOError:
                continue
            if not part:
                raise ChildDied(self._how())
            received += part
            if len(received) > MAX_ANSWER:
                raise ChildDied(f"it answered with more than {MAX_ANSWER} bytes")
        try:
            answer = json.loads(received)
        except ValueError:
            raise ChildDied("it answered something that is not one line of JSON") from None
        if not isinstance(answer, dict):
            raise ChildDied("it answered something that is not a JSON object")
        return answer

    def _how(self) -> str:
        """Exit status or signal, read without reaping, so that the group can still be killed under its number."""
        for _ in range(100):
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if ended is not None:
                if ended.si_code == os.CLD_EXITED:
                    return f"exit status {ended.si_status}"
                return f"signal {signal.Signals(ended.si_status).name}"
            time.sleep(0.01)
        return "it closed its pipe"


def _paths() -> list[str]:
    return [os.path.abspath(entry) for entry in sys.path]  # "" means the current folder


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Sleep until ``descriptor`` is ready for ``event``.

    Raises:
        Overdue: the deadline passed first.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, event)
        while not selector.select(max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                raise Overdue
