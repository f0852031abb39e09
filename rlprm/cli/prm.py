"""``rlprm prm``."""

from __future__ import annotations

import argparse

from rlprm.checks import check_model_folder
from rlprm.cli import sft
from rlprm.cli.compose import composed
from rlprm.cli.train import composing, help_text
from rlprm.config import validated
from rlprm.config_prm import PrmConfig
from rlprm.errors import ConfigError
from rlprm.paths import recipes_dir
from rlprm.run.progress import Progress

OWN_HELP = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm prm`."""
    composing(parser)


def reads(key: str) -> bool:
    """Does PRM training use this key? Its learner and placement are those of `rlprm sft`.

    >>> reads("learner.lr"), reads("learner.epochs"), reads("solutions.path")
    (True, False, True)
    """
    return sft.reads(key)


def run(options: argparse.Namespace) -> int:
    """Train a PRM on labelled steps and write a Hugging Face folder."""
    if options.help:
        print(help_text("prm", options.config_dir))
        return 0
    for word in options.overrides:
        if word.lstrip("+").startswith("recipe="):
            _check_recipe(word.partition("=")[2])
    configuration = composed("prm", options.overrides, options.config_dir, reads)
    if options.cfg:
        print(configuration.annotated())
        return 0
    config: PrmConfig = validated(PrmConfig, configuration.values)
    check_model_folder("model.path", config.model.path)
    from rlprm.run.prm_training import train_prm

    metrics = train_prm(config, Progress(quiet=options.quiet))
    auc = metrics.get("prm/step_auc")
    told = "" if auc is None else f", AUC of held-out steps {auc:.4f}"
    print(f"wrote {config.output} after {config.steps} steps, loss {metrics['prm/loss']:.4f} nats per step{told}")
    return 0


def _check_recipe(name: str) -> None:
    """Raise where a recipe that exists says nothing of a PRM."""
    able = sorted(file.parent.name for file in recipes_dir().glob("*/prm.yaml"))
    if name not in able and (recipes_dir() / name).is_dir():
        raise ConfigError(
            f"recipe {name!r} has no prm.yaml (there are: {', '.join(able)}); to start from its model, give "
            f"model.path='${{recipe_dir:{name}}}/model'"
        )
