"""Where a configuration sends metrics: shared TensorBoard folders, one entry per run on Weights & Biases, artifacts."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlprm.cli.compose import composed
from rlprm.config import TrainConfig, validated
from rlprm.run.tracker import send_models
from rlprm.run.tracking import trackers_of, wandb_id
from tests.unit.run.wandb_log import contents


@pytest.fixture
def discreet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No key anywhere, and W&B's own caches in a folder of the test."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_caches"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path


def log(folder: Path, *overrides: str, resume_from: int | None = None) -> TrainConfig:
    made = composed("train", ["recipe=chain_arithmetic_cpu", *overrides])
    config = validated(TrainConfig, made.values)
    folder.mkdir(parents=True, exist_ok=True)
    trackers = trackers_of(config, made, folder, resume_from)
    trackers.log(1, {"actor/lr": 1e-6})
    trackers.close()
    return config


def test_tensorboard_files_of_all_runs_lie_in_one_shared_folder(tmp_path):
    folder = tmp_path / "runs" / "quick" / "seed3"
    log(folder, f"tracker.tensorboard_dir={tmp_path}/shared")
    assert list((tmp_path / "shared" / "quick" / "seed3").glob("events.*"))
    assert not (folder / "tensorboard").exists()


def test_tensorboard_files_stay_in_the_run_folder_by_default(tmp_path):
    log(tmp_path / "runs" / "quick" / "seed0")
    assert list((tmp_path / "runs" / "quick" / "seed0" / "tensorboard").glob("events.*"))


def test_group_job_type_tags_and_artifact_reach_wandb(discreet):
    folder = discreet / "runs" / "quick" / "seed0"
    log(
        folder, "tracker=wandb", "tracker.tensorboard=false", "tracker.group=sweep7", "tracker.job_type=cell9",
        "tracker.tags=[spot,a100]", "tracker.config_artifact=true",
    )  # fmt: skip
    (file,) = (folder / "wandb").glob(f"offline-run-*-{wandb_id(folder)}/*.wandb")
    written = contents(file)
    for word in (b"sweep7", b"cell9", b"spot", b"a100", b"chain_arithmetic_cpu-config"):
        assert word in written, word


def test_no_artifact_unless_asked_for(discreet):
    folder = discreet / "runs" / "quick" / "seed0"
    log(folder, "tracker=wandb", "tracker.tensorboard=false")
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    assert b"-config" not in contents(file)


def test_a_resumed_run_keeps_its_entry(discreet):
    folder = discreet / "runs" / "quick" / "seed0"
    log(folder, "tracker=wandb", "tracker.tensorboard=false")
    first = wandb_id(folder)
    log(folder, "tracker=wandb", "tracker.tensorboard=false", resume_from=1)
    assert wandb_id(folder) == first
    # two within a second are numbered
    runs = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert all(first in name for name in runs)


def test_exported_models_become_an_artifact_of_the_run(discreet):
    folder = discreet / "runs" / "quick" / "seed0"
    model = discreet / "out" / "policy"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    folder.mkdir(parents=True)
    assert send_models(folder, project="p", run_id="id7", name="quick", models=[model], step=4) == "offline"
    (file,) = (folder / "wandb").glob("offline-run-*-id7/*.wandb")
    assert b"quick-models" in contents(file)
