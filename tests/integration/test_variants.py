"""Other ways through the same loop, on the transformers engine: PRM update modes, baselines, KL, critic, layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.support import PRM, TRANSFORMERS, Done, moved, train

pytestmark = pytest.mark.integration


def run(folder: Path, model: str, *overrides: str) -> Done:
    """Two steps; all groups of the first rank readable."""
    return train(folder, model, *TRANSFORMERS, "steps=2", "tracker.rollout_groups=4", *overrides)


def rewards(done: Done, step: int, stream: str) -> list[float]:
    """The stream's reward of each readable response of a step."""
    found = [row["reward"][stream] for row in done.rollouts if row["step"] == step]
    assert found
    return found


def of_steps(done: Done, stream: str) -> list[list[Any]]:
    """The stream's reward of each reasoning step of each readable response; None where it says nothing."""
    return [[step["reward"][stream] for step in row["steps"]] for row in done.rollouts]


def test_a_prm_that_learns_after_scoring_knows_nothing_at_first(three_steps: Done, model: str) -> None:
    assert set(rewards(three_steps, 1, "process")) == {0.0}  # it still is its own reference
    assert any(rewards(three_steps, 2, "process"))
    assert moved(three_steps.exported / "process", model) > 1e-4


def test_a_prm_that_learns_before_scoring_pays_in_the_first_step(ray_once: None, model: str, tmp_path: Path) -> None:
    """Also: PRIME as released, reference = rollout policy, one reward a step, packed layout, two engines over gloo."""
    done = run(
        tmp_path, model, *PRM, "method=prime_as_released", "streams.process.source.kind.update=before",
        "streams.process.source.kind.reference=policy", "streams.process.source.kind.granularity=step",
        "policy.layout=packed", "streams.process.source.learner.layout=packed", "policy.token_budget=64",
        "streams.process.source.learner.token_budget=64", "placement.engines=2", "placement.weight_transport=gloo",
    )  # fmt: skip
    assert any(rewards(done, 1, "process"))
    assert all(value is not None for response in of_steps(done, "process") for value in response)
    assert moved(done.exported / "process", model) > 1e-4
    assert all(row["actor/ratio_first_diff"] <= 1e-5 for row in done.metrics)
    for publication in done.published:
        assert len(publication.engines) == 2
        assert publication.gap < 1e-5
    # quality is measured before the update all the same, when the PRM is still its own reference: no pair is ranked
    assert done.metrics[0]["prm/pair_acc_fresh"] == 0.5


def test_a_prm_that_never_learns_stays_what_it_was(ray_once: None, model: str, tmp_path: Path) -> None:
    """Also: one reward for the whole response, at its last step."""
    done = run(
        tmp_path, model, "source@streams.process.source=implicit_frozen", f"streams.process.source.model={model}",
        "streams.process.source.kind.granularity=whole",
    )  # fmt: skip
    assert moved(done.exported / "process", model) == 0
    assert moved(done.exported / "policy", model) > 1e-4
    for response in of_steps(done, "process"):
        assert all(value is None for value in response[:-1])
        assert response[-1] == 0.0
    assert all("prm/loss" not in row for row in done.metrics)


def test_ppo_learns_a_critic_and_pays_kl_in_the_loss(ray_once: None, model: str, tmp_path: Path) -> None:
    done = run(
        tmp_path, model, "method=ppo", "policy_loss=dual_clip", "policy_loss.kl_weight=0.05", "policy_loss.kl_kind=k3",
        "policy_loss.entropy_weight=0.01", "critic.learner.warmup=0", "critic.learner.epochs=2",
    )  # fmt: skip
    first, second = done.metrics
    for row in (first, second):
        assert row["critic/vf_loss"] > 0
        assert row["critic/grad_norm"] > 0
        assert row["actor/updates"] == 1
        assert row["actor/entropy"] > 0
    assert first["actor/kl_loss"] == pytest.approx(0, abs=1e-9)  # the policy still is the reference
    assert second["actor/kl_loss"] > 1e-6
    assert sorted(path.name for path in done.exported.iterdir()) == ["policy"]


def test_reinforce_plus_plus_pays_kl_in_the_reward(ray_once: None, model: str, tmp_path: Path) -> None:
    done = run(tmp_path, model, "method=outcome_reinforce_pp", "streams.kl.weight=0.1", "mismatch=truncate")
    assert set(rewards(done, 1, "kl")) == {0.0}  # the policy still is the reference
    assert any(rewards(done, 2, "kl"))
    assert {row["reward"]["outcome"] for row in done.rollouts} == {0.0, 1.0}


def test_outcome_only_needs_no_reference_and_no_prm(ray_once: None, model: str, tmp_path: Path) -> None:
    done = run(tmp_path, model, "method=outcome_rloo", "policy.zero_stage=0", "temperature=0.6")
    assert moved(done.exported / "policy", model) > 1e-4
    assert {path.stem for path in (done.folder / "logs").iterdir()} == {"policy0", "rollout0", "judge0"}
    assert not any(name.startswith("prm/") for row in done.metrics for name in row)
    assert all(row["training/rollout_logprobs_diff_max"] < 1e-4 for row in done.metrics)


@pytest.mark.long
def test_oracle_credit_pays_wrong_steps_only(ray_once: None, model: str, tmp_path: Path) -> None:
    done = run(tmp_path, model, "method=oracle")
    for row in done.rollouts:
        for step in row["steps"]:
            assert step["reward"]["process"] == {1: 0.0, 0: -1.0, None: None}[step["label"]]


@pytest.mark.long
@pytest.mark.parametrize(
    ("update", "granularity", "reference"),
    [
        ("after", "token", "policy"), ("after", "step", "initial"), ("after", "whole", "policy"),
        ("before", "token", "initial"), ("before", "step", "initial"), ("before", "whole", "policy"),
    ],
)  # fmt: skip
def test_other_kinds_of_implicit_prm_take_a_step(
    update: str, granularity: str, reference: str, ray_once: None, model: str, tmp_path: Path
) -> None:
    kind = "streams.process.source.kind"
    done = run(
        tmp_path, model, *PRM, "steps=1",
        f"{kind}.update={update}", f"{kind}.reference={reference}", f"{kind}.granularity={granularity}",
    )  # fmt: skip
    assert any(rewards(done, 1, "process")) == (update == "before")
    assert moved(done.exported / "process", model) > 1e-5
    assert moved(done.exported / "policy", model) > 1e-5
    for row in done.rollouts:
        paid = [step["reward"]["process"] is not None for step in row["steps"]]
        assert all(paid) if granularity != "whole" else (paid[-1] and not any(paid[:-1]))


@pytest.mark.long
@pytest.mark.parametrize(
    "loss",
    [
        "ce_instance_balanced", "ce_dataset_balanced", "dpo", "dpo_detached", "dpo_bon_outcome", "dpo_bon_reward", "nca",
        "kto_paired", "kto_unpaired", "bco",
    ],
)  # fmt: skip
def test_every_loss_trains_the_prm(loss: str, ray_once: None, model: str, tmp_path: Path) -> None:
    """In micro-batches that cannot hold a pair."""
    done = run(
        tmp_path, model, *PRM, f"prm_loss@streams.process.source.kind.loss={loss}",
        "streams.process.source.learner.token_budget=1",
    )  # fmt: skip
    assert moved(done.exported / "process", model) > 1e-5
    assert all(row["prm/grad_norm"] > 0 for row in done.metrics)


@pytest.mark.long
def test_istar_as_written_trains_its_prm_and_as_released_does_not(ray_once: None, model: str, tmp_path: Path) -> None:
    written = run(tmp_path / "written", model, *PRM, "method=istar_as_written")
    assert moved(written.exported / "process", model) > 1e-5
    assert all(row["prm/grad_norm"] > 0 and row["prm/pairs"] > 0 for row in written.metrics)
    released = run(tmp_path / "released", model, "method=istar_as_released")
    assert moved(released.exported / "process", model) == 0
    # its rewards are log pi_init - log pi_old: nothing at first, then whatever draws the policy back
    assert set(rewards(released, 1, "process")) == {0.0}
    assert any(rewards(released, 2, "process"))


@pytest.mark.long
@pytest.mark.parametrize("method", ["prime_reinforce", "prime_grpo", "prime_ppo", "prime_value", "prime_verl_recipe"])
def test_other_forms_of_prime_take_a_step(method: str, ray_once: None, model: str, tmp_path: Path) -> None:
    done = run(tmp_path, model, *PRM, f"method={method}")
    for role in ("policy", "process"):
        assert moved(done.exported / role, model) > 1e-5
    for row in done.rollouts:
        assert all(step["reward"]["process"] is not None for step in row["steps"])


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "kl"),
    [("outcome_grpo", "k2"), ("outcome_dr_grpo", "straight_through"), ("outcome_reinforce_pp_baseline", "k3")],
)
def test_other_outcome_only_methods_take_a_step(
    method: str, kl: str, ray_once: None, model: str, tmp_path: Path
) -> None:
    done = run(tmp_path, model, f"method={method}", "policy_loss.kl_weight=0.01", f"policy_loss.kl_kind={kl}",
               "policy.mini_batches=2", "policy.schedule=cosine")  # fmt: skip
    assert moved(done.exported / "policy", model) > 1e-5
    assert all(row["actor/ratio_first_diff"] <= 1e-5 for row in done.metrics)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_bfloat16_with_recomputed_activations(layout: str, ray_once: None, model: str, tmp_path: Path) -> None:
    done = run(
        tmp_path, model, *PRM, "model.dtype=bfloat16", "model.gradient_checkpointing=true", f"policy.layout={layout}",
        "placement=cpu_two_ranks", "policy.zero_stage=2",
    )  # fmt: skip
    assert moved(done.exported / "policy", model) > 1e-5
    assert all(row["training/rollout_logprobs_diff_max"] < 0.3 for row in done.metrics)
    assert all(publication.gap < 0.1 for publication in done.published)
