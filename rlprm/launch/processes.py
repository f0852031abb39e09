"""Programs started by a program, and their end: nothing that was started here outlives it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil

from rlprm.launch.task import stop_is_asked
from rlprm.verify.worker import die_with

INTERRUPTED = 130  # the shell's exit code for Ctrl-C
TERMINATED = 143  # ... for SIGTERM
PR_SET_CHILD_SUBREAPER = 36
PARENT = "RLPRM_PARENT"  # process id of the program that must not be outlived
GRACE_S = 1800.0  # for a run that was asked to end: it finishes its step and saves first
SAVING = ("train", "ablate")  # commands that finish a step and save; the others end at once
KILL_S = 20.0  # for a program that is to end at once
POLL_S = 0.2
TAIL = 12  # lines of a log in an error


def adopt_orphans() -> None:
    """Let grandchildren whose parent dies become children of this process, so that :func:`sweep` finds them."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def bound(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of a program that shall not outlive this one, if it calls :func:`bind_to_parent`."""
    return {**environment, PARENT: str(os.getpid())}


def bind_to_parent() -> None:
    """Have the kernel send SIGTERM here when the program that has started this one dies, if it wishes so."""
    if PARENT in os.environ:
        die_with(int(os.environ.pop(PARENT)), by=signal.SIGTERM)


def start(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: str | None,
    output: int | IO[Any] | None,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a program that the terminal's Ctrl-C does not reach: what it gets is sent from here, once.

    ``output`` takes what it prints and complains; None: where this program prints.

    Raises:
        OSError: it cannot be started.
    """
    return subprocess.Popen(
        list(arguments),
        env=dict(environment),
        cwd=directory,
        stdin=stdin,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def send(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal, if the process is still there."""
    with suppress(ProcessLookupError):
        process.send_signal(number)


def end(process: subprocess.Popen[bytes], grace_s: float, by: int = signal.SIGTERM) -> None:
    """Ask a program to end, and kill it with all that it has started when it has not after ``grace_s`` seconds."""
    if process.poll() is not None:
        return  # its number may be another process's by now
    inside = tree(process.pid)
    send(process, by)
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        inside += tree(process.pid)
    kill(inside, process)


def tree(root: int) -> list[psutil.Process]:
    """A process and all below it; empty where it is gone."""
    try:
        top = psutil.Process(root)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: Sequence[psutil.Process], own: subprocess.Popen[bytes] | None = None) -> None:
    """Kill whichever of them are left, and wait until they are gone.

    ``own``: the one whose exit code is still to be read; who waits for it by its number would take the code away.
    """
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    if own is not None:
        with suppress(subprocess.TimeoutExpired):
            own.wait(5.0)
    psutil.wait_procs([process for process in processes if own is None or process.pid != own.pid], timeout=5.0)


def sweep(grace_s: float = 5.0) -> None:
    """End everything that this process has started and that is still there."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    kill(psutil.wait_procs(left, timeout=grace_s)[1])


def tail(path: Path, lines: int = TAIL) -> str:
    """The last lines of a log."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join(text.rstrip().splitlines()[-lines:])


def asked(command: str) -> str:
    """What a launcher says when it has handed on the wish to end ``rlprm COMMAND``.

    >>> asked("train")
    'asked the run to finish its step and save; Ctrl-C again ends it at once'
    """
    if command in SAVING:
        return "asked the run to finish its step and save; Ctrl-C again ends it at once"
    return f"asked rlprm {command} to end; Ctrl-C again ends it the hard way"


@dataclass(kw_only=True)
class Wishes:
    """Who asks this program to end: a signal, the launch folder's stop file, or whoever holds the other end of stdin.

    ``asked`` is the signal that whoever looks at the exit code may expect; ``hard`` says that somebody has asked twice.
    """

    folder: Path | None = None
    asked: signal.Signals | None = None
    hard: bool = False
    why: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def on_signals(self) -> None:
        """Ctrl-C and SIGTERM are wishes from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._signalled)

    def on_lifeline(self, stream: TextIOWrapper) -> None:
        """Lines of ``stream`` are wishes, and its end is one."""
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def ask(self, number: signal.Signals, why: str) -> None:
        with self._lock:
            self.hard = self.hard or self.asked is not None
            self.asked = self.asked or number
            self.why = self.why or why

    def check(self) -> bool:
        """Is it time to end?"""
        if self.asked is None and self.folder is not None and stop_is_asked(self.folder):
            self.ask(signal.SIGINT, "rlprm stop")
        return self.asked is not None

    def code(self) -> int:
        """The exit code of a run that ended because of the wish."""
        return 128 + int(self.asked or signal.SIGINT)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        # no lock: a handler runs in the main thread, which may hold it
        self.hard = self.hard or self.asked is not None
        self.asked = self.asked or signal.Signals(number)
        self.why = self.why or signal.Signals(number).name

    def _read(self, stream: TextIOWrapper) -> None:
        for line in stream:
            if line.strip() == "stop":
                self.ask(signal.SIGINT, "the launcher asks for it")
        if self.asked is None:  # its end after a wish is no second one
            self.ask(signal.SIGINT, "the connection to the launcher is gone")


def wait(
    process: subprocess.Popen[bytes],
    wishes: Wishes,
    *,
    say: Callable[[str], None],
    name: str,
    asking: str = "",
    by: signal.Signals | None = signal.SIGTERM,
    grace_s: float = GRACE_S,
    kill_s: float = KILL_S,
    also: Callable[[], Any] = lambda: None,
) -> int:
    """The program's exit code, or the wish's where the program has ended because of that.

    A wish is handed on as the signal ``by`` (None: as the one that came) and said in the words ``asking``. A second wish,
    or the end of ``grace_s``, becomes SIGINT, which ends the program at once; ``kill_s`` later it is killed. Where
    ``grace_s`` is 0 it begins with SIGINT. ``also`` is called at every look.
    """
    told = ended = None
    while (code := process.poll()) is None:
        also()
        now = time.monotonic()
        if wishes.check() and told is None:
            told = now
            if grace_s > 0 and not wishes.hard:
                say(asking or f"{name} is asked to end ({wishes.why})")
                send(process, by or wishes.asked or signal.SIGINT)
        if told is not None and ended is None and (wishes.hard or now - told >= grace_s):
            late = f"it has not ended within {grace_s:.0f} s" if grace_s > 0 else wishes.why
            say(f"{name} is to end at once ({'asked twice' if wishes.hard else late})")
            send(process, signal.SIGINT)
            ended = now
        if ended is not None and now - ended > kill_s:
            say(f"{name} is killed: it has not ended within {kill_s:.0f} s")
            kill(tree(process.pid), process)
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
    if told is not None and (code < 0 or code in (INTERRUPTED, TERMINATED)):
        return wishes.code()  # any other code is an error of its own, such as a disk that was full
    return code if code >= 0 else 128 - code


def this_python() -> str:
    """The interpreter that runs this, as it was called: resolved, a virtual environment would be lost."""
    return os.path.abspath(sys.executable)
