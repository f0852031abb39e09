"""A run under the supervisor that loses something in the middle of a step; also the driver of the test with two nodes."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from rich.console import Console

from rlprm import driver
from rlprm.batch import Row
from rlprm.run import training
from rlprm.run.progress import Progress
from rlprm.run.supervisor import supervised
from tests.integration.support import PRM, TRANSFORMERS, Done, configured

SETTINGS = (*PRM, *TRANSFORMERS, "steps=4", "checkpoint.every=2", "checkpoint.keep_last=2", "tracker.rollout_groups=2",
            "placement.policy_ranks=2", "policy.zero_stage=2", "placement.collective_timeout_s=60")  # fmt: skip


def restarted(
    folder: Path, model: str, disturb: Callable[[driver.Run], None], at: int, *overrides: str
) -> tuple[Done, int]:
    """The run that loses what ``disturb`` takes away, once, in the middle of step ``at``; and how often it started."""
    config, made = configured(folder, model, *SETTINGS, *overrides)
    screen, loop, starts = io.StringIO(), driver.train, 0
    done = Done(folder=training.run_folder(config))

    def watched(run: driver.Run) -> None:
        nonlocal starts
        starts += 1
        step, first = run.first_step - 1, starts == 1

        def select(rows: Sequence[Row], scores: Any) -> Any:
            nonlocal step
            step += 1
            if first and step == at:
                disturb(run)
            return run.select(rows, scores)

        loop(replace(run, select=select))
        for group in filter(None, (run.policy.group, getattr(run.reference, "group", None))):
            group.get(group.all(lambda worker: worker.export, str(done.exported)), "export")

    with patch.object(driver, "train", watched):
        try:
            supervised(config, made, Progress(Console(file=screen, width=400), patience=1e9))
        finally:
            print(screen.getvalue(), flush=True)
    done.screen = screen.getvalue()
    return done, starts


def process_ids(workers: Sequence[Any]) -> list[int]:
    """Of actors on this machine."""
    import ray  # late: imported before rlprm.actors, Ray would not know of its authentication

    return ray.get([each.__ray_call__.remote(lambda self: os.getpid()) for each in workers], timeout=60)


def main(address: str, model: str, folder: Path, *overrides: str) -> None:
    """On a cluster: say when the step is under way, and wait until the test has taken a node away."""

    def wait(run: driver.Run) -> None:
        pid = process_ids(run.policy.group.workers)[1]
        (folder / "under_way").touch()
        deadline = time.monotonic() + 60
        # a process outlives its node's raylet by a moment, and steps are short here
        while not (folder / "taken").exists() or psutil.pid_exists(pid):
            assert time.monotonic() < deadline, "nobody took the node away"
            time.sleep(0.1)

    restarted(folder, model, wait, 3, f"placement.ray_address={address}", *overrides)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
