"""``rlprm stop``: end a launched run."""

from __future__ import annotations

import argparse

from rlprm.cli.status import naming, place
from rlprm.errors import ConfigError
from rlprm.launch.backends import backend
from rlprm.launch.launches import chosen

OWN_HELP = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm stop`."""
    naming(parser, "the latest")


def run(options: argparse.Namespace) -> int:
    """Let the run finish its step, save and end, as one Ctrl-C would, and wait until it has.

    Raises:
        ConfigError: its cluster cannot be asked now.
    """
    found = chosen(*place(options.words))
    now = found.status()
    if now.state == "unknown":
        raise ConfigError(
            f"{found.task.id} was not asked to end, because its cluster gives no answer ({now.detail}). It may go on; the "
            "same command tries again"
        )
    if now.state in ("waiting", "running"):
        print(f"stopping {found.task.id}", flush=True)
        backend(found.task.kind).stop(found.task)
        now = found.status()
    code = "" if now.exit_code is None else f", exit code {now.exit_code}"
    print(f"{found.task.id}: {now.state}{code}")
    return 0
