from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from rlprm.core.metrics import check_name
from rlprm.errors import DataError
from rlprm.report import summary
from rlprm.report.summary import Change, print_summary, summarise


@pytest.fixture
def folder(tmp_path):
    rows = [{"step": 0, "val-core/chain/accuracy/greedy": 0.25, "val-core/chain/accuracy/mean@4": 0.3}]
    for step in range(1, 13):
        rows.append(
            {
                "step": step,
                "prm/auc_fresh": 0.5 + step / 100,
                "prm/auc_surprisal": 0.6,
                "prm/first_wrong_hit": 0.7,
                "timing_s/step": 10.0,
                "timing_s/collect": 6.0,
                "timing_s/learn": 3.0,
            }
        )
    rows[-1] |= {"val-core/chain/accuracy/greedy": 0.75, "val-core/chain/accuracy/mean@4": 0.6}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_what_changed_what_the_prm_knew_and_where_the_time_went(folder):
    found = summarise(folder)
    assert found.steps == 12
    assert found.accuracy == [
        Change(source="chain", kind="greedy", before=0.25, before_step=0, after=0.75, after_step=12),
        Change(source="chain", kind="mean@4", before=0.3, before_step=0, after=0.6, after_step=12),
    ]
    # the last ten of twelve: steps 3 to 12, mean 7.5 -> .5 + .075
    assert [(item.name, round(item.prm, 9), item.surprisal and round(item.surprisal, 9)) for item in found.quality] == [
        ("AUC of responses", 0.575, 0.6),
        ("first wrong step found", 0.7, None),
    ]
    assert found.total_seconds == pytest.approx(120.0)
    assert found.seconds == [("collect", pytest.approx(72.0)), ("learn", pytest.approx(36.0))]


def shown(folder):
    out = Console(file=io.StringIO(), width=120)
    print_summary(folder, out)
    return out.file.getvalue()


def test_the_screen_says_it_all(folder):
    (folder / "tensorboard").mkdir()
    (folder / "rollouts.jsonl").touch()
    (folder / "wandb" / "offline-run-1").mkdir(parents=True)
    text = shown(folder)
    for part in (
        "25.0% (step 0)",
        "75.0% (step 12)",
        "+50.0 points",
        "sampled (mean@4)",
        "-0.025",
        "not logged",
        "2 min 00 s in all",
        "60%",
        f"Run folder:      {folder}\n",
        f"tensorboard --logdir {folder}/tensorboard\n",
        f"wandb sync {folder}/wandb/offline-run-1\n",
        f"{folder}/rollouts.jsonl\n",
    ):
        assert part in text, part


def test_a_run_without_evaluation_says_so(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "timing_s/step": 2.0}\n')
    text = shown(tmp_path)
    assert "No evaluation was logged" in text
    assert "PRM on fresh" not in text
    with pytest.raises(DataError):
        summarise(tmp_path / "nowhere")


def test_the_summary_reads_names_that_exist():
    for _, prm, baseline in summary._QUALITY:
        check_name(prm)
        check_name(baseline)
