"""The child side of :class:`rlprm.verify.pool.VerifierPool`: one process, one verifier, one job at a time.

It imports the standard library and the verifier's own module, nothing else. Requests and answers are lines of ASCII
JSON on two private file descriptors; the verifier's own stdin, stdout and stderr are /dev/null, so whatever it prints
cannot be taken for an answer. The parent owns the clock and kills this process when time is up.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

PR_SET_PDEATHSIG = 1
MAX_REASON = 400  # characters; a reason is for people, not a channel


def main(parent: int, verifier: str, kwargs: str, memory_mb: int) -> None:
    """Announce readiness, then answer one line per request line until end of file."""
    die_with(parent)
    requests, answers = _private_streams()
    # The limit also covers the import: a verifier that cannot even be loaded within it is a configuration error.
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        verify = functools.partial(load(verifier), **json.loads(kwargs))
    except BaseException as error:  # noqa: BLE001 - the process border: the parent turns this into a typed error
        _send(answers, {"ready": False, "reason": _short(error)})
        return
    _send(answers, {"ready": True})
    _silence()
    for line in requests:
        job = json.loads(line)
        _send(answers, {"id": job["id"], **judge(verify, job), "rss_mb": _resident_mb()})


def judge(verify: Callable[..., Any], job: dict[str, Any]) -> dict[str, Any]:
    """One verdict as plain data; every exception is an outcome of None with its reason.

    >>> judge(lambda gold, response, prompt: (1.0, "equal"), dict(gold="1", response="1", prompt=""))
    {'outcome': 1.0, 'reason': 'equal', 'steps': None, 'kind': 'judged'}
    """
    started = time.monotonic()
    try:
        found = verify(job["gold"], job["response"], job["prompt"])
    except MemoryError:
        return _failure("memory", "memory limit reached")
    except BaseException as error:  # noqa: BLE001 - the process border: sys.exit() in a verifier is its failure
        spent = time.monotonic() - started
        return _failure("errors", f"{_short(error)} (after {spent:.2f} s)")
    return _checked(found)


def _checked(found: Any) -> dict[str, Any]:
    """Accept ``(outcome, reason)``, ``(outcome, reason, steps)`` or anything with those attributes (a Verdict)."""
    if isinstance(found, tuple) and len(found) in (2, 3):
        outcome, reason, steps = (*found, None)[:3]
    elif hasattr(found, "outcome") and hasattr(found, "reason"):
        outcome, reason, steps = found.outcome, found.reason, getattr(found, "steps", None)
    else:
        return _failure(
            "errors", f"the verifier returned a {type(found).__name__}; expected (outcome, reason) or a Verdict"
        )
    if outcome is None:
        return _failure("errors", str(reason))
    # A NaN fails the comparison, so it is refused too.
    if isinstance(outcome, (bool, int, float)) and 0.0 <= outcome <= 1.0:
        labels = None if steps is None else [int(label) for label in steps]
        return {"outcome": float(outcome), "reason": str(reason)[:MAX_REASON], "steps": labels, "kind": "judged"}
    return _failure("errors", f"the verifier returned outcome {outcome!r:.80}; expected a number in [0, 1]")


def load(path: str) -> Callable[..., Any]:
    """The callable behind a dotted path.

    >>> load("os.path.join")("a", "b")
    'a/b'
    """
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _failure(kind: str, reason: str) -> dict[str, Any]:
    return {"outcome": None, "reason": reason[:MAX_REASON], "steps": None, "kind": kind}


def _short(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:MAX_REASON]
    except Exception:  # noqa: BLE001 - an exception whose text cannot be made is still named
        return type(error).__name__


def die_with(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send this process ``by`` when its parent ends, and leave at once if it is gone already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(by), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _private_streams() -> tuple[BinaryIO, BinaryIO]:
    """Move the two pipes away from descriptors 0 and 1, where a verifier would find them."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    return requests, answers


def _silence() -> None:
    """After a start without errors, descriptor 2 too: a verifier that logs for ever must not fill a disk."""
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    os.close(null)


def _send(answers: BinaryIO, message: dict[str, Any]) -> None:
    # ASCII escapes carry every string, lone surrogates included, and hold no raw line feed.
    data = memoryview(json.dumps(message, ensure_ascii=True).encode("ascii") + b"\n")
    while data:  # an unbuffered stream may write a part
        data = data[answers.write(data) :]


def _resident_mb() -> int:
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() >> 20
