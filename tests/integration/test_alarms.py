"""A planted hack trips an alarm in a real run: it is said, braked, or ends the run with everything saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlprm.errors import AlarmRaised
from tests.integration.support import TRANSFORMERS, json_lines, train

pytestmark = pytest.mark.integration

# outcome and a source that pays for being wrong; the loop never learns enough in five steps to be always right
HACK = (
    *TRANSFORMERS, "method=oracle", "streams.process.source.kind._target_=tests.integration.planted.PaysMistakes",
    "~streams.process.source.kind.wrong", "~streams.process.source.kind.right", "estimator@streams.process.estimator=to_go",
    "normalizer@streams.process.normalizer=raw", "alarms.rules.wrong_paid.patience=2", "whiten=none",
)  # fmt: skip
MESSAGE = "alarm wrong_paid: reward/process/right_wrong_gap is"


def test_it_stops_the_run_with_its_message_and_a_saved_state_and_can_be_overruled(
    ray_once: None, model: str, tmp_path: Path
) -> None:
    stopping = [*HACK, "steps=5", "alarms.rules.wrong_paid.action=stop"]
    with pytest.raises(AlarmRaised, match=rf"{MESSAGE} -\d.*at step 2, below 0, since step 1.*alarms.rules.wrong_paid"):
        train(tmp_path, model, *stopping)
    (run,) = (each.parent for each in tmp_path.rglob("metrics.jsonl"))
    rows = json_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["alarm/wrong_paid"] for row in rows] == [0.0, 1.0]
    assert rows[1]["reward/process/wrong_mean"] > rows[1]["reward/process/right_mean"] == 0.0
    assert rows[1]["reward/process/corr_with_outcome"] < 0
    assert all(0 <= row["response_text/repetition_mean"] < 1 for row in rows)
    state = json.loads((run / "checkpoints" / "step_000002" / "state.json").read_text())  # though none was due
    assert state["alarms"]["watched"]["wrong_paid:reward/process/right_wrong_gap"]["outside"] == 2

    # resumed as it is, it stops again after a step; told to brake, it goes on with less and less of the process weight
    done = train(tmp_path, model, *HACK, "steps=4", "alarms.rules.wrong_paid.action=brake", "resume=auto")
    assert [row["step"] for row in done.metrics] == [1, 2, 3, 4]
    assert [row["alarm/brake"] for row in done.metrics] == [1.0, 1.0, 0.5, 0.25]
    # to-go credit of tokens that pay 1 is their number times half a response's length, times the weight that is left
    per_reward = [row["adv/process/abs_mean"] / row["reward/process/mean"] for row in done.metrics]
    assert per_reward[3] / per_reward[2] == pytest.approx(0.5, rel=0.2)


def test_canaries_are_asked_while_the_run_goes_on(ray_once: None, model: str, tmp_path: Path) -> None:
    done = train(tmp_path, model, *TRANSFORMERS, "method=outcome_grpo", "steps=2", "alarms.canary_every=2")
    assert "verifier/canaries_failed" not in done.metrics[0]
    assert done.metrics[1]["verifier/canaries_failed"] == 0.0
    assert done.metrics[1]["alarm/canaries"] == 0.0
