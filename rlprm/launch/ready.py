"""What stands between Ray and the run: all nodes are there, and the checks pass.

A program of its own, so that the head holds no connection to Ray while the run goes on:
``python -m rlprm.launch.ready FOLDER ADDRESS``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from rlprm.actors.cluster import cluster
from rlprm.actors.nodes import wait_for_nodes
from rlprm.doctor.finding import lines
from rlprm.errors import RlprmError
from rlprm.launch import task
from rlprm.launch.processes import INTERRUPTED

NAMES = "RLPRM_NODES"


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the run may start. What is wrong is printed."""
    folder, address = sys.argv[1:] if arguments is None else arguments
    found = task.read(folder)
    try:
        with cluster(address=address, num_actors=0, gpus=0.0, object_store_bytes=None, working_dir=found.directory):
            # a queue that chooses the nodes itself says their names only when the job starts
            expected = os.environ[NAMES].split(",") if NAMES in os.environ else found.names
            joined = wait_for_nodes(found.nodes, timeout_s=found.wait_s, say=say, expected=expected)
            say("nodes: " + ", ".join(f"{each.name} ({each.address})" for each in joined))
            findings = [] if found.preflight == "off" else checked(address, found)
    except KeyboardInterrupt:
        return INTERRUPTED
    except RlprmError as error:
        say(f"error: {error}")
        return 1
    for line in lines(findings) if findings else ():
        say(line)
    failed = sum(finding.level == "fail" for finding in findings)
    if failed:
        say(f"error: {failed} checks of the preflight failed; cure them, or leave them out with cluster.preflight=off")
    return 1 if failed else 0


def checked(address: str, found: task.Task) -> Sequence[Any]:
    """The preflight's findings."""
    from rlprm.run.preflight import preflight  # late: the checks bring all engines with them

    say(f"preflight ({found.preflight})")
    return preflight(address, found)


def say(text: str) -> None:
    """One line of the launch."""
    print(f"launch: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
