"""``rlprm train``."""

from __future__ import annotations

import argparse
from collections.abc import Container, Sequence
from pathlib import Path

from rich.console import Console

from rlprm.cli.compose import composed, groups
from rlprm.config import TrainConfig, validated
from rlprm.errors import ConfigError
from rlprm.run.progress import Progress

OWN_HELP = False  # --help lists groups and options
ELSEWHERE = ("cluster", "dataset")  # groups of `rlprm launch` and `rlprm prepare`


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm train`."""
    composing(parser)
    parser.add_argument("--seeds", help="several runs, for example 0,1,2; then one table and one plot")
    parser.add_argument("--summary", action="store_true", help="print a summary at the end")


def composing(parser: argparse.ArgumentParser) -> None:
    """What every subcommand with a configuration takes."""
    parser.add_argument("overrides", nargs="*", metavar="key=value | group=option")
    parser.add_argument("-h", "--help", action="store_true", help="groups, options and keys")
    parser.add_argument("--cfg", action="store_true", help="print the resolved configuration and its origins")
    parser.add_argument("--config-dir", type=Path, help="a folder of your own groups and options")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(options: argparse.Namespace) -> int:
    """One run, or one per seed; a summary, or a table over seeds, at the end."""
    if options.help:
        print(help_text("train", options.config_dir))
        return 0
    seeds = parse_seeds(options.seeds)
    if seeds is not None:
        refuse_two_seeds(options.seeds, options.overrides)
    plan = [options.overrides] if seeds is None else [[*options.overrides, f"seed={seed}"] for seed in seeds]
    configurations = [composed("train", overrides, options.config_dir) for overrides in plan]
    if options.cfg:
        print(configurations[0].annotated())
        return 0
    # every seed's configuration is checked before the first run starts
    configs: list[TrainConfig] = [validated(TrainConfig, each.values) for each in configurations]
    from rlprm.run.stopping import Stopping
    from rlprm.run.supervisor import supervised

    progress = Progress(quiet=options.quiet)
    folders: list[Path] = []
    with Stopping(progress.say).on_sigterm() as stopping:
        for config, each in zip(configs, configurations, strict=True):
            if seeds is not None:
                progress.say(f"seed {config.seed}")
            folders.append(supervised(config, each, progress, stopping))
    if options.summary:
        from rlprm.report.summary import print_summary

        print_summary(folders[-1], Console())
    if seeds is not None:
        from rlprm.cli.report import over_seeds

        over_seeds(folders, folders[0].parent / "report")
    return 0


def parse_seeds(text: str | None) -> list[int] | None:
    """``0,1,2`` as numbers.

    >>> parse_seeds("0,1,2"), parse_seeds(None)
    ([0, 1, 2], None)

    Raises:
        ConfigError: anything that is not a list of different whole numbers.
    """
    if text is None:
        return None
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds is {text!r}; expected whole numbers with commas, for example 0,1,2") from None
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"--seeds is {text!r}, which names a seed twice; give each once")
    return seeds


def refuse_two_seeds(seeds: str, overrides: Sequence[str]) -> None:
    """``--seeds`` sets ``seed`` in every run, so a seed given beside it would be lost.

    Raises:
        ConfigError: both are given.
    """
    for word in overrides:
        if word.partition("=")[0].lstrip("+~").strip() == "seed":
            raise ConfigError(
                f"{word} and --seeds {seeds} both say which seed to run; write every seed into --seeds, or drop --seeds"
            )


def help_text(name: str, config_dir: Path | None, only: Container[str] | None = None) -> str:
    """Groups (those in ``only``; None: all) with their options, and the keys with their comments."""
    from rlprm.paths import conf_dir

    lines = [f"rlprm {name} key=value group=option ...", "", "groups and options:"]
    for group, options in groups(config_dir).items():
        if group in ELSEWHERE if only is None else group not in only:
            continue
        lines.append(f"  {group:<14} {', '.join(options)}")
    lines += ["", f"keys of conf/{name}.yaml (groups bring more; --cfg prints all with their origin):"]
    comment = ""
    for line in (conf_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            comment = line.lstrip("# ")
        elif line and not line.startswith((" ", "defaults")):
            lines.append(f"  {line:<28} {comment}")
    lines += ["", "--cfg  --config-dir DIR  --quiet" + ("  --seeds 0,1,2  --summary" if name == "train" else "")]
    return "\n".join(lines)
