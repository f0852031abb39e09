"""``rlprm dpo``."""

from __future__ import annotations

import argparse

from rlprm.checks_models import check_model_folder
from rlprm.cli import sft
from rlprm.cli.compose import composed
from rlprm.cli.train import composing, help_text
from rlprm.config import validated
from rlprm.config_dpo import DpoConfig
from rlprm.errors import ConfigError
from rlprm.run.progress import Progress

OWN_HELP = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm dpo`."""
    composing(parser)


def reads(key: str) -> bool:
    """Does preference optimisation use this key? Its learner and placement are those of `rlprm sft`.

    >>> reads("learner.lr"), reads("learner.epochs"), reads("beta")
    (True, False, True)
    """
    return sft.reads(key)


def run(options: argparse.Namespace) -> int:
    """Learn from pairs of stored rollouts and write a Hugging Face folder."""
    if options.help:
        print(help_text("dpo", options.config_dir))
        return 0
    for word in options.overrides:
        if word.lstrip("+").startswith("recipe="):
            raise ConfigError(
                f"{word}: recipes are written for runs, and rlprm dpo learns from what runs stored; use runs="
            )
    configuration = composed("dpo", options.overrides, options.config_dir, reads)
    if options.cfg:
        print(configuration.annotated())
        return 0
    config: DpoConfig = validated(DpoConfig, configuration.values)
    check_model_folder("model.path", config.model.path)
    from rlprm.run.preference import learn_preferences

    progress = Progress(quiet=options.quiet)
    metrics = learn_preferences(config, progress)
    print(
        f"wrote {config.output} after {config.steps} steps, loss {metrics['dpo/loss']:.4f}, "
        f"{metrics['dpo/accuracy']:.0%} of the pairs in order"
    )
    return 0
