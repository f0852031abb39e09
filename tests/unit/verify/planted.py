"""Verifiers that misbehave on demand; the response says how."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time


def verify(gold: str, response: str, prompt: str, *, bonus: float = 0.0) -> object:
    if response == "sleep":
        while True:
            with contextlib.suppress(BaseException):  # a sleeper that swallows whatever would wake it
                time.sleep(60)
    if response == "spin":
        while True:
            pass
    if response == "eat":
        hoard = []
        while True:
            hoard.append(bytearray(16 << 20))
    if response == "exit":
        os._exit(3)
    if response == "sys.exit":
        sys.exit("bye")
    if response == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "raise":
        raise RuntimeError("planted")
    if response == "print":
        print('{"id": 1, "outcome": 1.0}\n' * 100)
        sys.stderr.write("noise\n" * 1000)
        os.write(1, b'{"id": 2, "outcome": 1.0}\n')
        subprocess.run(["echo", '{"outcome": 1.0}'], check=True)
    if response == "grandchild":
        return 1.0, str(subprocess.Popen(["sleep", "600"]).pid)
    if response == "stdin":
        return 1.0, repr(sys.stdin.read())
    if response == "environ":
        return 1.0, " ".join(sorted(os.environ))
    if response == "modules":
        return 1.0, " ".join(name for name in ("torch", "ray", "vllm", "numpy", "sympy") if name in sys.modules)
    if response == "wide":
        return 7.0, "too large"
    if response == "nan":
        return float("nan"), "not a number"
    if response == "bare":
        return 1.0
    if response == "steps":
        return 1.0, "labelled", (1, 0, -1)
    if response == "unjudgeable":
        return None, "the judge declined"
    return min(1.0, float(gold == response) + bonus), response


CANARIES = [("7", "7", 1.0)]
