from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from rlprm.cli.main import main
from rlprm.cli.report import over_seeds, run_folders
from rlprm.errors import DataError

GREEDY = "val-core/t/accuracy/greedy"


def run(root: Path, method: str, seed: int, final: float, *, steps: int = 2, done: int = 2, prm: bool = False) -> Path:
    folder = root / method / f"seed{seed}"
    folder.mkdir(parents=True)
    rows = [{"step": 0, GREEDY: 0.1}]
    rows += [
        {"step": step, "keep/outcome_mean_fresh": final / 2, **({"prm/auc_fresh": 0.7} if prm else {})}
        for step in range(1, done + 1)
    ]
    rows[-1] = {**rows[-1], GREEDY: final}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": method, "seed": seed, "steps": steps}))
    return folder


def test_two_methods_that_share_seeds_get_a_paired_interval(tmp_path, capsys):
    # prime - plain is 0.1, 0.2, 0.3: mean 0.2, sd 0.1, t(0.975, 2) = 4.30265;
    # half width 4.30265 * 0.1 / sqrt(3) = 0.2484
    for seed, (first, second) in enumerate([(0.4, 0.3), (0.6, 0.4), (0.8, 0.5)]):
        run(tmp_path, "prime", seed, first, prm=True)
        run(tmp_path, "plain", seed, second)
    output = tmp_path / "out"
    assert main(["report", str(tmp_path / "prime"), str(tmp_path / "plain"), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert f"| {GREEDY} | prime - plain | 3 | +0.2 | [-0.04841, 0.4484] |" in said
    assert f"| {GREEDY} | prime | 3 | 0.6 | 0.2 |" in said
    # only one of the two methods has a PRM; a metric of one method is compared with nothing
    assert "| prm/auc_fresh | prime | 3 | 0.7 |" in said
    assert not re.search(r"prm/auc_fresh \| (plain|prime - plain)", said)
    assert "Not finished" not in said
    assert str(output / "seeds.md") in said
    assert (output / "seeds.md").read_text() in said
    assert {path.name for path in output.glob("*.png")} == {
        "val-core_t_accuracy_greedy.png", "keep_outcome_mean_fresh.png", "prm_auc_fresh.png",
    }  # fmt: skip


def test_a_run_that_was_cut_off_is_named(tmp_path):
    folders = [run(tmp_path, "prime", 0, 0.4), run(tmp_path, "prime", 1, 0.4, steps=9, done=5)]
    assert f"- {folders[1]} ended at step 5 of 9" in over_seeds(folders, tmp_path / "out")


def test_one_run_gets_a_summary(tmp_path, capsys):
    folder = run(tmp_path, "prime", 0, 0.4)
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "10.0% (step 0)" in said
    assert "40.0% (step 2)" in said
    assert main(["report", str(folder), "--output", str(tmp_path / "out")]) == 1
    assert "--output is for several runs" in capsys.readouterr().err


def test_folders_that_cannot_be_reported(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        run_folders(tmp_path / "absent")
    with pytest.raises(DataError, match=r"holds no run with metrics\.jsonl"):
        run_folders(tmp_path)
    first = run(tmp_path / "a", "prime", 0, 0.4)
    second = run(tmp_path / "b", "prime", 0, 0.4)
    with pytest.raises(DataError, match="both are seed 0 of 'prime'"):
        over_seeds([first, second], tmp_path / "out")
    (second / "config.yaml").write_text("- 1\n")
    with pytest.raises(DataError, match="says no name, seed or steps"):
        over_seeds([first, second], tmp_path / "out")
    (second / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"config\.yaml is missing"):
        over_seeds([first, second], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_that_logged_nothing_to_compare(tmp_path):
    folders = [run(tmp_path, "prime", seed, 0.4) for seed in (0, 1)]
    for folder in folders:
        (folder / "metrics.jsonl").write_text('{"step": 1, "timing_s/step": 1.0}\n')
    with pytest.raises(DataError, match="logged nothing that can be compared"):
        over_seeds(folders, tmp_path / "out")
