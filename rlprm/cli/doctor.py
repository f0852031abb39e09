"""``rlprm doctor``: is this environment fit to run a configuration?"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlprm.cli.compose import composed, parsed
from rlprm.cli.main import Parser
from rlprm.doctor.finding import Finding, failed, lines
from rlprm.run.preflight import connectable

OWN_HELP = False
HELP = """\
rlprm doctor [recipe=NAME] [key=value | group=option ...] [cluster=KIND cluster.key=value ...]

Is this environment fit to run it? One line each: ok, warn or fail, what was found, and the cure. Exit code 1 if anything
fails. Keys and groups are those of `rlprm train` (see rlprm train --help); without any, what holds for every run is examined.

  --address HOST:PORT   examine all nodes of a running Ray cluster (its token in RAY_AUTH_TOKEN); not given: this machine
  --quick               nothing that takes seconds: no all-reduce, and the engines are not compared
  --json                a list of objects: check, node, level, found, cure, seconds
  --config-dir DIR      a folder of your own groups and options
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm doctor`."""
    parser.add_argument("overrides", nargs="*", metavar="key=value | group=option")
    parser.add_argument("-h", "--help", action="store_true", help="what is examined, and how")
    parser.add_argument("--config-dir", type=Path, help="a folder of your own groups and options")
    parser.add_argument("--address", metavar="HOST:PORT", help="of a running Ray cluster")
    parser.add_argument("--quick", action="store_true", help="nothing that takes seconds per node")
    parser.add_argument("--json", action="store_true", help="a list of objects")


def run(options: argparse.Namespace) -> int:
    """Examine, print, and say by the exit code whether a run may start."""
    if options.help:
        print(HELP, end="")
        return 0
    mine, words = split(options.overrides)
    from rlprm.doctor.wanted import wanted

    config = configured("train", [*words, *_config_dir(options)]) if words else None
    asked = wanted(config, cluster=launched(mine))
    address = connectable(options.address or (None if config is None else config.placement.ray_address))
    if address is None:
        from rlprm.doctor.here import examine as examine_here

        found = examine_here(asked, quick=options.quick)
    else:
        from rlprm.run.preflight import examine

        found = examine(address, asked, quick=options.quick)
    print(text(found, as_json=options.json))
    return 1 if failed(found) else 0


def text(found: Sequence[Finding], *, as_json: bool) -> str:
    """As it is printed."""
    return json.dumps([each.plain() for each in found], indent=1) if as_json else "\n".join(lines(found))


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the way to launch, and those of the run.

    >>> split(["recipe=chain_arithmetic_cpu", "cluster=local", "cluster.port=6379"])
    (['cluster=local', 'cluster.port=6379'], ['recipe=chain_arithmetic_cpu'])
    """
    mine = {
        word for word, each in zip(words, parsed(words), strict=True) if each.key_or_group.split(".")[0] == "cluster"
    }
    return [word for word in words if word in mine], [word for word in words if word not in mine]


def launched(words: Sequence[str]) -> Any:
    """The section of ``cluster/``; None where none was asked for."""
    if not words:
        return None
    from rlprm.config import validated
    from rlprm.config_cluster import LaunchConfig

    return validated(LaunchConfig, composed("launch", words).values).cluster


def configured(name: str, words: Sequence[str]) -> Any:
    """The validated configuration of ``rlprm NAME WORDS``; None for a command that has none.

    Raises:
        ConfigError: as the command itself would say it.
    """
    from rlprm import config as schemas
    from rlprm.config_dpo import DpoConfig
    from rlprm.config_prm import PrmConfig

    kinds: dict[str, Any] = {
        "train": schemas.TrainConfig,
        "evaluate": schemas.EvaluateConfig,
        "sft": schemas.SftConfig,
        "dpo": DpoConfig,
        "prm": PrmConfig,
    }
    if name == "ablate":
        return configured("train", without_sweeps(words))
    if name not in kinds:
        return None
    command = importlib.import_module(f"rlprm.cli.{name}")
    parser = Parser(prog=f"rlprm {name}", add_help=False, allow_abbrev=False)
    command.arguments(parser)
    options = parser.parse_intermixed_args(list(words))
    reads = getattr(command, "reads", None)
    arguments = [name, options.overrides, options.config_dir, *([] if reads is None else [reads])]
    return schemas.validated(kinds[name], composed(*arguments).values)


def without_sweeps(words: Sequence[str]) -> list[str]:
    """What all runs of an ablation have in common: no sweeps, none of the ablation's own keys and options.

    >>> without_sweeps(["recipe=chain_arithmetic_cpu", "normalizer=raw,group_zscore", "seeds=3", "--parallel", "2", "steps=2"])
    ['recipe=chain_arithmetic_cpu', 'steps=2']
    """
    from rlprm.cli import ablate

    parser = Parser(prog="rlprm ablate", add_help=False, allow_abbrev=False)
    ablate.arguments(parser)
    options = parser.parse_intermixed_args(list(words))
    own = [key for key in ablate.own_keys() if key != "name"]
    return [
        word
        for word, each in zip(options.overrides, parsed(options.overrides), strict=True)
        if not each.is_sweep_override() and each.key_or_group.split(".")[0] not in own
    ] + _config_dir(options)


def _config_dir(options: argparse.Namespace) -> list[str]:
    return [] if options.config_dir is None else ["--config-dir", str(options.config_dir)]
