"""Each rule about several settings at once, broken alone; the configuration without that change is valid."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from rlprm.config import TrainConfig, validated
from rlprm.errors import ConfigError
from tests.contract import options as listing

BASES: dict[str, list[str]] = {
    "prime": ["method=prime_as_written"],
    "ppo": ["method=ppo"],
    "reinforce": ["method=outcome_reinforce_pp"],
    "oracle": ["method=oracle"],
    "gpu": ["method=prime_as_written", "placement=gpu1"],
}


@pytest.fixture(scope="module")
def bases() -> dict[str, dict[str, Any]]:
    return {name: dict(listing.values("train", ["model.path=x", *overrides])) for name, overrides in BASES.items()}


def at(values: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values


def with_changes(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    copied = copy.deepcopy(values)
    for path, value in changes.items():
        section, _, key = path.rpartition(".")
        node = at(copied, section) if section else copied
        node[key] = at(values, value[1:]) if isinstance(value, str) and value.startswith("=") else value
    return copied


GATE = {"_target_": "rlprm.core.gates.trust_gate", "_partial_": True}
SIGN = {"_target_": "rlprm.core.gates.sign_consistent", "_partial_": True}
TO_GO = {"_target_": "rlprm.core.estimators.to_go", "_partial_": True, "gamma": 1.0}
POSTERIOR = {"_target_": "rlprm.core.merge.posterior_gate", "_partial_": True, "stream": "elsewhere"}
BAND = {"_target_": "rlprm.data.keep.accuracy_band", "_partial_": True, "low": 0.8, "high": 0.2}
REGEX = {"_target_": "rlprm.core.steps.regex", "_partial_": True, "pattern": "("}


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (
            "prime",
            {"streams.outcome.source": "=streams.process.source"},
            "streams.outcome is built in and has a source",
        ),
        ("prime", {"streams.process.source": None}, "streams.process has no source"),
        ("prime", {"streams.process.source.learner": None}, "only one of model and learner"),
        ("prime", {"streams.process.source.model": None}, "only one of model and learner"),
        ("prime", {"streams.second": "=streams.process"}, "process, second each train a PRM"),
        ("prime", {"responses_per_prompt": 1}, "responses_per_prompt is 1; use at least 2"),
        ("reinforce", {"policy_loss.kl_weight": 0.1}, "KL is both a reward stream and a loss"),
        ("ppo", {"streams.outcome.estimator": TO_GO}, "with a critic GAE accumulates, so the estimator must be none"),
        ("ppo", {"streams.outcome.gate": SIGN}, "not linear, so one critic cannot be its baseline"),
        ("prime", {"keep.min_prompts": 33}, "no step could ever have enough prompts"),
        ("prime", {"placement.policy_ranks": 2}, "set keep.min_prompts to at least 2"),
        # 2 policy ranks and 3 PRM ranks share 6 shards: 3 prompts would leave some of them empty
        (
            "prime",
            {"placement.policy_ranks": 2, "placement.prm_ranks": 3, "keep.min_prompts": 3},
            "set keep.min_prompts to at least 6",
        ),
        ("prime", {"policy.mini_batches": 33}, "policy.mini_batches is 33 and prompts_per_step 32"),
        ("ppo", {"critic.learner.mini_batches": 33}, "critic.learner.mini_batches is 33"),
        ("prime", {"streams.process.source.learner.mini_batches": 33}, "source.learner.mini_batches is 33"),
        ("prime", {"policy.offload": "cpu"}, "policy.offload is cpu on device cpu"),
        ("prime", {"streams.process.source.learner.offload": "cpu"}, "source.learner.offload is cpu on device cpu"),
        ("gpu", {"placement.weight_transport": "gloo"}, "weight_transport gloo moves tensors on CPU"),
        ("prime", {"placement.weight_transport": "nccl"}, "weight_transport nccl needs device cuda"),
        ("prime", {"placement.gpus_per_rank": 1.0}, "expected 0 on cpu and more than 0 on cuda"),
        ("gpu", {"placement.gpus_per_engine": 0.0}, "expected 0 on cpu and more than 0 on cuda"),
        ("prime", {"policy_loss.horizon": 64}, "needed by seq-mean-token-sum-norm and by no other mode"),
        (
            "prime",
            {"policy_loss.aggregation": "seq-mean-token-sum-norm"},
            "needed by seq-mean-token-sum-norm and by no other mode",
        ),
        ("prime", {"mismatch.cap": 2.0}, "none takes neither, band both"),
        ("prime", {"mismatch.mode": "band", "mismatch.cap": 2.0}, "none takes neither, band both"),
        ("prime", {"mismatch.mode": "truncate", "mismatch.cap": 0.5}, "mismatch: .*cap >= 1"),
        ("prime", {"streams.outcome.gate": GATE}, "streams.outcome.gate is trust"),
        ("oracle", {"streams.process.gate": GATE}, "its trust would stay 0"),
        ("prime", {"streams.process.merge": POSTERIOR}, "elsewhere"),
        ("reinforce", {"streams.kl.normalizer.bound": "tanh"}, "the kl stream is never normalized"),
        ("prime", {"streams.process.normalizer.order": "none"}, "streams: order is none with both"),
        ("prime", {"keep.rule": BAND}, "keep.rule: the accuracy band is 0.8 to 0.2"),
        ("prime", {"splitter": REGEX}, "splitter: the step pattern .* is no regular expression"),
        ("prime", {"policy_loss.surrogate.clip_low": 1.5}, "policy_loss.surrogate: clip bounds"),
    ],
)
def test_contradiction_is_refused(bases, base, changes, words):
    validated(TrainConfig, bases[base])
    with pytest.raises(ConfigError, match=words):
        validated(TrainConfig, with_changes(bases[base], changes))


def test_neighbours_of_the_rules_are_accepted(bases):
    for base, changes in (
        ("prime", {"placement.policy_ranks": 2, "placement.prm_ranks": 3, "keep.min_prompts": 6}),
        ("prime", {"keep.min_prompts": 32, "policy.mini_batches": 32}),
        ("prime", {"streams.process.gate": GATE}),
        ("prime", {"policy_loss.kl_weight": 0.1}),
        ("reinforce", {"responses_per_prompt": 1}),
        ("gpu", {"policy.offload": "cpu"}),
        ("prime", {"placement.weight_transport": "gloo"}),
        ("prime", {"mismatch.mode": "truncate", "mismatch.cap": 1.0}),
    ):
        validated(TrainConfig, with_changes(bases[base], changes))
