from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlprm.cli.main import main
from rlprm.errors import DataError
from rlprm.report.ablation import PLAN, evaluate, write_report
from rlprm.report.ablation_plots import plot_curves
from rlprm.report.ablation_text import markdown
from rlprm.report.ablation_values import Settings, collapse, curve, measured, reaches, read_run, value_at
from rlprm.report.contrasts import bootstrap, difference, holm, p_value

SETTINGS = {
    "stream": "process",
    "level": None,
    "confidence": 0.95,
    "resamples": 1000,
    "last_steps": 2,
    "share_of_best": 0.5,
    "entropy": 0.001,
}
GREEDY, SAMPLED = "val-core/t/accuracy/greedy", "val-core/t/accuracy/mean@4"


def finished_run(folder: Path, rollouts: int, sampled: list[float], **metrics: float) -> Path:
    """One evaluation a step, the first before training; greedy is always 0.1 above sampled."""
    folder.mkdir(parents=True)
    rows = [{"step": 0, SAMPLED: sampled[0], GREEDY: sampled[0] + 0.1}]
    for step, value in enumerate(sampled[1:], start=1):
        own = {"training/rollouts_total": float(step * rollouts), "timing_s/step": 2.0, "timing_s/testing": 0.5}
        rows.append({"step": step, SAMPLED: value, GREEDY: value + 0.1, **own, **metrics})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "finished.json").write_text("{}")
    return folder


def plan(root: Path, cells: list[str], seeds: list[int], **settings: object) -> Path:
    content = {
        "name": "abl",
        "command": "rlprm ablate ...",
        "shared": ["recipe=x"],
        "cells": {cell: {"overrides": [f"normalizer@streams.process.normalizer={cell}"]} for cell in cells},
        "seeds": seeds,
        "baseline": cells[0],
        "settings": {**SETTINGS, **settings},
        "ignored": [],
        "versions": {"torch": "1"},
        "machine": {"cores": "2"},
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / PLAN).write_text(json.dumps(content))
    return root


def two_cells(root: Path) -> Path:
    """`base` samples 10 responses a step for 4 steps, `other` 20 (a keep rule filters): all have reached 40."""
    for seed, base, other in (
        (0, [0.2, 0.3, 0.4, 0.5, 0.6], [0.2, 0.4, 0.8, 0.9, 0.9]),
        (1, [0.2, 0.3, 0.4, 0.5, 0.5], [0.2, 0.4, 0.6, 0.9, 0.9]),
    ):
        finished_run(root / "base" / f"seed{seed}", 10, base)
        finished_run(root / "other" / f"seed{seed}", 20, other)
    return plan(root, ["base", "other"], [0, 1])


def test_everything_is_cut_at_the_rollouts_that_all_have_reached(tmp_path):
    found = evaluate(two_cells(tmp_path))
    assert found["rollouts"] == 40  # base 4 x 10; other went on to 80, which nothing of what follows may use
    other = found["cells"]["other"]["seeds"]["0"]["values"]
    assert other["sampled"] == pytest.approx(0.8)  # at 40 rollouts, not 0.9 at 80
    assert other["greedy"] == pytest.approx(0.9)
    # trapezoids of 20 rollouts: (.2 + .4) / 2 * 20 + (.4 + .8) / 2 * 20 = 6 + 12 = 18, over 40
    assert other["area"] == pytest.approx(18 / 40)
    # base, seed 0: (.25 + .35 + .45 + .55) * 10 / 40
    assert found["cells"]["base"]["seeds"]["0"]["values"]["area"] == pytest.approx(0.4)


def test_the_level_is_what_the_baseline_ends_with(tmp_path):
    found = evaluate(two_cells(tmp_path))
    assert found["level"] == pytest.approx(0.55)  # (.6 + .5) / 2
    base, other = (found["cells"][name]["seeds"] for name in ("base", "other"))
    # base 0: from .5 at 30 to .6 at 40, half way; base 1 ends at .5 and never gets there
    assert base["0"]["values"]["rollouts_to_level"] == pytest.approx(35)
    assert base["1"]["values"]["rollouts_to_level"] is None
    # other 0: .4 at 20 to .8 at 40: 20 + 20 * .15 / .4; other 1: .4 to .6: 20 + 20 * .15 / .2
    assert other["0"]["values"]["rollouts_to_level"] == pytest.approx(27.5)
    assert other["1"]["values"]["rollouts_to_level"] == pytest.approx(35)
    assert found["cells"]["base"]["values"]["rollouts_to_level"]["without"] == 1
    text = markdown(found, [])
    assert "not reached by 1 of 2" in text
    assert "40 sampled rollouts" in text


def test_a_level_that_nobody_reaches_is_said(tmp_path):
    root = two_cells(tmp_path)
    found = evaluate(plan(root, ["base", "other"], [0, 1], level=0.95))
    assert found["level"] == 0.95
    assert "not reached (2 of 2)" in markdown(found, [])


def test_without_a_run_of_the_baseline_there_is_no_level(tmp_path):
    finished_run(tmp_path / "other" / "seed0", 10, [0.2, 0.5])
    text = markdown(evaluate(plan(tmp_path, ["base", "other"], [0])), [])
    assert "| 0.500 (one seed) | 0.600 (one seed) | 0.350 (one seed) | no level yet |" in text
    assert "not reached" not in text


def test_intervals_and_paired_differences(tmp_path):
    found = evaluate(two_cells(tmp_path))
    # other - base at 40 rollouts: .8 - .6 = .2 and .6 - .5 = .1: mean .15, sd .0707107, t(.975, 1) = 12.7062,
    # half = 12.7062 * .0707107 / sqrt(2) = .635310; p: t = .15 / .05 = 3 at 1 degree: 2 * (1/2 - atan(3) / pi) = .204833
    gap = found["cells"]["other"]["minus_baseline"]["sampled"]
    assert gap["mean"] == pytest.approx(0.15)
    assert (gap["low"], gap["high"]) == (pytest.approx(-0.485310, abs=1e-5), pytest.approx(0.785310, abs=1e-5))
    assert gap["p"] == pytest.approx(0.204833, abs=1e-6)
    assert gap["p_holm"] == gap["p"]  # one comparison only
    assert gap["bootstrap_low"] is None  # two pairs
    assert found["cells"]["base"]["minus_baseline"] == {}
    assert "No bootstrap: it is given from five pairs on." in markdown(found, [])


def test_with_one_seed_no_interval_is_given(tmp_path):
    finished_run(tmp_path / "base" / "seed0", 10, [0.2, 0.3])
    finished_run(tmp_path / "other" / "seed0", 10, [0.2, 0.5])
    text = markdown(evaluate(plan(tmp_path, ["base", "other"], [0])), [])
    assert "| base | 1 | 0.300 (one seed) |" in text
    assert "| sampled accuracy | other | 1 | +0.200 | one seed |  |  |  |" in text
    assert text.count("With one seed no interval can be given.") == 2  # under each of the two tables


def test_five_seeds_get_a_bootstrap(tmp_path):
    for seed in range(5):
        finished_run(tmp_path / "base" / f"seed{seed}", 10, [0.2, 0.3])
        finished_run(tmp_path / "other" / f"seed{seed}", 10, [0.2, 0.4 + 0.01 * seed])
    text = markdown(found := evaluate(plan(tmp_path, ["base", "other"], [0, 1, 2, 3, 4])), [])
    gap = found["cells"]["other"]["minus_baseline"]["sampled"]
    assert 0.1 <= gap["bootstrap_low"] < gap["mean"] < gap["bootstrap_high"] <= 0.14
    assert gap["bootstrap_low"] > gap["low"]  # the t interval is wider: it knows that five are few
    assert "1000 resamples" in text


def test_bootstrap_repeats_and_needs_five():
    gaps = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert bootstrap(gaps, 0.95, 2000) == bootstrap(gaps, 0.95, 2000)
    assert bootstrap(gaps[:4], 0.95, 2000) == (None, None)
    # mean of 5 draws: sd sqrt(.02) / sqrt(5) = .0632; the percentile interval is about .3 -+ 1.96 * .0632
    low, high = bootstrap(gaps, 0.95, 20000)
    assert (low, high) == (pytest.approx(0.18, abs=0.011), pytest.approx(0.42, abs=0.011))


def test_holm_by_hand():
    # sorted .01 .02 .03 .5: times 4, 3, 2, 1 = .04 .06 .06 .5
    adjusted = holm({"a": 0.5, "b": 0.03, "c": 0.01, "d": 0.02})
    assert adjusted == pytest.approx({"c": 0.04, "d": 0.06, "b": 0.06, "a": 0.5})
    assert holm({"a": 0.9, "b": 0.8}) == pytest.approx({"a": 1.0, "b": 1.0})


def test_p_of_equal_differences():
    assert p_value([0.0, 0.0]) == 1.0
    assert p_value([0.1, 0.1]) is None  # without any spread the t statistic is infinite, from two seeds on
    assert p_value([0.8 - 0.7, 0.6 - 0.5, 0.5 - 0.4]) is None  # ... and an sd of 6e-17 is rounding
    assert p_value([0.1, 0.1001]) == pytest.approx(0.000318, abs=1e-6)  # t = .10005 / .00005 = 2001 at 1 degree
    assert p_value([0.1]) is None
    assert difference({0: 1.0}, {1: 1.0}, 0.95, 10) is None


def test_a_difference_without_spread_has_no_p_and_does_not_enter_holm(tmp_path):
    for name, ends in {"base": [0.5, 0.25, 0.25], "even": [0.75, 0.5, 0.5], "other": [0.75, 0.75, 0.5]}.items():
        for seed, end in enumerate(ends):
            finished_run(tmp_path / name / f"seed{seed}", 10, [0.125, end])
    found = evaluate(plan(tmp_path, ["base", "even", "other"], [0, 1, 2]))
    even, other = (found["cells"][name]["minus_baseline"]["sampled"] for name in ("even", "other"))
    assert (even["mean"], even["p"], even["p_holm"]) == (0.25, None, None)
    assert other["p_holm"] == other["p"]  # compared alone
    text = markdown(found, [])
    assert "| sampled accuracy | even | 3 | +0.250 | [0.250, 0.250] |  |  |  |" in text
    assert "No p where the paired differences are all the same" in text


def test_rollouts_to_the_level_are_paired_where_both_reached_it_and_the_report_says_so(tmp_path):
    found = evaluate(two_cells(tmp_path))
    assert found["cells"]["other"]["minus_baseline"]["rollouts_to_level"]["count"] == 1  # base, seed 1 never does
    assert "Rollouts to the level: pairs are only those seeds on which both cells reached it." in markdown(found, [])
    never = evaluate(plan(tmp_path, ["base", "other"], [0, 1], level=0.95))
    assert "both cells reached it" not in markdown(never, [])  # no such row


def settings(**changed: object) -> Settings:
    return Settings(**{**SETTINGS, **changed})


@pytest.mark.parametrize(
    ("sampled", "metrics", "why"),
    [
        ([0.3, 0.4, 0.5], {}, []),
        ([0.3, 0.4, 0.29], {}, ["below its start"]),
        ([0.1, 0.6, 0.25], {}, ["below 0.5 of its best"]),
        ([0.3, 0.6, 0.2], {}, ["below its start", "below 0.5 of its best"]),
        ([0.3, 0.4, 0.45], {"actor/entropy": 0.0005}, ["entropy ended at"]),
        ([0.3, 0.4, 0.95], {"actor/entropy": 0.0005}, []),  # sure and right
    ],
)
def test_collapse(tmp_path, sampled, metrics, why):
    run = read_run(finished_run(tmp_path / "run", 10, sampled, **metrics))
    found = collapse(run, 20.0, settings())
    assert len(found) == len(why)
    assert all(part in line for part, line in zip(why, found, strict=True))


def test_numbers_of_single_steps_are_means_of_the_last_before_the_cut(tmp_path):
    folder = finished_run(tmp_path / "run", 10, [0.1] * 5)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row, auc in zip(rows[1:], (0.5, 0.6, 0.7, 0.9), strict=True):
        row |= {"prm/auc_fresh": auc, "prm/auc_surprisal": 0.4, "adv/process/share": auc / 2, "adv/other/share": 0.9}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measured(read_run(folder), 30.0, None, settings())
    assert found["auc"] == pytest.approx(0.65)  # steps 2 and 3; step 4 is behind the cut
    assert found["share"] == pytest.approx(0.325)
    assert found["auc_surprisal"] == pytest.approx(0.4)
    assert found["step_auc"] is None
    assert found["seconds"] == pytest.approx(4 * 2.5)


def test_a_stream_with_a_source_of_its_own_is_measured_by_its_own(tmp_path):
    both = {"prm/process/auc_fresh": 0.8, "prm/verdict/auc_fresh": 0.6}
    run = read_run(finished_run(tmp_path / "run", 10, [0.1, 0.2], **both))
    assert measured(run, 10.0, None, settings(stream="verdict"))["auc"] == 0.6


def test_without_evaluations_the_fresh_rollouts_of_training_count(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [
        {"step": step, "training/rollouts_total": 10.0 * step, "keep/outcome_mean_fresh": 0.1 * step} for step in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measured(read_run(folder), 20.0, None, settings())
    assert (found["sampled"], found["greedy"]) == (pytest.approx(0.2), None)
    assert found["area"] == pytest.approx(0.15)  # from 10 to 20 rollouts


def test_curves_before_their_first_and_at_their_first_point():
    points = [(10.0, 0.4), (20.0, 0.6)]
    assert value_at(points, 5.0) is None
    assert value_at([], 5.0) is None
    assert reaches(points, 0.3, 20.0) == 10.0
    assert reaches(points, 0.59, 15.0) is None  # it gets there only after the cut
    assert curve([{"step": 0}], re.compile("x")) == []


def test_failed_and_missing_runs_are_listed_and_stay_out_of_the_numbers(tmp_path):
    root = two_cells(tmp_path)
    plan(root, ["base", "other", "third"], [0, 1, 2])
    failed = root / "other" / "seed2"
    failed.mkdir()
    (failed / "failed.json").write_text(json.dumps({"error": "loss is\nNaN", "traceback": "", "time": "t"}))
    begun = finished_run(root / "base" / "seed2", 1, [0.9, 0.9])
    (begun / "finished.json").unlink()
    found = write_report(root, with_plots=True)
    assert found["rollouts"] == 40  # the run that is under way has 1, and does not count
    assert found["cells"]["other"]["seeds"]["2"]["error"] == "loss is\nNaN"
    text = (root / "report.md").read_text()
    assert "- other, seed 2 failed: loss is NaN" in text
    assert "- base, seed 2: not finished" in text
    assert "- third, seed 0, 1, 2: not begun" in text
    assert "| base | 2 of 3 |" in text
    assert "| third | 0 of 3 | not measured |" in text
    assert {path.name for path in root.glob("*.png")} == {
        "sampled_curves.png", "sampled_ranking.png", "greedy_curves.png", "greedy_ranking.png",
    }  # fmt: skip
    assert len(list(root.glob("*.svg"))) == 4
    # what was written can be read and evaluated again, to the same
    assert evaluate(root) == json.loads((root / PLAN).read_text())


def test_the_report_command_prints_an_ablation_again(tmp_path, capsys):
    root = two_cells(tmp_path)
    assert main(["report", str(root)]) == 0
    assert "# Ablation abl" in capsys.readouterr().out
    assert (root / "report.md").is_file()


def test_many_cells_get_a_frame_each(tmp_path):
    curves = {f"cell{number}": [[(0.0, 0.1), (10.0, 0.1 * number)]] for number in range(8)}
    assert plot_curves(curves, "cell0", "sampled accuracy", 10.0, tmp_path / "many", 0.95) == ["many.png"]
    svg = (tmp_path / "many.svg").read_text()
    assert svg.count("<!-- cell0 (one seed: no interval) -->") == 7
    assert "<!-- cell7 (one seed: no interval) -->" in svg


def test_an_ablation_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="expected the folder of an ablation"):
        evaluate(tmp_path)
    (tmp_path / PLAN).write_text('{"name": "x"}')
    with pytest.raises(DataError, match="says no name, cells, seeds"):
        evaluate(tmp_path)
