"""A launcher in the background: ``python -m rlprm.launch.background FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlprm.errors import ConfigError, RlprmError
from rlprm.launch import launcher, task
from rlprm.launch.backends import backend


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch what the folder says; what the run prints stands in its log."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    found = task.read(folder)
    return attached(found, launcher.read_cluster(found.path))


def attached(found: task.Task, cluster: object) -> int:
    """Launch from this process; an exit code is left where nothing goes on.

    Raises:
        ConfigError: it could not be launched.
        WorkerLost: it was, and is out of sight now.
    """
    launcher.sign(found)
    try:
        return backend(found.kind).launch(found, cluster, say)
    except ConfigError:
        refused(found)
        raise


def refused(found: task.Task) -> None:
    """The launch has failed: leave an exit code, unless a job may go on without this process."""
    if task.exit_code(found.path) is None and not (found.path / launcher.SUBMITTED).exists():
        task.put(found.path, task.EXIT, "1\n")


def say(text: str) -> None:
    """One line of the launcher."""
    print(f"launch: {text}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RlprmError as error:
        print(f"rlprm launch: {error}", file=sys.stderr)
        sys.exit(1)
