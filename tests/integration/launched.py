"""`rlprm launch` from outside, as a user calls it, and what is left of it on the machine.

Most tests let a stand-in take the run's place, which prints, waits and ends as it is told: they are about nodes,
signals and exit codes, and Ray is real in all of them.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "recipe=chain_arithmetic_cpu"
STAND_IN = """\
import signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)  # a real run would finish its step first
print("stand-in", *sys.argv[1:], flush=True)
try:
    time.sleep({seconds})
except KeyboardInterrupt:
    print("stand-in was interrupted", flush=True)
    sys.exit(130)
sys.exit({code})
"""


def stand_in(folder: Path, *, seconds: float = 0.0, code: int = 0) -> str:
    """A Python that is this one, but runs the stand-in where it is asked for `rlprm`."""
    program, python = folder / "stand_in.py", folder / "python"
    program.write_text(STAND_IN.format(seconds=seconds, code=code))
    here = shlex.quote(sys.executable)
    python.write_text(
        f'#!/bin/sh\nif [ "$2" = rlprm.cli.main ]; then shift 2; exec {here} {shlex.quote(str(program))} "$@"; fi\n'
        f'exec {here} "$@"\n'
    )
    python.chmod(0o755)
    return str(python)


class Launched:
    """One `rlprm launch` in the foreground; every process below it is known."""

    def __init__(self, *words: str, environment: Mapping[str, str] | None = None) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            rlprm("launch", RECIPE, *words),
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def until(self, text: str) -> str:
        """Read until a line has ``text``; that line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"{text!r} never came:\n{self.text}")

    def end(self, timeout_s: float = 120.0) -> int:
        """Read on to the end; the exit code."""
        assert self.process.stdout is not None
        self.lines += self.process.stdout.readlines()
        return self.process.wait(timeout_s)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def below(self) -> list[psutil.Process]:
        """All processes of the launch, but the launcher."""
        return psutil.Process(self.process.pid).children(recursive=True)


def rlprm(*words: str) -> list[str]:
    """A command line."""
    return [sys.executable, "-m", "rlprm.cli.main", *words]


def called(*words: str) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(rlprm(*words), cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def state(output_dir: Path, wanted: str = "") -> dict[str, Any]:
    """How the latest launch stands."""
    done = called("status", f"output_dir={output_dir}", "--json", *filter(None, [wanted]))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)[0])


def gone(processes: list[psutil.Process], within_s: float = 10.0) -> list[str]:
    """Names of those that are still there after ``within_s`` seconds."""
    left = psutil.wait_procs(processes, timeout=within_s)[1]
    return [each.name() for each in left if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def until(condition: Any, what: str, within_s: float = 60.0) -> None:
    """Wait for something that comes soon."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {within_s} s"
        time.sleep(0.3)


def small(output_dir: Path, python: str | None = None) -> list[str]:
    """One step of the recipe on transformers, without saving."""
    return [
        "steps=1", "prompts_per_step=8", "responses_per_prompt=4", "max_response_tokens=24", "evaluation.every=0",
        "checkpoint.every=0", "tracker.tensorboard=false", "rollout=transformers", "rollout.engine.max_num_seqs=32",
        f"output_dir={output_dir}", "cluster.preflight=off", *([f"cluster.python={python}"] if python else []),
    ]  # fmt: skip
