"""The report of an ablation in Markdown: what was compared, the tables, what failed, and how to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlprm.report.ablation_values import MEASURES

ACCURACY = ("sampled", "greedy", "area", "rollouts_to_level")
ONE = "one seed"  # in a table; beside it stands what that means
NO_INTERVAL = "With one seed no interval can be given."


def markdown(found: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The whole report of what :func:`rlprm.report.ablation.evaluate` found; ``plots`` are files beside it."""
    runs = [(name, seed, run) for name, cell in found["cells"].items() for seed, run in cell["seeds"].items()]
    finished = [run for _, _, run in runs if run["state"] == "finished"]
    parts = [f"# Ablation {found['name']}\n", _scope(found, len(finished), len(runs))]
    if finished:
        parts += [_accuracy(found), _differences(found), _process(found), _collapses(runs)]
        parts += ["".join(f"![{plot}]({plot})\n" for plot in plots)]
    parts += [_unfinished(runs), _cells(found), _reading(found), _made(found, finished)]
    return "\n".join(part for part in parts if part)


def _scope(found: Mapping[str, Any], finished: int, planned: int) -> str:
    lines = [
        f"{len(found['cells'])} cells, seeds {', '.join(map(str, found['seeds']))}: {finished} of {planned} runs are "
        f"finished. Baseline: `{found['baseline']}`."
    ]
    if finished:
        lines.append(
            f"Everything is compared at **{found['rollouts']:.0f} sampled rollouts** a run (those that were filtered out "
            "count, and so do a prover's continuations), the most that every finished run reached."
        )
    if found["level"] is not None:
        given = "as asked for" if found["settings"]["level"] is not None else "what the baseline ends with"
        lines.append(f"The level of *rollouts to the level* is a sampled accuracy of {found['level']:.4f}, {given}.")
    return "\n".join(lines) + "\n"


def _accuracy(found: Mapping[str, Any]) -> str:
    percent = f"{found['settings']['confidence']:.0%}"
    lines = [
        f"## Accuracy and cost (mean and {percent} t interval over seeds)\n",
        "| cell | seeds | sampled accuracy | greedy accuracy | area under the curve | rollouts to the level | collapsed "
        "| seconds a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in found["cells"].items():
        values = cell["values"]
        columns = [_interval(values[measure]) for measure in ("sampled", "greedy", "area")]
        collapsed = values["collapsed"]
        rate = "" if collapsed is None else f"{round(collapsed['mean'] * collapsed['count'])} of {collapsed['count']}"
        seconds = "" if values["seconds"] is None else f"{values['seconds']['mean']:.0f}"
        lines.append(
            f"| {name} | {_finished(cell)} | {' | '.join(columns)} | {_to_level(cell, found['level'])} | {rate} | {seconds} |"
        )
    lines += ["", NO_INTERVAL] if any(f"({ONE})" in line for line in lines) else []
    return "\n".join(lines) + "\n"


def _differences(found: Mapping[str, Any]) -> str:
    if len(found["cells"]) < 2:
        return ""
    settings = found["settings"]
    percent = f"{settings['confidence']:.0%}"
    lines = [
        f"## Difference from `{found['baseline']}`, paired by seed\n",
        f"| measure | cell | pairs | difference | {percent} paired t interval | {percent} bootstrap | p | p (Holm) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shown = []
    for measure in ACCURACY:
        for name, cell in found["cells"].items():
            gap = cell["minus_baseline"].get(measure)
            if gap is None:
                continue
            shown.append(gap)
            digits = _digits(measure)
            student = ONE if gap["low"] is None else _bounds(gap["low"], gap["high"], digits)
            drawn = "" if gap["bootstrap_low"] is None else _bounds(gap["bootstrap_low"], gap["bootstrap_high"], digits)
            lines.append(
                f"| {MEASURES[measure][0]} | {name} | {gap['count']} | {gap['mean']:+.{digits}f} | {student} | {drawn} "
                f"| {_p(gap['p'])} | {_p(gap['p_holm'])} |"
            )
    notes = [
        "",
        "p: two-sided paired t test. Holm: the same, adjusted for all cells that are compared on that measure.",
        *([NO_INTERVAL] if any(ONE in line for line in lines) else []),
    ]
    if any(gap["p"] is None and gap["count"] > 1 for gap in shown):
        notes.append(
            "No p where the paired differences are all the same: without spread the t test has nothing to say."
        )
    if any(line.startswith(f"| {MEASURES['rollouts_to_level'][0]} |") for line in lines):
        notes.append("Rollouts to the level: pairs are only those seeds on which both cells reached it.")
    if any(line.count("[") > 1 for line in lines):
        notes.append(f"Bootstrap: percentile interval of {settings['resamples']} resamples of the paired differences.")
    else:
        notes.append("No bootstrap: it is given from five pairs on.")
    return "\n".join([*lines, *notes]) + "\n"


def _process(found: Mapping[str, Any]) -> str:
    """What the process source knew, beside the surprise of the initial model, and how much of the credit was its."""
    measures = ("auc", "pair_accuracy", "step_auc")
    shown = [
        name
        for name, cell in found["cells"].items()
        if any(cell["values"][measure] is not None for measure in (*measures, "share"))
    ]
    if not shown:
        return ""
    last, stream = found["settings"]["last_steps"], found["settings"]["stream"]
    lines = [
        f"## Process rewards on fresh rollouts, before learning from them (last {last} steps)\n",
        f"| cell | AUC: PRM / surprisal | pair accuracy: PRM / surprisal | step AUC: PRM / surprisal | share of `{stream}` "
        "in the credit |",
        "|---|---|---|---|---|",
    ]
    for name in shown:
        values = found["cells"][name]["values"]
        pairs = [_beside(values[measure], values[f"{measure}_surprisal"]) for measure in measures]
        lines.append(f"| {name} | {' | '.join(pairs)} | {_interval(values['share'])} |")
    return "\n".join(lines) + "\n"


def _collapses(runs: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    lines = [
        f"- {name}, seed {seed}: {'; '.join(run['collapse'])}"
        for name, seed, run in runs
        if run["state"] == "finished" and run["collapse"]
    ]
    return "## Collapsed runs\n\n" + "\n".join(lines) + "\n" if lines else ""


def _unfinished(runs: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    lines = [
        f"- {name}, seed {seed} failed: {' '.join(run['error'].split())}"
        for name, seed, run in runs
        if run["state"] == "failed"
    ]
    for state in ("not finished", "not begun"):
        for cell in dict.fromkeys(name for name, _, run in runs if run["state"] == state):
            seeds = [seed for name, seed, run in runs if name == cell and run["state"] == state]
            lines.append(f"- {cell}, seed {', '.join(seeds)}: {state}")
    if not lines:
        return ""
    return "## Not in the tables\n\n" + "\n".join(lines) + "\n\nThe same command runs these, and nothing else.\n"


def _cells(found: Mapping[str, Any]) -> str:
    shared = " ".join(found["shared"]) or "nothing"
    lines = ["## Cells\n", f"All cells share: `{shared}`\n", "| cell | its own |", "|---|---|"]
    lines += [f"| {name} | `{' '.join(cell['overrides'])}` |" for name, cell in found["cells"].items()]
    if found.get("ignored"):
        lines.append(f"\nKeys in which runs of earlier calls may differ: {', '.join(found['ignored'])}.")
    return "\n".join(lines) + "\n"


def _reading(found: Mapping[str, Any]) -> str:
    settings = found["settings"]
    return f"""## How to read the tables

- Accuracies are means over the evaluation sets, between two evaluations on the straight line; without evaluations they
  are those of training's own fresh rollouts.
- Area under the curve: mean sampled accuracy from 0 to the common count of rollouts.
- Rollouts to the level: where the curve of sampled accuracy first meets the level. Runs that never do have no number;
  they are counted beside the mean, which is over the others.
- Collapsed: sampled accuracy ends below its start, or below {settings["share_of_best"]:g} of the best it had, or entropy ends
  below {settings["entropy"]:g} nats a token while most sampled responses are wrong.
- Surprisal: the same measure of -log pi_ref, what the initial model knows without any learnt reward.
- Share of the credit: cov(part, total) / var(total) of the advantages; the shares of all streams sum to 1.
- Seconds: training steps, evaluation and saving; starting up is not in them.
"""


def _made(found: Mapping[str, Any], finished: Sequence[Mapping[str, Any]]) -> str:
    commits = sorted({str(run.get("commit")) for run in finished})
    lines = ["## How it was made\n", f"    {found['command']}\n"]
    if commits:
        several = " (more than one: compare with care)" if len(commits) > 1 else ""
        lines.append(f"- commits of the runs: {', '.join(commits)}{several}")
    lines.append(f"- versions: {', '.join(f'{name} {version}' for name, version in found['versions'].items())}")
    lines.append(f"- machine: {', '.join(f'{name} {value}' for name, value in found['machine'].items())}")
    return "\n".join(lines) + "\n"


def _finished(cell: Mapping[str, Any]) -> str:
    done = sum(run["state"] == "finished" for run in cell["seeds"].values())
    return str(done) if done == len(cell["seeds"]) else f"{done} of {len(cell['seeds'])}"


def _to_level(cell: Mapping[str, Any], level: float | None) -> str:
    if level is None:
        return "no level yet"  # it is the baseline's, and that has no finished run
    values = [run["values"]["rollouts_to_level"] for run in cell["seeds"].values() if run["state"] == "finished"]
    missing = sum(value is None for value in values)
    if not values:
        return ""
    if missing == len(values):
        return f"not reached ({missing} of {missing})"
    found = _interval(cell["values"]["rollouts_to_level"], digits=0)
    return found if missing == 0 else f"{found}, not reached by {missing} of {len(values)}"


def _interval(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    if found is None:
        return "not measured"
    mean = f"{found['mean']:.{digits}f}"
    return f"{mean} ({ONE})" if found["low"] is None else f"{mean} {_bounds(found['low'], found['high'], digits)}"


def _beside(prm: Mapping[str, Any] | None, surprisal: Mapping[str, Any] | None) -> str:
    if prm is None:
        return "not measured"
    return f"{prm['mean']:.3f} / " + ("not measured" if surprisal is None else f"{surprisal['mean']:.3f}")


def _bounds(low: float, high: float, digits: int) -> str:
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def _digits(measure: str) -> int:
    return 0 if measure == "rollouts_to_level" else 3


def _p(value: float | None) -> str:
    return "" if value is None else ("<0.0001" if value < 0.0001 else f"{value:.4f}")
