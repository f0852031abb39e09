"""The command inside a launch: checked as it would check itself, and what the launch must know of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprm.cli import ablate, dpo, evaluate, prm, sft, train
from rlprm.cli.compose import composed, parsed
from rlprm.cli.main import Parser
from rlprm.cli.status import usual_output_dir
from rlprm.config import EvaluateConfig, SftConfig, TrainConfig, validated
from rlprm.config_base import Section
from rlprm.config_dpo import DpoConfig
from rlprm.config_prm import PrmConfig
from rlprm.errors import ConfigError

SPARE_CPUS = 2  # for judges and what Ray itself runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """A command that can be run."""

    command: tuple[str, ...]
    name: str  # for the launch's id
    nodes: int
    cpus: int  # logical ones that a node must have for all of the run's processes
    object_store_bytes: int | None
    run: str  # folder or file that it writes; "" where it only prints
    output_dir: str  # beside which the launches stand


def inner(name: str, words: Sequence[str], config_dir: Path | None) -> Inner:
    """Check ``rlprm NAME WORDS``.

    Raises:
        ConfigError: what that command would refuse itself, and what only the launch may set.
    """
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    given = list(words[:first])
    for word, override in zip(given, parsed(given), strict=True):
        if override.key_or_group == "placement.ray_address":
            raise ConfigError(
                f"{word}: rlprm launch sets the address itself; for a cluster that runs use cluster=existing"
            )
    if name == "train" and not any(word.partition("=")[0].lstrip("+~") == "resume" for word in given):
        given.append("resume=auto")  # so that the same command continues after a failure
    arguments = [*given, *words[first:]]
    if config_dir is not None:
        arguments = ["--config-dir", str(config_dir.absolute()), *arguments]
    parser = Parser(prog=f"rlprm {name}", add_help=False, allow_abbrev=False)
    COMMANDS[name].arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    for option in ("help", "cfg", "dry_run"):
        if getattr(options, option, None):
            raise ConfigError(f"--{option.replace('_', '-')} runs nothing; use rlprm {name} for it")
    facts: dict[str, Any] = COMMANDS[name].facts(options)
    return Inner(command=(name, *arguments), **facts)


def _train(options: argparse.Namespace) -> dict[str, Any]:
    seeds = train.parse_seeds(options.seeds)
    if seeds is not None:
        train.refuse_two_seeds(options.seeds, options.overrides)
    config: TrainConfig = validated(TrainConfig, composed("train", options.overrides, options.config_dir).values)
    run = Path(config.output_dir) / config.name
    return {
        **_placed(config),
        "name": config.name,
        "run": str(run if seeds is not None else run / f"seed{config.seed}"),
        "output_dir": config.output_dir,
    }


def _ablate(options: argparse.Namespace) -> dict[str, Any]:
    from rlprm.run.ablation import AblationConfig

    mine, words = ablate.split_own(options.overrides, ablate.own_keys())
    own: AblationConfig = validated(AblationConfig, composed("ablate", mine, options.config_dir).values)
    explicit = ablate.explicit_cells(options.cell, options.cells)
    cells = ablate.cells_of(words, explicit, stream=own.stream, config_dir=options.config_dir)
    cells.named(options.baseline)
    runs = ablate.planned(cells, own, options.config_dir)
    placed = [_placed(run.config) for run in runs]
    return {
        "nodes": max(each["nodes"] for each in placed),
        "cpus": options.parallel * max(each["cpus"] for each in placed),
        "object_store_bytes": placed[0]["object_store_bytes"],
        "name": own.name,
        "run": str(runs[0].folder.parents[1]),
        "output_dir": str(runs[0].folder.parents[2]),
    }


def _simple(name: str, schema: type[Section], reads: Callable[[str], bool]) -> Callable[..., dict[str, Any]]:
    def facts(options: argparse.Namespace) -> dict[str, Any]:
        config: Any = validated(schema, composed(name, options.overrides, options.config_dir, reads).values)
        # of these only runs have an output_dir; their launches stand beside the runs'
        output_dir = usual_output_dir()
        run = "" if config.output is None else str(config.output)
        return {
            **_placed(config),
            "name": f"{name}-{Path(run).stem}" if run else name,
            "run": run,
            "output_dir": output_dir,
        }

    return facts


def _placed(config: Any) -> dict[str, Any]:
    from rlprm.run.factories import own_engines

    placement = config.placement
    processes = placement.policy_ranks + placement.prm_ranks + placement.engines
    if isinstance(config, TrainConfig):
        processes += len(own_engines(config))
    return {
        "nodes": placement.nodes,
        "cpus": processes + SPARE_CPUS,
        "object_store_bytes": placement.object_store_bytes,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Command:
    arguments: Callable[[argparse.ArgumentParser], None]
    facts: Callable[[argparse.Namespace], dict[str, Any]]


COMMANDS = {
    "train": _Command(arguments=train.arguments, facts=_train),
    "ablate": _Command(arguments=ablate.arguments, facts=_ablate),
    "sft": _Command(arguments=sft.arguments, facts=_simple("sft", SftConfig, sft.reads)),
    "dpo": _Command(arguments=dpo.arguments, facts=_simple("dpo", DpoConfig, dpo.reads)),
    "prm": _Command(arguments=prm.arguments, facts=_simple("prm", PrmConfig, prm.reads)),
    "evaluate": _Command(arguments=evaluate.arguments, facts=_simple("evaluate", EvaluateConfig, evaluate.reads)),
}
