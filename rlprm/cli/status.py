"""``rlprm status``: what was launched, and how it stands."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from rlprm.errors import ConfigError
from rlprm.launch import task
from rlprm.launch.launches import chosen, launches, rows
from rlprm.paths import conf_dir

OWN_HELP = True
COLUMNS = ("id", "kind", "state", "since", "nodes", "exit_code", "detail")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm status`."""
    naming(parser, "the latest launches")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--all", action="store_true", help="all of them, not the latest ten")


def naming(parser: argparse.ArgumentParser, otherwise: str) -> None:
    """How a launch is named."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="ID | output_dir=DIR",
        help=f"a launch's id or its beginning (without: {otherwise}); the folder that has its runs",
    )


def run(options: argparse.Namespace) -> int:
    """A table; one launch where it is named."""
    folder, wanted = place(options.words)
    if wanted is not None:
        found = [chosen(folder, wanted)]
    else:
        every = launches(folder)
        found = every if options.all else every[:10]
    shown = list(rows(found))
    if options.json:
        print(json.dumps(shown, indent=1))
        return 0
    if not shown:
        print(f"no launch in {folder}; rlprm launch starts one")
        return 0
    made = Table(*[column.replace("_", " ") for column in COLUMNS], box=None, pad_edge=False)
    for row in shown:
        made.add_row(*["" if row[column] is None else str(row[column]) for column in COLUMNS])
    # as wide as it is: ids are copied from here
    Console(width=400).print(made, soft_wrap=True)
    if wanted is not None:
        print(f"run: {shown[0]['run'] or '(none)'}\nfolder: {folder / str(shown[0]['id'])}")
    return 0


def place(words: Sequence[str]) -> tuple[Path, str | None]:
    """The folder of launches, and the id that is asked for.

    Raises:
        ConfigError: something else is asked for.
    """
    output_dir, wanted = None, None
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key != "output_dir":
            raise ConfigError(f"{word}: expected a launch's id, or output_dir=DIR")
        if equals:
            output_dir = value
        elif wanted is not None:
            raise ConfigError(f"{wanted} and {word}: name one launch")
        else:
            wanted = word
    return Path(os.path.abspath(output_dir or usual_output_dir())) / task.LAUNCHES, wanted


def usual_output_dir() -> str:
    """The folder of runs where nobody says another one."""
    return str(yaml.safe_load((conf_dir() / "train.yaml").read_text(encoding="utf-8"))["output_dir"])
