"""Whole steps of the real loop on Ray, vLLM and DeepSpeed: weights, log-probs, ratios and versions, all the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.integration.support import PRM, PROBES, VLLM, Done, moved, train

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def zero3(ray_once: None, model: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Two steps under ZeRO-3 at T = 0.6, two optimizer steps each, weights over gloo in several buckets."""
    return train(
        tmp_path_factory.mktemp("zero3"), model, *PRM, *VLLM, "placement=cpu_two_ranks", "policy.zero_stage=3",
        "streams.process.source.learner.zero_stage=3", "placement.weight_transport=gloo",
        "placement.weight_bucket_bytes=65536", "temperature=0.6", "policy.mini_batches=2", "steps=2",
    )  # fmt: skip


@pytest.fixture(params=["three_steps", "zero3"])
def run(request: pytest.FixtureRequest) -> Done:
    return request.getfixturevalue(request.param)


def test_after_each_publish_engine_and_trainer_agree_on_fixed_tokens(run: Done) -> None:
    assert len(run.published) == 1 + len(run.metrics_of_steps)  # where digests differ, publish raises StaleWeights
    for publication in run.published:
        assert all(engine.numel() == sum(map(len, PROBES)) for engine in publication.engines)
        assert publication.gap < 1e-5
        assert publication.trainer.min() < -0.5  # not all are certain: at log-prob 0 any two models would agree


def test_every_version_has_other_weights(run: Done) -> None:
    for before, after in zip(run.published, run.published[1:], strict=False):
        assert after.version > before.version
        assert (after.trainer - before.trainer).abs().max() > 1e-3


def test_rollouts_carry_the_version_that_sampled_them(run: Done) -> None:
    updates = run.metrics[-1]["actor/updates"]
    for step, rows in enumerate(run.rows):
        assert {row.version for row in rows} == {step * updates}
    for row in run.metrics_of_steps:
        assert row["weights/version"] == row["step"] * updates
        assert row["staleness/max"] == 0


def test_engine_and_trainer_give_the_sampled_tokens_the_same_logprobs(run: Done) -> None:
    for row in run.metrics_of_steps:
        assert 0 <= row["training/rollout_logprobs_diff_max"] < 1e-4


def test_the_ratio_is_one_before_the_first_update(run: Done) -> None:
    for row in run.metrics_of_steps:
        assert row["actor/ratio_first_diff"] <= 1e-5


def test_a_second_mini_batch_has_other_ratios(zero3: Done) -> None:
    assert [row["actor/updates"] for row in zero3.metrics] == [2, 2]
    assert all(row["actor/ratio_max"] > 1 + 1e-4 for row in zero3.metrics)


def test_policy_and_prm_learn(run: Done, model: str) -> None:
    assert moved(run.exported / "policy", model) > 1e-4
    assert moved(run.exported / "process", model) > 1e-4
    for row in run.metrics_of_steps:
        assert row["actor/grad_norm"] > 0
        assert row["prm/grad_norm"] > 0


@pytest.mark.long
@pytest.mark.parametrize("transport", ["gloo", "object_store"])
def test_two_vllm_engines_hold_the_same_weights(transport: str, ray_once: None, model: str, tmp_path: Path) -> None:
    done = train(
        tmp_path, model, *PRM, *VLLM, "placement.engines=2", f"placement.weight_transport={transport}", "steps=2"
    )
    assert len(done.published) == 3
    for publication in done.published:
        first, second = publication.engines
        assert (first - second).abs().max() < 1e-6
        assert publication.gap < 1e-5
    assert all((done.folder / "logs" / f"rollout{number}.log").stat().st_size > 0 for number in (0, 1))


def test_every_step_reports_all_there_is_to_know(three_steps: Done) -> None:
    rows = three_steps.metrics
    assert [row["step"] for row in rows] == [0, 1, 2, 3]  # 0: evaluation before training
    for row in rows[1:]:
        assert row["training/global_step"] == row["step"]
        assert row["training/rollouts_total"] == 16 * row["step"]
        assert row["keep/prompts_kept"] == 4
        assert 0 <= row["keep/outcome_mean_fresh"] <= 1
        assert row["prm/fresh_rows"] == 16
        assert row["timing_s/step"] > 0
        assert "training/nonfinite_metrics" not in row
    assert {row["step"] for row in rows if "val-core/chain_test/accuracy/greedy" in row} == {0, 2, 3}
    assert all("val-core/chain_test/accuracy/mean@2" in row for row in (rows[0], rows[2], rows[3]))


def test_configuration_and_versions_are_on_disk_before_the_first_weights_go_out(three_steps: Done) -> None:
    assert {"config.yaml", "run.json"} <= three_steps.files_before
    config = yaml.safe_load((three_steps.folder / "config.yaml").read_text())
    assert (config["steps"], config["placement"]["policy_ranks"], config["policy"]["zero_stage"]) == (3, 2, 2)
    (start,) = json.loads((three_steps.folder / "run.json").read_text())["starts"]
    assert {"torch", "ray", "deepspeed", "transformers"} <= set(start["versions"])
    assert start["config"] == "config.yaml"


def test_rollouts_can_be_read(three_steps: Done) -> None:
    rows = three_steps.rollouts
    assert sorted({row["step"] for row in rows}) == [1, 2, 3]
    assert {len([row for row in rows if row["step"] == step]) for step in (1, 2, 3)} == {8}  # 2 groups of 4
    for row in rows:
        assert row["prompt"].endswith("\n")
        assert row["outcome"] in (0.0, 1.0)
        assert row["reward"]["outcome"] == row["outcome"]
        assert set(row["reward"]) == {"outcome", "process"}
        assert "".join(step["text"] for step in row["steps"]) == row["response"]
        for step in row["steps"]:
            assert set(step["parts"]) == {"outcome", "process"}
            assert step["advantage"] == pytest.approx(sum(step["parts"].values()), abs=1e-4)


def test_tensorboard_holds_every_step(three_steps: Done) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(three_steps.folder / "tensorboard"))
    events.Reload()
    written = {event.step: event.value for event in events.Scalars("actor/pg_loss")}
    expected = {row["step"]: row["actor/pg_loss"] for row in three_steps.metrics_of_steps}
    assert written == pytest.approx(expected, rel=1e-6)


def test_wandb_writes_an_offline_run_without_a_key(three_steps: Done) -> None:
    (offline,) = (three_steps.folder / "wandb").glob("offline-run-*")
    (file,) = offline.glob("run-*.wandb")
    assert b"actor/pg_loss" in file.read_bytes()


def test_logs_hold_the_chatter_of_the_actors(three_steps: Done) -> None:
    assert all(path.stat().st_size > 0 for path in (three_steps.folder / "logs").glob("rollout*.log"))
