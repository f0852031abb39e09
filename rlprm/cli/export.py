"""``rlprm export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlprm.run.progress import Progress

OWN_HELP = True


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm export`."""
    parser.add_argument("run", type=Path, help="folder of a run, for example runs/NAME/seed0")
    parser.add_argument("output", type=Path, help="folder to write, new or empty")
    parser.add_argument(
        "--wandb", action="store_true", help="keep them as an artifact of the run on Weights & Biases too"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(options: argparse.Namespace) -> int:
    """Write a Hugging Face folder for each model of the newest intact checkpoint."""
    from rlprm.run.exporting import export, send

    exported = export(options.run, options.output, Progress(quiet=options.quiet))
    for folder in exported.folders:
        print(f"wrote {folder} (step {exported.step} of {options.run})")
    if options.wandb:
        print(f"logged them to Weights & Biases ({send(options.run, exported)})")
    return 0
