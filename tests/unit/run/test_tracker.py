from __future__ import annotations

import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlprm.errors import ConfigError
from rlprm.run import tracker
from rlprm.run.tracker import JsonLines, MetricsLog, RolloutLog, TensorBoard, Trackers, _wandb_mode


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_step_is_one_line_of_strict_json(tmp_path):
    trackers = Trackers([MetricsLog(tmp_path)], RolloutLog(tmp_path))
    trackers.log(0, {"val-core/gsm8k/accuracy/greedy": 0.25})
    trackers.log(1, {"actor/pg_loss": 0.5, "timing_s/generate": 2.0})
    trackers.rollouts(1, [{"prompt": "1+1=", "response": "２"}, {"prompt": "2+2=", "response": "4"}])
    trackers.close()
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": 0, "val-core/gsm8k/accuracy/greedy": 0.25},
        {"step": 1, "actor/pg_loss": 0.5, "timing_s/generate": 2.0},
    ]
    assert [row["response"] for row in rows(tmp_path / "rollouts.jsonl")] == ["２", "4"]
    assert "２" in (tmp_path / "rollouts.jsonl").read_text()  # readable, not escaped


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
    trackers = Trackers([MetricsLog(tmp_path)])
    trackers.log(1, {"actor/lr": 1.0})
    assert len(rows(tmp_path / "metrics.jsonl")) == 1
    trackers.close()


def test_values_that_are_not_finite_are_null_and_counted(tmp_path):
    trackers = Trackers([MetricsLog(tmp_path), TensorBoard(tmp_path / "tensorboard")])
    trackers.log(1, {"actor/pg_loss": math.nan, "actor/grad_norm": math.inf, "actor/lr": 0.5})
    trackers.close()
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": 1, "actor/pg_loss": None, "actor/grad_norm": None, "actor/lr": 0.5, "training/nonfinite_metrics": 2.0}
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["actor/lr", "training/nonfinite_metrics"]


def test_rows_that_are_not_json_are_refused(tmp_path):
    lines = JsonLines(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        lines.write({"x": math.nan})
    lines.close()
    assert (tmp_path / "a.jsonl").read_text() == ""


def test_a_name_outside_the_table_is_refused_and_nothing_is_written(tmp_path):
    trackers = Trackers([MetricsLog(tmp_path)])
    with pytest.raises(ConfigError, match="actor/learning_rate"):
        trackers.log(1, {"actor/lr": 1.0, "actor/learning_rate": 1.0})
    trackers.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_step_is_logged_once(tmp_path):
    trackers = Trackers([MetricsLog(tmp_path)])
    trackers.log(3, {"actor/lr": 1.0})
    with pytest.raises(ValueError, match="step 3 came after step 3"):
        trackers.log(3, {"actor/lr": 1.0})
    trackers.close()


def test_a_resume_cuts_off_what_is_run_again_and_what_was_torn(tmp_path):
    first = Trackers([MetricsLog(tmp_path)], RolloutLog(tmp_path))
    for step in range(1, 6):
        first.log(step, {"actor/lr": float(step)})
        first.rollouts(step, [{"response": "a"}, {"response": "b"}])
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "actor')
    again = Trackers([MetricsLog(tmp_path, resume_from=3)], RolloutLog(tmp_path, resume_from=3))
    again.log(4, {"actor/lr": 40.0})
    again.close()
    assert [(row["step"], row["actor/lr"]) for row in rows(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]
    assert [row["step"] for row in rows(tmp_path / "rollouts.jsonl")] == [1, 1, 2, 2, 3, 3]


def test_a_file_of_another_run_is_not_continued(tmp_path):
    MetricsLog(tmp_path).close()
    with pytest.raises(ConfigError, match="exists already"):
        MetricsLog(tmp_path)


def test_tensorboard_hides_the_steps_that_are_run_again(tmp_path):
    first = TensorBoard(tmp_path / "tensorboard")
    for step in (1, 2, 3):
        first.log(step, {"actor/lr": float(step)})
    first.close()
    again = TensorBoard(tmp_path / "tensorboard", resume_from=1)
    again.log(2, {"actor/lr": 20.0})
    again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("actor/lr")] == [(1, 1.0), (2, 20.0)]


class Broken:
    def __init__(self):
        self.closed = False

    def log(self, step, metrics):
        pass

    def close(self):
        self.closed = True
        raise OSError("disk gone")


def test_every_sink_is_closed_though_one_fails(tmp_path):
    first, second = Broken(), Broken()
    with pytest.raises(OSError, match="disk gone"):
        Trackers([first, second]).close()
    assert first.closed
    assert second.closed


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, None, "offline"),
        ({"WANDB_API_KEY": "x" * 40}, None, "online"),
        ({"WANDB_API_KEY": "x" * 40, "WANDB_MODE": "disabled"}, None, "disabled"),
        ({}, "machine api.wandb.ai login user password xyz\n", "online"),
        ({}, "machine other.example login user password xyz\n", "offline"),
    ],
)
def test_wandb_goes_online_only_with_a_key(tmp_path, monkeypatch, environment, netrc, mode):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if netrc is not None:
        (tmp_path / "netrc").write_text(netrc)
    assert _wandb_mode() == mode


def test_metrics_may_be_any_real_number(tmp_path):
    assert tracker.finite({"actor/lr": torch.tensor(0.5).item()}) == {"actor/lr": 0.5}
