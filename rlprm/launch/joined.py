"""The entrypoint of a job in a Ray cluster that runs already: makes the launch folder there, then it is its head.

``python -m rlprm.launch.joined FOLDER``. The task comes in the variable RLPRM_TASK, because nothing of the machine from
which it was launched need be visible here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rlprm.errors import ConfigError
from rlprm.launch import head, task
from rlprm.launch.processes import this_python

VARIABLE = "RLPRM_TASK"


def carried(found: task.Task) -> str:
    """The task as text; :func:`main` reads it."""
    return json.dumps(asdict(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """The run's exit code."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / task.STOP).unlink(missing_ok=True)
        task.put(path, task.TASK, os.environ.pop(VARIABLE))
        found = task.read(path)
        # where the job was sent to, and which interpreter runs it, may be known only here
        here = replace(found, directory=found.directory or os.getcwd(), python=found.python or this_python())
        task.put(path, task.TASK, json.dumps(asdict(here), indent=1) + "\n")
    except (OSError, KeyError, ConfigError) as error:
        print(
            f"rlprm launch: the launch folder {folder} cannot be made on the cluster's head ({error})", file=sys.stderr
        )
        return 1
    return head.main([folder, "--joined"])


if __name__ == "__main__":
    sys.exit(main())
