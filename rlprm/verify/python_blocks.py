"""Do the Python code blocks of a response compile, do they run? One label per reasoning step.

The response is given as a JSON list of its steps' texts. A fenced block belongs to the step in which its fence closes,
so a block may run over a step's end. Compiling executes nothing. Running does, and it is **no sandbox**: the program is
a process of its own with the limits below, but it sees this machine's files and network. Run it in a container.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import accumulate

from rlprm.verify.step_form import steps_of
from rlprm.verify.worker import die_with

_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?:python3?|py)[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE | re.IGNORECASE
)
MAX_FILE = 1 << 20  # bytes that one file may grow to
MAX_FILES = 64  # open files
CANARIES = [
    ("", '["```python\\nx = 1\\n```\\n"]', 1.0),
    ("", '["```python\\nx = = 1\\n```\\n"]', 0.0),
]


def compiles(gold: str, response: str, prompt: str) -> tuple[float, str, tuple[int, ...]]:
    r"""Per step 1 where every block that closes in it compiles, 0 where one does not, -1 without code.

    The outcome is 1 iff no step has 0; ``gold`` and ``prompt`` are not read.

    >>> compiles("", '["```python\\nx = 1\\n```\\n", "so x is 1\\n", "```python\\nx = = 1\\n```\\n"]', "")[2]
    (1, -1, 0)

    Raises:
        ValueError: the response is no JSON list of texts.
    """
    steps = steps_of(response)
    return _verdict(steps, [(step, _compiles(code)) for step, code in blocks(steps)])


def runs(
    gold: str, response: str, prompt: str, *, seconds: float, memory_mb: int
) -> tuple[float, str, tuple[int, ...]]:
    r"""Per step 1 where every block that closes in it runs to its end, 0 where one fails or takes too long, -1 without.

    Each block runs after all earlier ones that ran well, in a fresh interpreter (``-I``: no environment, no user
    packages) in an empty folder that is removed afterwards, with at most ``seconds`` of processor and wall-clock time,
    ``memory_mb`` MiB of address space, 1 MiB a file and 64 open files. A program that leaves early (``sys.exit(0)``)
    did not reach its end and counts as failed.

    >>> runs("", '["```python\\nx = 1\\n```\\n", "```python\\nassert x == 2\\n```\\n"]', "", seconds=5.0, memory_mb=512)[2]
    (1, 0)

    Raises:
        ValueError: the response is no JSON list of texts.
    """
    steps = steps_of(response)
    before, found = "", []
    for step, code in blocks(steps):
        fine = _compiles(code) and _runs(before + code, seconds, memory_mb)
        before += f"{code}\n" if fine else ""
        found.append((step, fine))
    return _verdict(steps, found)


def blocks(steps: list[str]) -> list[tuple[int, str]]:
    r"""(step in which the fence closes, code) of each fenced Python block.

    >>> blocks(["see\n```py\nx = 1\n", "x += 1\n```\n"])
    [(1, 'x = 1\nx += 1\n')]
    """
    ends = list(accumulate(len(step) for step in steps))
    found = []
    for match in _FENCE.finditer("".join(steps)):
        step = next(number for number, end in enumerate(ends) if match.end() <= end)
        found.append((step, match[1]))
    return found


def _verdict(steps: list[str], found: list[tuple[int, bool]]) -> tuple[float, str, tuple[int, ...]]:
    labels = [-1] * len(steps)
    for step, fine in found:
        labels[step] = int(fine and labels[step] != 0)
    failed = sum(not fine for _, fine in found)
    return float(failed == 0), f"{len(found) - failed} of {len(found)} code blocks are fine", tuple(labels)


def _compiles(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a doubtful escape is no failure
            compile(code, "<step>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError):
        return False
    return True


def _runs(code: str, seconds: float, memory_mb: int) -> bool:
    # only who falls off the program's end leaves with this status (or who reads it in their own file first)
    status = random.SystemRandom().randrange(64, 256)
    with tempfile.TemporaryDirectory(prefix="rlprm-code-") as folder:
        program = os.path.join(folder, "step.py")
        with open(program, "w", encoding="utf-8", errors="replace") as file:
            file.write(f"{code}\nraise SystemExit({status})\n")
        started = subprocess.Popen(
            [sys.executable, "-I", "-B", program],
            cwd=folder,
            env={"PATH": os.environ.get("PATH", ""), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=functools.partial(_limit, os.getpid(), seconds, memory_mb),
            process_group=0,  # so that what it starts can be killed with it
        )
        try:
            _wait(started.pid, time.monotonic() + seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):  # before it is reaped: its number is still its own
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
    return started.returncode == status


def _limit(parent: int, seconds: float, memory_mb: int) -> None:
    die_with(parent)
    for what, most in (
        (resource.RLIMIT_CPU, max(1, round(seconds))),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, MAX_FILE),
        (resource.RLIMIT_NOFILE, MAX_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (least, least))


def _wait(process: int, deadline: float) -> None:
    """Until the process has ended, without reaping it, or the deadline (``time.monotonic()``) has passed."""
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
            return
        time.sleep(0.005)
