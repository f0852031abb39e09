from __future__ import annotations

import json
import math

import pytest

from rlprm.errors import DataError
from rlprm.report.runs import read_metrics
from rlprm.report.seeds import final_values, interval, paired, plot, report_seeds, table

METRIC = "val-core/chain/accuracy/greedy"


def run(folder, values, name=METRIC):
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, name: value}) for step, value in values]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_interval_of_five_seeds():
    # mean .60; deviations -.10 -.05 0 .05 .10 -> sum of squares .025, sd sqrt(.025/4) = .0790569
    # t(.975, 4) = 2.776445; half = 2.776445 * .0790569 / sqrt(5) = .0981622
    found = interval([0.5, 0.55, 0.6, 0.65, 0.7])
    assert found.count == 5
    assert found.mean == pytest.approx(0.6, abs=1e-12)
    assert found.sd == pytest.approx(0.0790569, abs=1e-7)
    assert (found.low, found.high) == (pytest.approx(0.5018378, abs=1e-6), pytest.approx(0.6981622, abs=1e-6))


def test_pairing_takes_out_what_a_seed_adds_to_both():
    # differences .02 .03 .04: mean .03, sd .01, t(.975, 2) = 4.302653, half = 4.302653 * .01 / sqrt(3) = .0248414
    first, second = {0: 0.52, 1: 0.73, 2: 0.34, 9: 0.0}, {0: 0.5, 1: 0.7, 2: 0.3, 8: 1.0}
    found = paired(first, second)
    assert found.count == 3
    assert found.mean == pytest.approx(0.03, abs=1e-12)
    assert (found.low, found.high) == (pytest.approx(0.0051586, abs=1e-6), pytest.approx(0.0548414, abs=1e-6))


def test_one_seed_has_no_interval():
    found = interval([0.5])
    assert (found.mean, found.sd, found.low, found.high) == (0.5, None, None, None)
    assert str(found) == "0.5 (one seed: no interval)"
    with pytest.raises(ValueError, match="found no value"):
        interval([])
    with pytest.raises(ValueError, match="no seed in both"):
        paired({0: 1.0}, {1: 1.0})


def test_the_value_of_a_run_is_the_mean_of_its_last(tmp_path):
    folder = run(tmp_path / "a", [(0, 0.1), (10, 0.5), (20, None), (30, 0.7)])
    assert final_values({0: folder}, METRIC) == {0: 0.7}
    assert final_values({0: folder}, METRIC, last=2) == {0: pytest.approx(0.6)}
    with pytest.raises(DataError, match="has no value of 'actor/lr'"):
        final_values({0: folder}, "actor/lr")


def two_methods(tmp_path):
    return {
        "prime": {seed: run(tmp_path / f"prime{seed}", [(0, 0.1), (10, 0.6 + 0.1 * seed)]) for seed in (0, 1, 2)},
        "outcome only": {
            seed: run(tmp_path / f"outcome{seed}", [(0, 0.1), (10, 0.5 + 0.1 * seed)]) for seed in (0, 1, 2)
        },
    }


def test_the_table_has_each_method_and_each_difference(tmp_path):
    text = table(two_methods(tmp_path), [METRIC])
    # .6 .7 .8: mean .7, sd .1, half = 4.302653 * .1 / sqrt(3) = .2484
    assert f"| {METRIC} | prime | 3 | 0.7 | 0.1 | [0.4516, 0.9484] |" in text
    assert f"| {METRIC} | outcome only | 3 | 0.6 | 0.1 | [0.3516, 0.8484] |" in text
    assert f"| {METRIC} | prime - outcome only | 3 | +0.1 | [0.1, 0.1] |" in text


def test_with_one_seed_the_table_says_that_there_is_no_interval(tmp_path):
    runs = {"prime": {0: run(tmp_path / "a", [(1, 0.5)])}, "other": {0: run(tmp_path / "b", [(1, 0.4)])}}
    text = table(runs, [METRIC])
    assert f"| {METRIC} | prime | 1 | 0.5 |  | one seed: no interval can be given |" in text
    assert f"| {METRIC} | prime - other | 1 | +0.1 | one seed: no interval can be given |" in text


def test_methods_without_a_common_seed_have_no_difference(tmp_path):
    runs = {"a": {0: run(tmp_path / "a", [(1, 0.5)])}, "b": {1: run(tmp_path / "b", [(1, 0.4)])}}
    assert "| a - b | 0 | | no seed in both: no difference can be given |" in table(runs, [METRIC])


def test_the_plot_is_written_twice_and_shows_the_band(tmp_path):
    png, svg = plot(two_methods(tmp_path), METRIC, tmp_path / "plots" / "accuracy")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert png.name == "accuracy.png"
    assert text.count("FillBetweenPolyCollection_") == 2
    with pytest.raises(DataError, match="no run of prime has a value"):
        plot(two_methods(tmp_path / "again"), "actor/lr", tmp_path / "none")


def test_the_report_writes_table_and_plots(tmp_path):
    text = report_seeds(two_methods(tmp_path), [METRIC], tmp_path / "report")
    assert (tmp_path / "report" / "seeds.md").read_text() == text
    assert (tmp_path / "report" / "val-core_chain_accuracy_greedy.png").exists()
    assert (tmp_path / "report" / "val-core_chain_accuracy_greedy.svg").exists()


def test_a_run_that_is_being_written_can_be_read_and_a_broken_one_is_named(tmp_path):
    folder = run(tmp_path / "a", [(0, 0.1), (1, 0.2)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "val')
    assert [row["step"] for row in read_metrics(folder)] == [0, 1]
    (folder / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not JSON"):
        read_metrics(folder)
    with pytest.raises(DataError, match="is missing"):
        read_metrics(tmp_path / "nowhere")


def test_equal_values_have_an_interval_of_no_width():
    found = interval([0.5, 0.5, 0.5])
    assert (found.low, found.high) == (0.5, 0.5)
    assert not math.isnan(found.low)
