"""``rlprm report``: one run on one screen, several runs in one table and plots."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from rlprm.errors import ConfigError, DataError
from rlprm.report.ablation import PLAN, REPORT, write_report
from rlprm.report.runs import Row, read_metrics, series
from rlprm.report.seeds import plot, table

OWN_HELP = True
LAST_STEPS = 10  # of which numbers of single steps are averaged; an evaluation counts by itself
_EVALUATED = re.compile(r"val-core/.+/(greedy|(mean|pass)@\d+)")
_PER_STEP = (
    "keep/outcome_mean_fresh",
    "prm/auc_fresh",
    "prm/auc_surprisal",
    "prm/step_auc",
    "prm/step_auc_surprisal",
    "prm/first_wrong_hit",
    "prm/first_wrong_hit_surprisal",
    "adv/process/share",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLog:
    """One run: where it is, what it was, how far it got."""

    folder: Path
    method: str  # the run's name
    seed: int
    steps: int  # that it was to take
    rows: Sequence[Row]

    @property
    def done(self) -> int:
        """The last step that was logged."""
        return max((int(row["step"]) for row in self.rows), default=0)

    def logged(self) -> set[str]:
        """Names of metrics with at least one value."""
        return {name for row in self.rows for name, value in row.items() if value is not None}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs, folders of runs, an ablation")
    parser.add_argument("--output", type=Path, help="folder for the table and plots of several runs (default: report)")


def run(options: argparse.Namespace) -> int:
    """A summary for one run; a table and plots for several; its report again for an ablation."""
    if len(options.runs) == 1 and (options.runs[0] / PLAN).is_file():
        if options.output is not None:
            raise ConfigError(f"{options.runs[0]} is an ablation, whose report lies in its folder; leave --output out")
        write_report(options.runs[0], with_plots=True)
        print((options.runs[0] / REPORT).read_text(encoding="utf-8"))
        return 0
    folders = [folder for given in options.runs for folder in run_folders(given)]
    if len(folders) == 1:
        if options.output is not None:
            raise ConfigError(f"--output is for several runs, and there is one ({folders[0]}); leave it out")
        from rlprm.report.summary import print_summary

        print_summary(folders[0])
        return 0
    over_seeds(folders, Path("report") if options.output is None else options.output)
    return 0


def run_folders(given: Path) -> list[Path]:
    """``given`` itself if it is a run's folder, else every run's folder up to three levels below, by name.

    Raises:
        DataError: there is none.
    """
    if not given.is_dir():
        raise DataError(f"{given} is no folder; expected the folder of a run, or one that holds runs")
    if (given / "metrics.jsonl").is_file():
        return [given]
    found = [path.parent for depth in ("*", "*/*", "*/*/*") for path in given.glob(f"{depth}/metrics.jsonl")]
    if not found:
        raise DataError(
            f"{given} holds no run with metrics.jsonl; expected the folder of a run, or one that holds runs"
        )
    return sorted(found)


def over_seeds(folders: Sequence[Path], output: Path) -> str:
    """Print the table over seeds and where table and plots are; the same as Markdown.

    Runs are grouped by the name and the seed in their ``config.yaml``. Accuracies are those of the last evaluation,
    numbers of single steps means over the last ten. Metrics are compared between the methods whose runs all logged them.

    Raises:
        DataError: a folder holds no run, two runs have the same name and seed, or no metric is in all runs of a method.
    """
    logs = [read_run(folder) for folder in folders]
    methods = grouped(logs)
    names = sorted({name for log in logs for name in log.logged() if _EVALUATED.fullmatch(name)})
    sections = [
        ("At the last evaluation", names, 1),
        (f"Training rollouts, mean of the last {LAST_STEPS} steps", list(_PER_STEP), LAST_STEPS),
    ]
    parts, plotted = [], []
    for title, wanted, last in sections:
        for members, metrics in by_methods(methods, wanted).items():
            runs = {method: {seed: log.folder for seed, log in methods[method].items()} for method in members}
            parts += [f"## {title}\n", table(runs, metrics, last=last)]
            plotted += [(runs, metric) for metric in metrics]
    if not plotted:
        raise DataError(
            f"the runs ({', '.join(map(str, folders))}) logged nothing that can be compared; run them longer"
        )
    short = [f"- {log.folder} ended at step {log.done} of {log.steps}" for log in logs if log.done < log.steps]
    if short:
        parts += ["## Not finished\n", "\n".join(short) + "\n"]
    output.mkdir(parents=True, exist_ok=True)
    for runs, metric in plotted:
        plot(runs, metric, output / metric.replace("/", "_").replace("@", "_at_"))
    text = "\n".join(parts)
    (output / "seeds.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"table: {output / 'seeds.md'}")
    print(f"plots: {output}/*.png (and .svg), {len(plotted)} metrics")
    return text


def read_run(folder: Path) -> RunLog:
    """What ``folder`` holds.

    Raises:
        DataError: no ``metrics.jsonl`` or ``config.yaml``, or one that says neither name nor seed.
    """
    rows = read_metrics(folder)
    path = folder / "config.yaml"
    if not path.is_file():
        raise DataError(f"{path} is missing; expected the folder of a run, where it stands beside metrics.jsonl")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not {"name", "seed", "steps"} <= set(config):
        raise DataError(f"{path} says no name, seed or steps; expected the configuration of a run of rlprm train")
    return RunLog(
        folder=folder, method=str(config["name"]), seed=int(config["seed"]), steps=int(config["steps"]), rows=rows
    )


def grouped(logs: Sequence[RunLog]) -> dict[str, dict[int, RunLog]]:
    """Method -> seed -> run, methods in the order given.

    Raises:
        DataError: two runs have the same name and seed.
    """
    methods: dict[str, dict[int, RunLog]] = {}
    for log in logs:
        seeds = methods.setdefault(log.method, {})
        if log.seed in seeds:
            raise DataError(
                f"{seeds[log.seed].folder} and {log.folder} both are seed {log.seed} of {log.method!r}; leave one out, or "
                "give runs of different methods different names (name=...)"
            )
        seeds[log.seed] = log
    return methods


def by_methods(methods: dict[str, dict[int, RunLog]], metrics: Sequence[str]) -> dict[tuple[str, ...], list[str]]:
    """Metrics by the methods of which every run has a finite value of them (an outcome-only run has no PRM)."""
    found: dict[tuple[str, ...], list[str]] = {}
    for metric in metrics:
        members = tuple(
            method for method, seeds in methods.items() if all(series(log.rows, metric) for log in seeds.values())
        )
        if members:
            found.setdefault(members, []).append(metric)
    return found
