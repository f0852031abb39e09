"""``rlprm plan``: what a configuration needs, from the configuration alone."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlprm.cli.compose import composed, parsed
from rlprm.config import TrainConfig, validated
from rlprm.config_cluster import LaunchConfig
from rlprm.errors import ConfigError
from rlprm.paths import recipes_dir
from rlprm.planning.hardware import Hardware, of_node, of_recipe, this_machine

OWN_HELP = False

HELP = """\
rlprm plan [key=value | group=option ...] [cluster=KIND] [options]

What a run needs, from its configuration alone: seats, memory part by part, batch, time of a step. Nothing is started and
no weights are read. It takes what `rlprm train` takes. 0 where the run fits; 1 where it does not, with the nearest change
that does.

hardware
  cluster=KIND cluster.node.gpu=NAME cluster.node.gpus=N   nodes of a cluster (names: cluster/hardware/gpus.yaml)
  without cluster=: what the recipe's expected.json names; on CPU, machines like this one

options
  --shape NAME          a model's shape (cluster/shapes/), where there is no folder with a config.json
  --shape KEY=NAME      of one model of several, for example streams.process.source.model=qwen2.5-7b
  --response-tokens N   mean length of a response, for times (if not given: half of the longest)
  --measure             measure learners and engine here, against the plan (CPU)
  --json                the plan as JSON
  --config-dir DIR      a folder of your own groups and options

examples
  rlprm plan recipe=prime_eurus2_7b
  rlprm plan recipe=prime_eurus2_7b cluster=local cluster.node.gpu=H200-141GB cluster.node.gpus=4
  rlprm plan method=prime_as_written placement=cpu model.path=Qwen/Qwen2.5-0.5B

rlprm train --help lists groups, options and keys of the run.
"""
PLAIN = ("measured", "reported", "not yet run")  # statuses of a recipe that say nothing about how it can be run


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm plan`."""
    parser.add_argument("overrides", nargs="*", metavar="key=value | group=option")
    parser.add_argument("-h", "--help", action="store_true", help="options and examples")
    parser.add_argument("--config-dir", type=Path, help="a folder of your own groups and options")
    parser.add_argument("--json", action="store_true", help="the plan as JSON")
    parser.add_argument("--shape", action="append", default=[], help="NAME, or KEY=NAME, of cluster/shapes/")
    parser.add_argument("--response-tokens", type=int, help="mean length of a response, for times (default: half)")
    parser.add_argument(
        "--measure", action="store_true", help="measure learners and engine here, against the plan (CPU)"
    )


def run(options: argparse.Namespace) -> int:
    """0 where the run fits, 1 where it does not."""
    if options.help:
        print(HELP, end="")
        return 0
    about_cluster, rest = split(options.overrides)

    def configured(further: Sequence[str]) -> TrainConfig:
        found: TrainConfig = validated(TrainConfig, composed("train", [*rest, *further], options.config_dir).values)
        return found

    config = configured([])
    from rlprm.planning.plan import as_json, made_plan, shapes_for
    from rlprm.planning.report import report
    from rlprm.planning.search import gpus_that_fit, nearest, why_not

    if options.response_tokens is not None and options.response_tokens < 1:
        raise ConfigError(f"--response-tokens is {options.response_tokens}; expected 1 or more")
    shapes = shapes_for(config, chosen_shapes(options.shape))
    hardware = hardware_of(about_cluster, rest, config)
    plan = made_plan(config, shapes, hardware, options.response_tokens)
    change = None if plan.fits else nearest(config, shapes, hardware, configured)
    others = [] if plan.fits or hardware.gpu is None else gpus_that_fit(config, shapes, hardware)
    searched = plan.layout is None and change is None and hardware.gpu is not None
    more = {
        "why": why_not(config, shapes, hardware) if searched else None,
        "status": _status(_expected(rest)),
    }
    made = json.dumps(as_json(plan, change, others, **more), indent=1) if options.json else None
    print(made or report(plan, change, others, **more))
    if options.measure and plan.layout is not None:
        from rlprm.planning.measure import compared

        with tempfile.TemporaryDirectory(prefix="rlprm-measure-") as logs:
            print("\n".join(compared(config, plan.layout, Path(logs))))
    return 0 if plan.fits else 1


def split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the cluster, and those of the run.

    >>> split(["recipe=a", "cluster=slurm", "cluster.node.gpu=H100-80GB"])
    (['cluster=slurm', 'cluster.node.gpu=H100-80GB'], ['recipe=a'])
    """
    keys = {line: override.key_or_group for line, override in zip(overrides, parsed(overrides), strict=True)}
    cluster = [line for line in overrides if keys[line].partition(".")[0] == "cluster"]
    return cluster, [line for line in overrides if line not in cluster]


def hardware_of(about_cluster: Sequence[str], rest: Sequence[str], config: TrainConfig) -> Hardware:
    """The cluster's nodes where one is given; else the recipe's hardware; else, on CPU, machines like this one.

    Raises:
        ConfigError: nothing says what GPUs there are.
    """
    nodes = config.placement.nodes
    if about_cluster:
        launch: LaunchConfig = validated(LaunchConfig, composed("launch", about_cluster).values)
        return of_node(launch.cluster.node, nodes, f"cluster={launch.cluster.kind}")
    recipe, said = _expected(rest)
    if "hardware" in said:
        return of_recipe(recipe, said["hardware"], nodes)
    if config.placement.device == "cpu":
        return this_machine(nodes)
    raise ConfigError(
        "nothing says what GPUs the run would have; give a node, for example cluster=local cluster.node.gpu=H100-80GB "
        "cluster.node.gpus=8 cluster.node.cpus=96 cluster.node.memory_gb=1000"
    )


def _expected(overrides: Sequence[str]) -> tuple[str, Mapping[str, Any]]:
    """The recipe that is named ("": none), and its expected.json."""
    recipe = next((str(each.value()) for each in parsed(overrides) if each.key_or_group == "recipe"), "")
    file = recipes_dir() / recipe / "expected.json"
    return recipe, json.loads(file.read_text(encoding="utf-8")) if recipe and file.is_file() else {}


def _status(expected: tuple[str, Mapping[str, Any]]) -> str | None:
    """What a recipe says that no number of the plan shows.

    >>> _status(("a", {"status": "not yet run"})), _status(("b", {"status": "needs sequence parallelism"}))
    (None, 'needs sequence parallelism (see recipes/b/README.md)')
    """
    recipe, said = expected
    status = said.get("status")
    return None if status is None or status in PLAIN else f"{status} (see recipes/{recipe}/README.md)"


def chosen_shapes(words: Sequence[str]) -> dict[str, str]:
    """``--shape`` by key; without a key it holds for all models.

    >>> chosen_shapes(["qwen2.5-7b", "critic.model=qwen2.5-0.5b"])
    {'': 'qwen2.5-7b', 'critic.model': 'qwen2.5-0.5b'}
    """
    found = {}
    for word in words:
        key, _, name = word.rpartition("=")
        if key in found:
            raise ConfigError(f"--shape gives {key or 'the shape of all models'} twice; give each once")
        found[key] = name
    return found
