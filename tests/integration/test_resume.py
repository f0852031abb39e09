"""A run that is cut off and continued takes the very steps that it would have taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import THREE_STEPS
from tests.integration.support import PRM, TRANSFORMERS, Done, train

pytestmark = pytest.mark.integration

# What depends on the clock and the machine, and on nothing that is saved.
MEASURED = ("timing_s/", "perf/")


def decided(row: Mapping[str, Any]) -> dict[str, Any]:
    """A step's metrics without those of the clock."""
    return {name: value for name, value in row.items() if not name.startswith(MEASURED)}


def step(rows: Sequence[Mapping[str, Any]], number: int) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["step"] == number]


def assert_same_step(whole: Done, resumed: Done, number: int) -> None:
    """Step ``number`` of both: the same rows, the same readable rollouts, the same metrics, to the last bit."""
    assert resumed.rows[-1] == whole.rows[number - 1]  # prompts, outcomes, lengths, versions
    assert step(resumed.rollouts, number) == step(whole.rollouts, number)  # texts, rewards of each stream, advantages
    (expected,), (found,) = step(whole.metrics, number), step(resumed.metrics, number)
    assert decided(found) == decided(expected)


@pytest.fixture(scope="module")
def resumed(three_steps: Done, model: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The run of three steps once more, after its last checkpoint has lost a file: back to step 2, then step 3."""
    again = tmp_path_factory.mktemp("resumed")
    shutil.copytree(three_steps.folder.parent, again / "train", ignore=shutil.ignore_patterns("exported"))
    newest = again / "train" / "seed0" / "checkpoints" / "step_000003"
    next(newest.rglob("*.pt")).unlink()
    return train(again, model, *THREE_STEPS, "resume=auto")


def test_a_damaged_checkpoint_is_passed_over_and_named(resumed: Done) -> None:
    assert "skipped a damaged checkpoint" in resumed.screen
    assert "step_000003: missing: " in resumed.screen
    assert len(resumed.rows) == 1  # step 3 and nothing else was run


def test_the_next_step_is_the_same(three_steps: Done, resumed: Done) -> None:
    assert_same_step(three_steps, resumed, 3)


def test_weights_go_to_the_engine_after_a_resume_and_after_its_step(three_steps: Done, resumed: Done) -> None:
    before, after = resumed.published
    assert (before.version, after.version) == (2, 3)
    assert before.gap < 1e-5
    assert after.gap < 1e-5
    assert before.trainer.equal(three_steps.published[2].trainer)
    assert after.trainer.equal(three_steps.published[3].trainer)


def test_prm_trust_and_cursor_go_on(three_steps: Done, resumed: Done) -> None:
    assert (resumed.restored, resumed.taken) == (8, 12)
    (row,) = step(resumed.metrics, 3)
    assert row["training/rollouts_total"] == 48
    states = [json.loads((run.folder / "checkpoints" / "step_000003" / "state.json").read_text())
              for run in (three_steps, resumed)]  # fmt: skip
    assert states[0] == states[1]
    assert states[0]["trust"]["process"]["weight"] > 0  # something had been measured, so there was something to lose


def test_policy_and_prm_end_with_the_same_weights(three_steps: Done, resumed: Done) -> None:
    for role in ("policy", "process"):
        whole, again = (run.exported / role / "model.safetensors" for run in (three_steps, resumed))
        assert whole.read_bytes() == again.read_bytes()


def test_each_step_stands_in_the_files_once(resumed: Done) -> None:
    assert [row["step"] for row in resumed.metrics] == [0, 1, 2, 3]
    assert len(resumed.rollouts) == 3 * 8
    starts = json.loads((resumed.folder / "run.json").read_text())["starts"]
    assert [start["config"] for start in starts] == ["config.yaml", "config.start2.yaml"]


def test_a_finished_run_is_said_to_be_complete(resumed: Done, model: str) -> None:
    output = resumed.folder.parents[1]
    again = train(output, model, *THREE_STEPS, "resume=auto")
    assert "is complete (3 steps)" in again.screen
    assert not again.published


LEARNERS = {
    "zero3": (*PRM, "policy.zero_stage=3", "streams.process.source.learner.zero_stage=3", "placement=cpu_two_ranks"),
    "two-prm-ranks": (*PRM, "policy.zero_stage=1", "streams.process.source.learner.zero_stage=1",
                      "placement.prm_ranks=2"),
    "ppo": ("method=ppo", "policy.epochs=2"),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("kind", LEARNERS)
def test_a_run_of_two_steps_continues_as_one_of_three(kind: str, ray_once: None, model: str, tmp_path: Path) -> None:
    settings = (*TRANSFORMERS, *LEARNERS[kind], "tracker.rollout_groups=4")
    whole = train(tmp_path / "whole", model, *settings, "steps=3")
    train(tmp_path / "cut", model, *settings, "steps=2")
    resumed = train(tmp_path / "cut", model, *settings, "steps=3", "resume=auto")
    assert len(resumed.rows) == 1
    assert_same_step(whole, resumed, 3)
    assert resumed.published[-1].trainer.equal(whole.published[-1].trainer)
