"""A run stores its rollouts; fine-tuning and preference optimisation learn from them, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlprm.cli.main import main
from rlprm.data.stored import by_prompt, right_responses, stored
from tests.integration.support import TRANSFORMERS, Done, moved, train

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def stored_run(ray_once: None, model: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Three steps on two ranks, every rollout stored, with exact step rewards."""
    return train(
        tmp_path_factory.mktemp("stored"), model, *TRANSFORMERS, "method=oracle", "placement=cpu_two_ranks", "steps=3",
        "tracker.rollout_groups=null", "data.train.chain.reader.source.size=4",  # the same four prompts in every step
    )  # fmt: skip


LEARNER = ("learner.lr=3e-3", "learner.warmup=0", "steps=2", "batch_size=8", "placement.start_timeout_s=120")


def test_every_rollout_of_every_rank_is_stored(stored_run: Done) -> None:
    rollouts = stored(str(stored_run.folder))
    assert len(rollouts) == 3 * 4 * 4
    assert [row["group"] for row in stored_run.rollouts if row["step"] == 1] == sorted([0, 1, 2, 3] * 4)
    assert len(by_prompt(rollouts)) <= 4  # two of the four problems may be the same
    # what was stored is what was sampled: outcomes, lengths and versions of the row table, in the table's order
    rows = [row for step in stored_run.rows for row in step]
    assert [each.outcome for each in rollouts] == [row.outcome for row in rows]
    assert [len(each.response) for each in rollouts] == [row.response_length for row in rows]
    assert [each.version for each in rollouts] == [row.version for row in rows]
    for each in rollouts:
        assert max(each.logprobs) <= 0
        assert sum(end - start for start, end in each.spans) == len(each.response)
        assert set(each.labels) <= {0, 1, -1}
        assert len(each.rewards["process"]) == len(each.spans)


def test_rejection_sampling_fine_tuning_learns_the_right_responses(
    stored_run: Done, model: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = str(stored_run.folder)
    examples = right_responses(runs=run, min_outcome=1.0, distinct=True, per_prompt=4, truncated=False, seed=0)
    assert 0 < len(examples) < 48
    before, after = (
        loss(["sft", "examples=rollouts", f"examples.runs=[{run}]", f"model.path={path}", f"output={out}"], capsys)
        for path, out in ((model, tmp_path / "one"), (tmp_path / "one", tmp_path / "two"))
    )
    assert after < before  # per token, on the same examples
    assert moved(tmp_path / "one", model) > 1e-4


def loss(words: list[str], capsys: pytest.CaptureFixture) -> float:
    assert main([*words, *LEARNER, "--quiet"]) == 0
    return float(capsys.readouterr().out.split("loss ")[-1].split()[0].rstrip(","))


@pytest.mark.parametrize(
    "preference",
    [
        ("preference=dpo", "placement=cpu_two_ranks"),
        pytest.param(("preference=step_dpo",), marks=pytest.mark.long),
        pytest.param(("preference=step_dpo", "preference.steps=process"), marks=pytest.mark.long),
        pytest.param(
            ("preference=weighted_dpo", "learner.zero_stage=3", "placement=cpu_two_ranks"), marks=pytest.mark.long
        ),
    ],
)
def test_preferences_are_learnt(
    preference: tuple[str, ...], stored_run: Done, model: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [
        "dpo",
        *preference,
        f"runs={stored_run.folder}",
        f"model.path={model}",
        f"output={tmp_path}/out",
        "beta=1.0",
    ]
    found = loss([*words, "pairs_per_prompt=null"], capsys)
    assert 0 < found < 0.6931  # mean of two steps; log 2 before the first
    assert moved(tmp_path / "out", model) > 1e-4
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_cannot_be_learnt_from_is_refused_before_anything_starts(
    stored_run: Done, model: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def refused(*words: str) -> str:
        assert main([*words, f"output={tmp_path}/out", f"model.path={model}", "--quiet"]) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    run = stored_run.folder
    assert "holds no run" in refused("dpo", f"runs={tmp_path}")
    assert "holds no run" in refused("sft", "examples=rollouts", f"examples.runs={tmp_path}")
    assert "no step reward of the stream 'judge'" in refused(
        "dpo", f"runs={run}", "preference=weighted_dpo", "preference.quality=judge"
    )
    assert "no pair in 48 stored rollouts of" in refused(
        "dpo", f"runs={run}", "preference=step_dpo", "preference.steps=judge"
    )
