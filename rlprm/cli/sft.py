"""``rlprm sft``."""

from __future__ import annotations

import argparse

from rlprm.cli.compose import composed
from rlprm.cli.train import composing, help_text
from rlprm.config import SftConfig, validated
from rlprm.run.progress import Progress

OWN_HELP = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm sft`."""
    composing(parser)


def run(options: argparse.Namespace) -> int:
    """Fine-tune and write a Hugging Face folder."""
    if options.help:
        print(help_text("sft", options.config_dir))
        return 0
    configuration = composed("sft", options.overrides, options.config_dir)
    if options.cfg:
        print(configuration.annotated())
        return 0
    config = validated(SftConfig, configuration.values)
    from rlprm.run.fine_tuning import fine_tune

    metrics = fine_tune(config, Progress(quiet=options.quiet))
    print(f"wrote {config.output} after {config.steps} steps, loss {metrics['sft/loss']:.4f} nats per token")
    return 0
