"""A PRM made by `rlprm prm` pays steps in a run, and chooses rollouts in another: real Ray, DeepSpeed and transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlprm.cli.main import main
from tests.integration.support import TRANSFORMERS, moved, train

pytestmark = pytest.mark.integration

TASK = ["modulus=3", "operations=[2,2]", "seed=0", "share=0.0", "mistakes=0.4"]


@pytest.fixture(scope="module")
def prm(ray_once: None, model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("prm")
    words = [
        f"model.path={model}", f"output={folder}/model", "steps=6", "batch_size=16", "learner.lr=1e-3", "learner.warmup=0",
        *(f"{part}.{word}" for part in ("solutions", "held_out") for word in TASK), "solutions.size=96", "held_out.size=64",
    ]  # fmt: skip
    assert main(["prm", *words, "--quiet"]) == 0
    return f"{folder}/model"


def test_the_folder_is_an_ordinary_token_classifier(prm: str) -> None:
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    loaded = AutoModelForTokenClassification.from_pretrained(prm)
    assert loaded.config.num_labels == 1
    assert bool(loaded.score.weight.abs().sum() > 0)
    assert AutoTokenizer.from_pretrained(prm)("1+1\n")["input_ids"]


def test_its_numbers_are_paid_step_by_step(prm: str, model: str, tmp_path: Path) -> None:
    done = train(
        tmp_path, model, *TRANSFORMERS, "method=pure", f"streams.process.source.model={prm}", "steps=3",
        "tracker.rollout_groups=4",
    )  # fmt: skip
    paid = [[step["reward"]["process"] for step in row["steps"]] for row in done.rollouts]
    assert any(len(steps) > 1 for steps in paid)
    assert all(-1.0 < value < 1.0 for steps in paid for value in steps)
    assert any(len(set(steps)) > 1 for steps in paid)  # each step has a number of its own
    for row in done.metrics:
        assert row["prm/frac_steps_cut"] == row["prm/frac_forged"] == 0.0
        assert 0 <= row["prm/step_auc"] <= 1
        assert row["adv/process/std"] > 0
    assert moved(done.exported / "policy", model) > 1e-5


def test_it_chooses_rollouts_and_pays_nothing(prm: str, model: str, tmp_path: Path) -> None:
    done = train(
        tmp_path, model, *TRANSFORMERS, "method=prof", "source@streams.process.source=discriminative",
        f"streams.process.source.model={prm}", "select.keep=2", "steps=2",
    )  # fmt: skip
    for row in done.metrics:
        assert row["select/rows_out"] == row["select/rows_in"] / 2
        assert row["adv/process/abs_mean"] == 0.0
