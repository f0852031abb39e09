"""The program of the first node: Ray's head, the wait for the others, the checks, and the run itself.

``python -m rlprm.launch.head FOLDER [--name NAME] [--ip ADDRESS] [--joined [ADDRESS]] [--stdin]``

It exits with the run's exit code, which it has also written to the launch folder, and leaves no process behind. Whoever
asks it to end (the stop file, a signal, a closed stdin) lets the run finish its step and save; asked again, it ends at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from io import TextIOWrapper
from pathlib import Path
from typing import cast

from rlprm.errors import ConfigError
from rlprm.launch import node, task
from rlprm.launch.lifeline import first_line
from rlprm.launch.processes import GRACE_S, KILL_S, Wishes, adopt_orphans, bind_to_parent, start, sweep, wait
from rlprm.launch.streams import forward
from rlprm.launch.task import Task

CHECK_END_S = 5.0  # for the wait and the checks: they have nothing to save and end at once


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the task of a launch folder on this node as its head."""
    options = _parser().parse_args(arguments)
    bind_to_parent()
    wishes = Wishes(folder=options.folder)
    wishes.on_signals()
    adopt_orphans()
    try:
        found = task.read(options.folder)
        given = first_line(cast(TextIOWrapper, sys.stdin), wishes) if options.stdin else {}
        os.chdir(found.directory)
        with Output(found.path / task.LOG) as output:
            return Head(found, options, {**os.environ, **given}, wishes, output).run()
    except (ConfigError, OSError) as error:
        print(f"rlprm launch: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        sweep()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rlprm.launch.head", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", help="of this node in Ray")
    parser.add_argument("--ip", help="address of this node for the others")
    parser.add_argument(
        "--joined", nargs="?", const="", metavar="ADDRESS", help="Ray runs already, there or at RAY_ADDRESS"
    )
    parser.add_argument("--stdin", action="store_true", help="secrets come on stdin, and its end ends the run")
    return parser


class Output:
    """What is printed goes to stdout and to the log; a stdout that nobody reads any more is left alone."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("ab", buffering=0)
        self._lock = threading.Lock()
        self._listened = True

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: object) -> None:
        self._log.close()

    def say(self, text: str) -> None:
        """One line of the head itself."""
        self.write(f"launch: {text}\n".encode())

    def write(self, data: bytes) -> None:
        with self._lock:
            self._log.write(data)
            if self._listened:
                try:
                    sys.stdout.buffer.write(data)
                    sys.stdout.buffer.flush()
                except (BrokenPipeError, ValueError, OSError):
                    self._listened = False


class Head:
    """One task on its first node."""

    def __init__(
        self, found: Task, options: argparse.Namespace, given: dict[str, str], wishes: Wishes, output: Output
    ) -> None:
        self._task = found
        self._options = options
        self._wishes = wishes
        self._output = output
        joined = options.joined is not None
        # a cluster that runs already has its own token, from the environment of whoever joins it
        token = given.get("RAY_AUTH_TOKEN") or (None if joined else task.token(found.path))
        self._environment = node.environment(found, token, given)

    def run(self) -> int:
        """The run's exit code; Ray is gone when this returns."""
        # a job that is queued again runs in the folder of its first try
        for name in (task.EXIT, task.HEAD):
            (self._task.path / name).unlink(missing_ok=True)
        with ExitStack() as stack:
            try:
                code = self._in_ray(stack)
            except (ConfigError, OSError) as error:
                self._output.say(f"error: {error}")
                code = 1
            self._output.say(f"ended with exit code {code}")
            # the others leave when they see it, while Ray ends here
            task.put(self._task.path, task.EXIT, f"{code}\n")
        return code

    def _in_ray(self, stack: ExitStack) -> int:
        if self._options.joined is not None:
            address = self._options.joined or self._environment.get("RAY_ADDRESS", "auto")
        else:
            address = self._start_ray(stack)
        if self._wishes.check():
            return self._ended_early()
        task.put(self._task.path, task.HEAD, json.dumps({"address": address, "time": time.time()}) + "\n")
        ready = [self._task.python, "-m", "rlprm.launch.ready", self._task.folder, address]
        code = self._program(ready, "the preflight", grace_s=0.0, kill_s=CHECK_END_S)
        if self._wishes.check():
            return self._ended_early()
        if code != 0:
            return code
        self._output.say(f"starts rlprm {self._task.command[0]}")
        command = [self._task.python, "-m", "rlprm.cli.main", *self._task.command]
        return self._program([*command[:4], f"placement.ray_address={address}", *command[4:]], "the run")

    def _start_ray(self, stack: ExitStack) -> str:
        found = self._task
        ip = self._options.ip or node.own_address()
        node.refuse_taken(ip, found.port)
        port = found.port or node.free_port(ip)
        name = self._options.name
        self._output.say(f"starts Ray's head at {ip}:{port}")
        log = found.path / f"ray-{name or 'head'}.log"
        metrics = node.free_port(ip) if found.dashboard else None
        options = node.head_options(found, name=name, ip=ip, port=port, metrics=metrics)
        variables = self._environment if metrics is not None else {**self._environment, **node.NO_METRICS}
        ray = node.RayNode(found.python, options, variables, log)
        stack.callback(ray.end)
        ray.wait_ready(self._wishes.check)
        if metrics is not None:
            self._output.say(f"Ray's metrics for Prometheus are at http://{ip}:{metrics}/metrics, of this node only")
        return f"{ip}:{port}"

    def _program(self, command: list[str], name: str, *, grace_s: float = GRACE_S, kill_s: float = KILL_S) -> int:
        """Run a program to its end, with what it prints passed on."""
        process = start(command, environment=self._environment, directory=self._task.directory, output=subprocess.PIPE)
        copying = forward(process, self._output.write)
        code = wait(process, self._wishes, say=self._output.say, name=name, grace_s=grace_s, kill_s=kill_s)
        copying.join(timeout=5.0)
        return code

    def _ended_early(self) -> int:
        self._output.say(f"ended before the run began ({self._wishes.why})")
        return self._wishes.code()


if __name__ == "__main__":
    sys.exit(main())
