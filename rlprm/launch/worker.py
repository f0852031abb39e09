"""The program of every other node: Ray joins the head, and joins again when it was cut off.

``python -m rlprm.launch.worker FOLDER [--name NAME] [--ip ADDRESS] [--address HEAD] [--stdin]``

It leaves when the run has ended, when its stdin closes, and on SIGTERM or Ctrl-C; then nothing of Ray is left on this
node. A run that is asked to end needs its nodes until it has finished its step and saved.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import cast

from rlprm.errors import ConfigError
from rlprm.launch import node, task
from rlprm.launch.lifeline import first_line
from rlprm.launch.processes import Wishes, adopt_orphans, bind_to_parent, sweep
from rlprm.launch.task import Task

AWAY_S = 900.0  # a head that does not answer for so long is gone
LOOK_S = 0.5
AGAIN_S = 2.0  # between two tries to join
SHORT_S = 30.0  # Ray that ends sooner has failed rather than been cut off
MAX_SHORT = 5
END_S = 3.0  # for Ray here: it would hand over its work for half a minute, to a head that is gone


def main(arguments: Sequence[str] | None = None) -> int:
    """Offer this node to the Ray of a launch until that has ended."""
    options = _parser().parse_args(arguments)
    bind_to_parent()
    wishes = Wishes(folder=None)
    wishes.on_signals()
    adopt_orphans()
    try:
        found = task.read(options.folder)
        given = first_line(cast(TextIOWrapper, sys.stdin), wishes) if options.stdin else {}
        os.chdir(found.directory)
        Worker(found, options, {**os.environ, **given}, wishes).run()
    except (ConfigError, OSError) as error:
        print(f"rlprm launch: node {options.name or os.uname().nodename}: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        sweep()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rlprm.launch.worker", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", help="of this node in Ray")
    parser.add_argument("--ip", help="address of this node for the others")
    parser.add_argument("--address", help="of Ray's head; otherwise it stands in the launch folder")
    parser.add_argument("--stdin", action="store_true", help="secrets come on stdin, and its end ends this program")
    return parser


class Worker:
    """One node that is not the head."""

    def __init__(self, found: Task, options: argparse.Namespace, given: dict[str, str], wishes: Wishes) -> None:
        self._task = found
        self._options = options
        self._wishes = wishes
        self._name = options.name
        token = given.get("RAY_AUTH_TOKEN") or task.token(found.path)
        self._environment = {**node.environment(found, token, given), **node.NO_METRICS}
        self._log = found.path / f"ray-{self._name or os.uname().nodename}.log"

    def run(self) -> None:
        """Join, and join again, until it is time to leave.

        Raises:
            ConfigError: the head does not answer, or Ray cannot run here.
        """
        short = 0
        while not self._leaves():
            address = self._head()
            if address is None:
                return
            began = time.monotonic()
            self._say(f"joins {address}")
            end = self._once(address)
            if self._leaves():
                self._say(f"leaves ({self._why()})")
                return
            short = short + 1 if time.monotonic() - began < SHORT_S else 0
            if short >= MAX_SHORT:
                raise ConfigError(f"Ray has ended {short} times in a row within {SHORT_S:.0f} s; the last time: {end}")
            self._say(f"Ray has ended here, joins again: {end}")
            self._pause(AGAIN_S * (1 + short))

    def _once(self, address: str) -> str:
        """Ray, until it ends or this node leaves; its last words."""
        options = node.worker_options(self._task, name=self._name, ip=self._options.ip, address=address)
        ray = node.RayNode(self._task.python, options, self._environment, self._log)
        try:
            ray.wait_ready(self._leaves)
            self._say("has joined")
            while ray.process.poll() is None and not self._leaves():
                time.sleep(LOOK_S)
        except ConfigError as error:
            return str(error)
        finally:
            ray.end(END_S)
        return ray.tail()

    def _head(self) -> str | None:
        """The head's address once it answers; None: time to leave.

        Raises:
            ConfigError: it has not answered for too long.
        """
        began, told = time.monotonic(), False
        while not self._leaves():
            address = self._options.address or self._written()
            if address is not None and node.answers(address):
                return address
            waited = time.monotonic() - began
            if waited > AWAY_S:
                what = (
                    f"Ray's head at {address}" if address else f"{self._task.path / task.HEAD}, which the head writes"
                )
                raise ConfigError(
                    f"waited {AWAY_S:.0f} s for {what}; look at {self._task.path / task.LOG}, and whether this node "
                    "sees the head's storage and network"
                )
            if waited > 5.0 and not told:
                self._say(f"waits for Ray's head ({address or 'not yet known'})")
                told = True
            self._pause(LOOK_S)
        return None

    def _written(self) -> str | None:
        try:
            return str(json.loads((self._task.path / task.HEAD).read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError, KeyError):
            return None

    def _leaves(self) -> bool:
        return self._wishes.check() or (self._task.path / task.EXIT).exists()

    def _why(self) -> str:
        return self._wishes.why or "the run has ended"

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._leaves():
            time.sleep(0.1)

    def _say(self, text: str) -> None:
        print(f"launch: node {self._name or os.uname().nodename} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
