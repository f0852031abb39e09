"""``rlprm ablate``: the same task under many configurations and seeds, compared at equal rollouts."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlprm.checks_models import check_model_folders
from rlprm.cli.cells import Cell, Cells, cells_of, explicit_cells, split_own
from rlprm.cli.compose import Composed, composed
from rlprm.cli.train import composing
from rlprm.config import TrainConfig, validated
from rlprm.errors import ConfigError
from rlprm.paths import conf_dir
from rlprm.run.progress import Progress

if TYPE_CHECKING:
    from rlprm.run.ablation import AblationConfig, Planned

OWN_HELP = False

EXAMPLES = """\
rlprm ablate key=a,b group=a,b [key=value ...]

Every combination of the values is a cell; every cell runs with every seed; what is finished is not run again.

sweeps (Hydra's syntax)
  normalizer=raw,group_zscore          several options of a group
  normalizer=glob(*,exclude=raw)       all options of a group, but some
  streams.process.weight=0.5,1,2       several values of a key
  policy.mini_batches=range(1,5)       1, 2, 3, 4
  seeds=5   seeds=[3,7]                0 to 4; or a list

A bare source=, merge=, normalizer=, estimator= or gate= is that piece of the stream named `process` (stream=NAME: of
another one). Write the place out for one piece of many streams: normalizer@streams.outcome.normalizer=raw,group_zscore

cells that are not of one grid
  --cell "trusted: method=prime_as_written gate@streams.process.gate=trust"     (may be repeated; stands beside a grid)
  --cells FILE          YAML:  trusted: [method=prime_as_written, gate@streams.process.gate=trust]

options
  --baseline CELL       what the others are compared with (the first cell, if not given)
  --parallel N          N worker processes, each with its own Ray and engines, or each a job of placement.ray_address
  --ignore KEY          a key or section that may differ from what earlier runs of this folder were started with
  --dry-run             list cells, runs and rollouts, and start nothing
  --cfg  --config-dir DIR  --quiet

examples
  rlprm ablate recipe=chain_arithmetic_cpu normalizer=raw,group_zscore,return_range seeds=5
  rlprm ablate recipe=chain_arithmetic_cpu method=outcome_rloo,prime_as_written streams.outcome.weight=0.5,1 seeds=3
  rlprm ablate recipe=chain_arithmetic_cpu name=ceiling --cell "rloo: method=outcome_rloo" --cell "oracle: method=oracle"

results: <output_dir>/<name>/ with report.md, ablation.json, plots, and the runs as <cell>/seed<seed>
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm ablate`."""
    composing(parser)
    parser.add_argument("--cell", action="append", default=[], metavar="'NAME: OVERRIDES'", help="one more cell")
    parser.add_argument("--cells", type=Path, metavar="FILE", help="YAML: NAME: [override, ...]")
    parser.add_argument("--baseline", metavar="CELL", help="what the others are compared with")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="worker processes")
    parser.add_argument("--ignore", action="append", default=[], metavar="KEY", help="a key that may have changed")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and start nothing")


def run(options: argparse.Namespace) -> int:
    """All runs that are not finished yet, then the report; 1 where a run failed."""
    if options.help:
        print(help_text())
        return 0
    from rlprm.run.ablation import AblationConfig, refuse_changed

    mine, words = split_own(options.overrides, own_keys())
    own: AblationConfig = validated(AblationConfig, composed("ablate", mine, options.config_dir).values)
    cells = cells_of(
        words, explicit_cells(options.cell, options.cells), stream=own.stream, config_dir=options.config_dir
    )
    baseline = cells.named(options.baseline)
    if options.parallel < 1:
        raise ConfigError(f"--parallel is {options.parallel}; expected at least 1")
    runs = planned(cells, own, options.config_dir)
    if options.cfg:
        print(next(run.composed for run in runs if run.cell == baseline.name).annotated())
        return 0
    refuse_changed(runs, options.ignore)
    if options.dry_run:
        print(listed(runs, cells, baseline))
        return 0
    return execute(runs, cells, baseline, own, options)


def execute(
    runs: Sequence[Planned], cells: Cells, baseline: Cell, own: AblationConfig, options: argparse.Namespace
) -> int:
    """Run what is not finished; the report is written after each run, and also after Ctrl-C."""
    from rlprm.report.ablation import PLAN, REPORT, write_json, write_report
    from rlprm.run.ablation import in_order, machine
    from rlprm.run.ablation_workers import run_all
    from rlprm.run.folder import RunFolder
    from rlprm.run.kept import sampling_key
    from rlprm.run.training import commit, versions

    progress = Progress(quiet=options.quiet)
    folder = runs[0].folder.parents[1]
    with ExitStack() as stack:
        stack.enter_context(RunFolder(folder, resume=True))  # one ablation at a time in this folder
        left_out = others(folder / PLAN, cells)
        if left_out:
            progress.say(f"{', '.join(left_out)}: in this folder, but not in this call, so not in its report")
        plan = {
            "name": own.name,
            "command": shlex.join(["rlprm", "ablate", *_said(options)]),
            "shared": list(cells.shared),
            "cells": {cell.name: {"overrides": list(cell.overrides)} for cell in cells.cells},
            "seeds": own.seed_list(),
            "baseline": baseline.name,
            "settings": own.report_settings(),
            "ignored": list(options.ignore),
            "commit": commit(),
            "versions": dict(versions()),
            "machine": dict(machine()),
        }
        write_json(folder / PLAN, plan)
        todo = in_order([run for run in runs if not run.finished], sampling_key)
        progress.say(f"{len(runs)} runs in {folder}, {len(runs) - len(todo)} of them finished before")
        try:
            failed = run_all(
                todo,
                folder / "logs",
                workers=options.parallel,
                checkpoints=own.checkpoints,
                progress=progress,
                after=lambda: write_report(folder, with_plots=False),
            )
        finally:
            write_report(folder, with_plots=True)
    print((folder / REPORT).read_text(encoding="utf-8"))
    print(f"report: {folder / REPORT}")
    for label, error in failed.items():
        print(f"rlprm ablate: {label} failed: {error}", file=sys.stderr)
    return 1 if failed else 0


def planned(cells: Cells, own: AblationConfig, config_dir: Path | None) -> list[Planned]:
    """Every run's configuration, composed and checked as `rlprm train` would.

    Raises:
        ConfigError: every cell that cannot be run, each with its reason.
    """
    from rlprm.run.ablation import Planned

    problems: dict[str, str] = {}
    runs: list[Planned] = []
    for cell in cells.cells:
        overrides = cells.overrides(cell)
        try:
            folder = Path(composed("train", overrides, config_dir).values["output_dir"]) / own.name
            for seed in own.seed_list():
                each = configuration(overrides, cell.name, seed, folder, config_dir)
                config: TrainConfig = validated(TrainConfig, each.values)
                runs.append(Planned(cell=cell.name, seed=seed, config=config, composed=each))
            check_model_folders(runs[-1].config)
        except ConfigError as error:
            problems[cell.name] = str(error)
    if len(problems) == len(cells.cells) and len(set(problems.values())) == 1:
        raise ConfigError(f"every cell: {next(iter(problems.values()))}")
    if problems:
        raise ConfigError("\n".join(f"cell {name!r}: {text}" for name, text in problems.items()))
    refuse_twins(runs)
    folders = {run.folder.parents[1] for run in runs}
    if len(folders) > 1:
        raise ConfigError(
            f"cells have different values of output_dir ({', '.join(map(str, sorted(folders)))}); give one"
        )
    return runs


def configuration(overrides: Sequence[str], cell: str, seed: int, folder: Path, config_dir: Path | None) -> Composed:
    """The training configuration of one run: named after its cell, in the ablation's folder and group."""
    own = {"name": cell, "output_dir": str(folder), "seed": seed, "resume": "auto", "tracker.group": folder.name}
    return composed("train", [*overrides, *(f"{key}={_quoted(value)}" for key, value in own.items())], config_dir)


def refuse_twins(runs: Sequence[Planned]) -> None:
    """Two cells with one configuration would be compared with themselves.

    Raises:
        ConfigError: naming both.
    """
    seen: dict[str, str] = {}
    for run in runs:
        content = yaml.safe_dump(
            {key: value for key, value in run.composed.values.items() if key not in ("name", "seed")}
        )
        first = seen.setdefault(content, run.cell)
        if first != run.cell:
            raise ConfigError(f"cells {first!r} and {run.cell!r} are the same configuration; leave one out")


def listed(runs: Sequence[Planned], cells: Cells, baseline: Cell) -> str:
    """What would be run: `--dry-run`."""
    lines = [f"{len(cells.cells)} cells, all with: {' '.join(cells.shared) or 'nothing'}"]
    width = max(len(cell.name) for cell in cells.cells)
    for cell in cells.cells:
        mark = " (baseline)" if cell == baseline else ""
        lines.append(f"  {cell.name:<{width}}  {' '.join(cell.overrides)}{mark}")
    todo = [run for run in runs if not run.finished]
    rollouts = sum(run.config.steps * run.config.prompts_per_step * run.config.responses_per_prompt for run in todo)
    lines += [
        f"{len(runs)} runs in {runs[0].folder.parents[1]}, {len(runs) - len(todo)} finished, {len(todo)} to run:",
        *(f"  {run.label}" for run in todo),
        f"about {rollouts} rollouts (evaluation, what a keep rule filters out and what a prover samples come on top)",
    ]
    return "\n".join(lines)


def others(plan: Path, cells: Cells) -> list[str]:
    """Cells of an earlier call in the same folder that this one does not have."""
    from rlprm.report.ablation import read_plan

    if not plan.is_file():
        return []
    names = {cell.name for cell in cells.cells}
    return [name for name in read_plan(plan.parent)["cells"] if name not in names]


def own_keys() -> list[str]:
    """The keys of ``conf/ablate.yaml``; all others are the runs'."""
    return list(yaml.safe_load((conf_dir() / "ablate.yaml").read_text(encoding="utf-8")))


def help_text() -> str:
    """Syntax, examples, and the ablation's own keys with their comments."""
    lines = [EXAMPLES, "keys of conf/ablate.yaml (all others are those of rlprm train, see rlprm train --help):"]
    comment = ""
    for line in (conf_dir() / "ablate.yaml").read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("#"):
            comment = line.strip("# ")
        else:
            lines.append(f"  {line:<24} {comment}")
    return "\n".join(lines)


def _said(options: argparse.Namespace) -> list[str]:
    """The options again, as they would be typed."""
    words = list(options.overrides)
    words += [word for cell in options.cell for word in ("--cell", cell)]
    words += [] if options.cells is None else ["--cells", str(options.cells)]
    words += [] if options.baseline is None else ["--baseline", options.baseline]
    return [*words, *([] if options.config_dir is None else ["--config-dir", str(options.config_dir)])]


def _quoted(value: Any) -> str:
    """As a value of an override; text is quoted, for it may hold what Hydra's grammar gives a meaning."""
    if not isinstance(value, str):
        return str(value)
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
