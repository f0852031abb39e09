"""``rlprm sft``."""

from __future__ import annotations

import argparse

from rlprm.checks_models import check_model_folder
from rlprm.cli.compose import composed, keeps
from rlprm.cli.train import composing, help_text
from rlprm.config import (
    LearnerSection,
    OptimizerSection,
    SftConfig,
    SftPlacement,
    TrainPlacement,
    validated,
)
from rlprm.run.progress import Progress

OWN_HELP = False
# Sections of which fine-tuning reads a part only: it has no PRM, no engine, and its batches are learnt from once.
PARTS = {"learner": (OptimizerSection, LearnerSection), "placement": (SftPlacement, TrainPlacement)}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm sft`."""
    composing(parser)


def reads(key: str) -> bool:
    """Does fine-tuning use this key of its configuration, whose groups are training's?

    >>> reads("learner.lr"), reads("learner.epochs"), reads("placement.engines"), reads("steps")
    (True, False, False, True)
    """
    section, *rest = key.split(".")
    return section not in PARTS or not rest or keeps(*PARTS[section], rest[0])


def run(options: argparse.Namespace) -> int:
    """Fine-tune and write a Hugging Face folder."""
    if options.help:
        print(help_text("sft", options.config_dir))
        return 0
    configuration = composed("sft", options.overrides, options.config_dir, reads)
    if options.cfg:
        print(configuration.annotated())
        return 0
    config: SftConfig = validated(SftConfig, configuration.values)
    if config.initial is None:
        check_model_folder("model.path", config.model.path)
    from rlprm.run.fine_tuning import fine_tune

    metrics = fine_tune(config, Progress(quiet=options.quiet))
    print(f"wrote {config.output} after {config.steps} steps, loss {metrics['sft/loss']:.4f} nats per token")
    return 0
