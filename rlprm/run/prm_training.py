"""Training a process reward model from start to end: labelled solutions, the learner, a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from rlprm.config_prm import PrmConfig
from rlprm.data.labelled import Labelled
from rlprm.data.tokenizer import load_tokenizer
from rlprm.engine.step_labels import StepExample
from rlprm.errors import ConfigError
from rlprm.parts import made
from rlprm.run import factories
from rlprm.run.fine_tuning import learnt, refuse_full
from rlprm.run.progress import Progress
from rlprm.sources.prm_formats import Format


def train_prm(config: PrmConfig, progress: Progress) -> dict[str, float]:
    """Train on labelled steps, write the folder `config.output`, and return the last measurements.

    Raises:
        ConfigError: the output folder is not empty, no labelled step, or a format that the tokenizer cannot write.
        DataError: labelled solutions that cannot be read.
    """
    refuse_full(config.output)
    form: Format = made(config.format)(load_tokenizer(config.model.path))
    with progress.stage("read solutions"):
        given = written(made(config.solutions)(), form)
        held_out = [] if config.held_out is None else written(made(config.held_out)(), form)
    progress.say(f"{len(given)} solutions to learn from, {wrong_share(given):.0%} of their labelled steps wrong")
    return learnt(config, partial(learner, config, given, held_out), name="prm", told="prm/loss", progress=progress)


def written(solutions: Sequence[Labelled], form: Format) -> list[StepExample]:
    """The solutions as the PRM reads them.

    Raises:
        ConfigError: no solution has a labelled step.
    """
    examples = []
    for solution in solutions:
        reading = form.read(solution.question, solution.steps)
        if any(label >= 0 for label in solution.labels):
            examples.append(StepExample(tokens=reading.tokens, positions=reading.positions, labels=solution.labels))
    if not examples:
        raise ConfigError("no solution has a step that is labelled right or wrong; check the labels")
    return examples


def wrong_share(examples: Sequence[StepExample]) -> float:
    """Wrong steps among those with a label.

    >>> wrong_share([StepExample(tokens=(1, 2), positions=(0, 1), labels=(0, -1))])
    1.0
    """
    labels = [label for example in examples for label in example.labels if label >= 0]
    return labels.count(0) / len(labels)


def learner(config: PrmConfig, given: Sequence[StepExample], held_out: Sequence[StepExample], rank: int) -> Any:
    """The PRM's learner on one rank; its head starts at 0 unless the initial model has one."""
    from rlprm.engine.learner import Learner
    from rlprm.engine.model import load_value
    from rlprm.engine.step_labels import StepLabels

    model = load_value(
        config.model.path,
        config.model.dtype,
        attention=config.model.attention,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    return StepLabels(
        Learner(model, factories.learner_settings(config, config.learner, total_steps=config.steps)),
        given,
        held_out,
        factories.turns(config, rank),
    )
