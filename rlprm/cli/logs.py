"""``rlprm logs``: what a launched run prints."""

from __future__ import annotations

import argparse
import sys

from rlprm.cli.status import naming, place
from rlprm.launch.launches import chosen

OWN_HELP = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm logs`."""
    naming(parser, "the latest")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")


def run(options: argparse.Namespace) -> int:
    """Print it."""
    found = chosen(*place(options.words))
    for piece in found.logs(options.follow):
        sys.stdout.write(piece)
        sys.stdout.flush()
    return 0
