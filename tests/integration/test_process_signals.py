"""Sources without a trained PRM through whole steps: a prover, flow rewards, certainty, rules, and tasks of worked solutions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.support import CHAIN, TRANSFORMERS, Done, train

pytestmark = pytest.mark.integration


def run(folder: Path, model: str, *overrides: str) -> Done:
    """Two steps; all groups of the first rank readable."""
    return train(folder, model, *TRANSFORMERS, "steps=2", "tracker.rollout_groups=4", *overrides)


def test_the_policy_proves_its_own_steps(ray_once: None, model: str, tmp_path: Path) -> None:
    """Also: progress of a response sums to its outcome minus the chance at its prompt, the same for the whole group."""
    kind = "streams.process.source.kind"
    done = run(tmp_path, model, "method=pav", f"{kind}.samples=3", f"{kind}.best_of=2")
    for row in done.metrics:
        assert row["prover/rollouts"] > 0
        assert row["prover/rollouts"] % 3 == 0
        assert row["prover/frac_absent"] == 0.0
    starts: dict[tuple[int, int], set[float]] = {}
    for response in done.rollouts:
        paid = [step["reward"]["process"] for step in response["steps"]]
        assert all(each is not None for each in paid)
        start = round(response["outcome"] - sum(paid), 3)
        assert 0.0 <= start <= 1.0
        starts.setdefault((response["step"], response["group"]), set()).add(start)
    assert all(len(each) == 1 for each in starts.values())


def test_flow_rewards_pay_after_they_have_learnt(ray_once: None, model: str, tmp_path: Path) -> None:
    done = run(tmp_path, model, "method=rlfr", "streams.process.source.kind.quiet=1")
    first, second = done.metrics
    assert first["reward/process/frac_present"] == 0.0
    assert second["reward/process/frac_present"] == 1.0
    assert second["reward/process/min"] == pytest.approx(-0.01)
    assert 0 < second["flow/frac_punished"] < 1
    assert first["flow/deviation"] > 0


def test_levels_of_rules_steps_outcome_and_certainty(ray_once: None, model: str, tmp_path: Path) -> None:
    """Shop-R1's reward: a rule in its own processes, exact steps, the outcome, self-certainty and a KL price."""
    done = run(tmp_path, model, "method=shop_r1")
    for row in done.metrics:
        assert row["rule/form/frac_absent"] == 0.0
        assert row["reward/outcome/max"] <= 1000.81
        assert row["reward/outcome/min"] >= 0.0


def test_turns_are_paid_without_any_outcome(ray_once: None, model: str, tmp_path: Path) -> None:
    done = run(tmp_path, model, "method=step_grpo")
    assert all(row["reward/process/min"] >= -1.0 for row in done.metrics)
    assert all(row["adv/process/share"] == pytest.approx(1.0) for row in done.metrics if row["adv/process/std"] > 0)


def test_worked_solutions_train_beside_the_task(ray_once: None, model: str, tmp_path: Path) -> None:
    sizes = [f"data.train.{name}.reader.source.size=64" for name in ("fill", "order")]
    done = run(
        tmp_path, model, "method=mr_rlvr", "data=chain_arithmetic_masked", "verifier=worked_steps", *CHAIN, *sizes,
        "data.train.fill.reader.source.hide=1", "data.max_prompt_tokens=32", "prompts_per_step=8",
    )  # fmt: skip
    prompts = {row["prompt"] for row in done.rollouts}
    assert any(prompt.endswith("\n\n") for prompt in prompts)
    assert any(not prompt.endswith("\n\n") for prompt in prompts)
    assert all(row["verifier/frac_absent"] == 0.0 for row in done.metrics)
    assert all(row[f"data/{name}/num_too_long"] == 0 for row in done.metrics for name in ("chain", "fill", "order"))
