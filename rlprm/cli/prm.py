"""``rlprm prm``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from rlprm.checks_models import check_model_folder
from rlprm.cli import sft
from rlprm.cli.compose import composed
from rlprm.cli.train import composing, help_text
from rlprm.config import validated
from rlprm.config_prm import PrmConfig
from rlprm.errors import ConfigError
from rlprm.parts import locate
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
    _check_format(config.format)
    check_model_folder("model.path", config.model.path)
    from rlprm.run.prm_training import train_prm

    metrics = train_prm(config, Progress(quiet=options.quiet))
    auc = metrics.get("prm/step_auc")
    told = "" if auc is None else f", AUC of held-out steps {auc:.4f}"
    print(f"wrote {config.output} after {config.steps} steps, loss {metrics['prm/loss']:.4f} nats per step{told}")
    return 0


def _check_recipe(name: str) -> None:
    """Raise where a recipe that exists says nothing of a PRM."""
    able = sorted(file.parent.name for file in recipes_dir().glob("*/step_labels.yaml"))
    if name not in able and (recipes_dir() / name).is_dir():
        raise ConfigError(
            f"recipe {name!r} has no step_labels.yaml (there are: {', '.join(able)}); to start from its model, give "
            f"model.path='${{recipe_dir:{name}}}/model'"
        )


def _check_format(part: Mapping[str, Any]) -> None:
    """Raise where a format reads another head than the one that is trained."""
    fixed = part.get("head") or getattr(locate(part["_target_"]), "head", None)
    head = fixed or ("classifier" if part.get("good") is None else "vocabulary")
    if head != "classifier":
        raise ConfigError(
            f"format reads the {head} head of a model, and rlprm prm trains a classification head; use "
            "prm_format@format=token_classification, qwen_prm, reasonflux or fin_prm"
        )
