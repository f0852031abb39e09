"""``rlprm evaluate``."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from rlprm.cli.compose import composed, keeps
from rlprm.cli.train import composing, help_text
from rlprm.config import (
    Data,
    EvaluateConfig,
    EvaluatePlacement,
    HeldOut,
    Model,
    SampledModel,
    TrainPlacement,
    validated,
)
from rlprm.errors import ConfigError
from rlprm.run.progress import Progress

if TYPE_CHECKING:
    from rlprm.run.evaluating import Measured

OWN_HELP = False
# Sections of which evaluation reads a part only: training's say more than an engine needs.
PARTS = {"model": (SampledModel, Model), "data": (HeldOut, Data), "placement": (EvaluatePlacement, TrainPlacement)}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm evaluate`."""
    composing(parser)


def reads(key: str) -> bool:
    """Does evaluation use this key of training's configuration?

    >>> reads("model.path"), reads("model.attention"), reads("policy.lr"), reads("data.template.format")
    (True, False, False, True)
    """
    section, *rest = key.split(".")
    if section not in EvaluateConfig.model_fields:
        return False
    return section not in PARTS or not rest or keeps(*PARTS[section], rest[0])


def run(options: argparse.Namespace) -> int:
    """Measure, print a table, and write the JSON file where `output` names one."""
    if options.help:
        print(help_text("evaluate", options.config_dir, only={*EvaluateConfig.model_fields, "recipe"}))
        return 0
    configuration = composed("evaluate", options.overrides, options.config_dir, reads)
    if options.cfg:
        print(configuration.annotated())
        return 0
    config: EvaluateConfig = validated(EvaluateConfig, configuration.values)
    output = None if config.output is None else Path(config.output)
    if output is not None:
        writable(output)
    from rlprm.run.evaluating import evaluate

    found = evaluate(config, Progress(quiet=options.quiet))
    console = Console()
    for name in dict.fromkeys(each.source for each in found):
        console.print(f"{config.model.path} on {name}", style="bold", soft_wrap=True, highlight=False, markup=False)
        console.print(table([each for each in found if each.source == name]))
    if output is not None:
        output.write_text(json.dumps(document(config, configuration.values, found), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {output}")
    return 0


def writable(output: Path) -> None:
    """Refuse a result file that cannot be written or would replace one, before an hour of sampling.

    Raises:
        ConfigError: it exists, or its folder does not.
    """
    if output.exists():
        raise ConfigError(f"output {output} exists already; choose another file, or remove it")
    if not output.parent.is_dir():
        raise ConfigError(f"output {output}: there is no folder {output.parent}; make it first")


def table(found: Sequence[Measured]) -> Table:
    """One row per temperature of one evaluation set; mean length in tokens, ``absent``: responses without verdict."""
    size = max(each.samples for each in found)
    out = Table()
    for column in ("temp.", "samples", "accuracy", f"pass@{size}", "absent", "length", "cut off", "steps"):
        out.add_column(column, justify="right", no_wrap=True)
    for each in found:
        short = {re.sub(rf"val-(core|aux)/{re.escape(each.source)}/", "", k): v for k, v in each.metrics.items()}
        accuracy = short.get("accuracy/greedy", short.get(f"accuracy/mean@{each.samples}", math.nan))
        solved = short.get(f"accuracy/pass@{each.samples}")
        out.add_row(
            "greedy" if each.temperature == 0 else f"{each.temperature:g}",
            str(each.samples),
            "no verdicts" if math.isnan(accuracy) else f"{accuracy:.1%}",
            "" if solved is None else f"{solved:.1%}",
            f"{short['frac_absent']:.1%}",
            f"{short['response_length/mean']:.1f}",
            f"{short['response_length/clip_ratio']:.1%}",
            f"{short['process_steps/mean']:.1f}",
        )
    return out


def document(config: EvaluateConfig, values: Any, found: Sequence[Measured]) -> dict[str, Any]:
    """What the JSON file holds: results under the names that training logs, and the configuration behind them."""
    results = [
        {
            "source": each.source,
            "temperature": each.temperature,
            "samples": each.samples,
            "metrics": {name: None if math.isnan(value) else value for name, value in each.metrics.items()},
        }
        for each in found
    ]
    return {"model": config.model.path, "seed": config.seed, "results": results, "config": dict(values)}
