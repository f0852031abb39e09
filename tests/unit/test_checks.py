"""Each rule about several settings at once, broken alone; the configuration without that change is valid."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from rlprm.checks_models import check_model_folder, check_model_folders
from rlprm.config import EvaluateConfig, SftConfig, TrainConfig, validated
from rlprm.errors import ConfigError
from tests.contract import options as listing

BASES: dict[str, list[str]] = {
    "prime": ["method=prime_as_written"],
    "ppo": ["method=ppo"],
    "reinforce": ["method=outcome_reinforce_pp"],
    "oracle": ["method=oracle"],
    "prof": ["method=prof", "responses_per_prompt=8", "streams.process.source.model=x"],
    "drpo": ["method=drpo"],
    "judge": ["method=capo", f"streams.process.source.kind.client.url={listing.JUDGE}"],
    "gpu": ["placement=gpu1", "rollout=vllm_gpu", "rollout.engine.gpu_memory_utilization=0.4"],
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
PAID_IF_RIGHT = {**POSTERIOR, "stream": "process"}
PIECES = ("merge", "normalizer", "estimator", "weight", "gate")
SOFTMIN = {
    "_target_": "rlprm.core.softmin.pure_softmin", "_partial_": True, "temperature": 0.1, "baseline": "token",
    "zero_ends": True,
}  # fmt: skip
RAW = {
    "_target_": "rlprm.core.normalize.normalize", "_partial_": True, "unit": "token", "subset": "all",
    "clip_first": None, "accumulate": "none", "centre": "none", "scale": "none", "order": "none", "bound": "none",
    "eps": 0.0, "decay": None,
}  # fmt: skip
RANK = {**RAW, "unit": "response", "scale": "rank"}
GSPO = {
    "_target_": "rlprm.core.policy_loss_sequence.gspo", "_partial_": True, "clip_low": 3.0e-4, "clip_high": 4.0e-4,
}  # fmt: skip
VERDICT = {
    "source": {
        "kind": {"_target_": "rlprm.sources.base.OutputOf", "_partial_": True, "of": "process", "output": "verdict"},
        "model": None, "learner": None,
    },
    **dict.fromkeys(PIECES),
}  # fmt: skip
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
        ("prime", {"streams.process.source.learner": None}, "update is after and learner is null; give it a learner"),
        ("prime", {"streams.process.source.model": None}, "has a learner and no model; name the folder"),
        ("prime", {"streams.process.weight": None}, "weight null and the others not"),
        ("prime", {f"streams.process.{piece}": None for piece in PIECES}, "give every stream a plan, or sum it into"),
        # one reward a step: a stream of tokens is refused, one of steps is not
        ("prime", {"streams.process.normalizer": RAW, "streams.process.estimator": SOFTMIN}, "streams: .*one reward"),
        ("oracle", {"streams.process.estimator": SOFTMIN}, "'process' is centred twice: .*step_index.* baseline"),
        ("judge", {"streams.process.source.kind.client.url": None}, "streams.process.source: .*endpoint"),
        ("oracle", {"streams.process.normalizer": RANK, "streams.process.estimator": SOFTMIN}, "centred twice: .*rank"),
        ("prime", {"streams.process.normalizer": {**RAW, "accumulate": "prefix"}}, "'process' is summed up twice"),
        ("prof", {"responses_per_prompt": 4}, "select.keep is 4 and responses_per_prompt 4: nothing would be selected"),
        (
            "prime",
            {"recovery.min_policy_ranks": 2},
            r"min_policy_ranks is 2 and placement\.policy_ranks 1: the run would",
        ),
        ("prime", {"recovery.min_prm_ranks": 3}, r"set recovery\.min_prm_ranks to at most 1, or to null"),
        ("prime", {"recovery.min_engines": 2}, r"recovery\.min_engines is 2 and placement\.engines 1"),
        ("prof", {"select.stream": "elsewhere"}, "select: select reads the process rewards of stream 'elsewhere'"),
        (
            "prime",
            {"policy_loss.surrogate": GSPO},
            "gspo, which averages .* streams.process pays its tokens one by one",
        ),
        ("drpo", {"policy_loss.aggregation": "token-mean"}, "its weights are those of seq-mean-token-mean"),
        (
            "oracle",
            {
                "streams.process.normalizer": RAW,
                "streams.process.estimator": SOFTMIN,
                "streams.outcome.normalizer": RAW,
                "responses_per_prompt": 1,
            },
            "takes a baseline .token. from the other responses, and responses_per_prompt is 1",
        ),
        ("oracle", {"streams.process.source.model": "x"}, "streams.process.source: ExactSteps has no model"),
        (
            "prime",
            {"streams.second": VERDICT},
            "output 'verdict' of stream 'process', and no source of that name gives",
        ),
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
        ("prime", {"streams.process.gate": SIGN}, "streams.process.gate is sign_consistent: a shift .*whiten=scale"),
        ("oracle", {"streams.process.gate": SIGN}, "streams.process.gate is sign_consistent: a shift"),
        ("prime", {"streams.process.merge": PAID_IF_RIGHT}, "streams.process.merge is posterior_gate: a shift"),
        ("prime", {"policy_loss.kl_kind": "k1"}, "kl_kind is k1, and k1 as a loss has zero expected gradient"),
        # 100 steps of one update each
        ("prime", {"policy.schedule": "linear", "policy.warmup": 100}, "policy: .*warmup 100 and 100 optimizer steps"),
        (
            "prime",
            {"streams.process.source.learner.schedule": "cosine", "streams.process.source.learner.warmup": 101},
            "streams.process.source.learner: .*warmup 101 and 100",
        ),
        ("ppo", {"critic.learner.schedule": "cosine", "critic.learner.warmup": 100}, "critic.learner: .*warmup 100"),
        ("prime", {"temperature": 0.005}, "temperature 0.005 is below 0.01"),
        ("prime", {"evaluation.temperature": 0.005}, "evaluation.temperature 0.005 is below 0.01"),
        (
            "prime",
            {"placement.weight_bucket_bytes": 2001, "placement.object_store_bytes": 2000},
            "placement.weight_bucket_bytes is 2001 and placement.object_store_bytes 2000",
        ),
        ("gpu", {"rollout.engine.kv_cache_bytes": 1000}, "kv_cache_bytes is set and .* cuda.* use rollout=vllm_gpu"),
        (
            "gpu",
            {"rollout.engine.gpu_memory_utilization": 0.51},
            "utilization is 0.51 and placement.gpus_per_engine 0.5",
        ),
        ("prime", {"rollout.engine.gpu_memory_utilization": 0.3}, "placement.device is cpu; use rollout=vllm_cpu"),
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
        ("gpu", {"rollout.engine.gpu_memory_utilization": 0.5}),
        ("gpu", {"rollout.engine.gpu_memory_utilization": 0.9, "placement.gpus_per_engine": 1.0}),
        ("prime", {"streams.process.gate": SIGN, "whiten": "scale"}),
        ("prime", {"streams.process.merge": PAID_IF_RIGHT, "whiten": "none"}),
        ("prime", {"policy.schedule": "linear", "policy.warmup": 99}),
        ("prime", {"policy.schedule": "linear", "policy.warmup": 100, "policy.epochs": 2}),
        ("prime", {"policy.schedule": "constant", "policy.warmup": 1000}),
        ("prime", {"temperature": 0.01}),
        ("prime", {"placement.weight_bucket_bytes": 2000, "placement.object_store_bytes": 2000}),
        ("gpu", {"placement.object_store_bytes": None, "placement.weight_bucket_bytes": 2**40}),
        ("prime", {"placement.weight_transport": "gloo"}),
        ("prime", {"mismatch.mode": "truncate", "mismatch.cap": 1.0}),
    ):
        validated(TrainConfig, with_changes(bases[base], changes))


@pytest.mark.parametrize("name", ["policy", "policy_critic", "critic", "reference"])
def test_stream_may_not_be_named_like_a_part_of_the_policy(bases, name):
    values = copy.deepcopy(bases["prime"])
    values["streams"][name] = values["streams"].pop("process")
    with pytest.raises(ConfigError, match=rf"streams\.{name}: the policy's checkpoint has a folder of that name"):
        validated(TrainConfig, values)
    values["streams"]["policy_prm"] = values["streams"].pop(name)
    validated(TrainConfig, values)


def test_fine_tuning_schedule_must_outlast_its_warm_up():
    values = dict(listing.values("sft", ["model.path=x", "output=y", "steps=20"]))
    decaying = with_changes(values, {"learner.schedule": "cosine", "learner.warmup": 20})
    with pytest.raises(ConfigError, match="learner: schedule cosine has warmup 20 and 20 optimizer steps"):
        validated(SftConfig, decaying)
    validated(SftConfig, with_changes(decaying, {"steps": 21}))


def test_evaluation_is_checked_too():
    values = dict(listing.values("evaluate", ["model.path=x"]))
    validated(EvaluateConfig, with_changes(values, {"temperatures": [0.0, 0.01]}))
    with pytest.raises(ConfigError, match=r"temperatures 0\.005 is below 0\.01"):
        validated(EvaluateConfig, with_changes(values, {"temperatures": [0.0, 0.005]}))
    on_gpu = {"placement.device": "cuda", "placement.gpus_per_engine": 1.0}
    with pytest.raises(ConfigError, match=r"kv_cache_bytes is set and placement\.device is cuda"):
        validated(EvaluateConfig, with_changes(values, on_gpu))


# -- model folders ---------------------------------------------------------------------------------------------------


def model_folder(
    folder: Path, tokens: Any = ("a", "b"), *, added: Any = (), weights: int = 10, vocab_size: int = 2
) -> str:
    """Only what the checks look at; ``tokens`` None: without tokenizer.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    (folder / "model.safetensors").write_bytes(bytes(weights))
    if tokens is not None:
        content = {
            "model": {"vocab": {text: number for number, text in enumerate(tokens)}},
            "added_tokens": [{"id": number, "content": text} for number, text in added],
            "folder": folder.name,  # so that no two files are the same bytes
        }
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def prime(values: dict[str, Any], policy: str, prm: str, **placement: Any) -> TrainConfig:
    changes = {"model.path": policy, "streams.process.source.model": prm}
    return validated(
        TrainConfig,
        with_changes(values, changes | {f"placement.{key}": value for key, value in placement.items()}),
    )


def test_hub_name_is_refused_with_what_to_do():
    with pytest.raises(
        ConfigError, match=r"model.path 'owner/a-1\.5B' is no folder.*hf download owner/a-1\.5B --local-dir"
    ):
        check_model_folder("model.path", "owner/a-1.5B")
    with pytest.raises(ConfigError, match="expected a local Hugging Face model folder"):
        check_model_folder("model.path", "../owner")


def test_prm_of_another_vocabulary_is_refused(bases, tmp_path):
    policy = model_folder(tmp_path / "policy")
    same = model_folder(tmp_path / "same", vocab_size=64)  # rows beyond the tokens are padding
    check_model_folders(prime(bases["prime"], policy, same))
    # the same ids and texts, written once as vocabulary and once as added tokens
    check_model_folders(prime(bases["prime"], policy, model_folder(tmp_path / "added", ("a",), added=[(1, "b")])))
    for name, tokens, added in (("swapped", ("b", "a"), ()), ("more", ("a", "b"), [(2, "c")]), ("less", ("a",), ())):
        other = model_folder(tmp_path / name, tokens, added=added)
        with pytest.raises(ConfigError, match=rf"streams.process.source.model '.*{name}' has another tokenizer than"):
            check_model_folders(prime(bases["prime"], policy, other))


def test_without_tokenizer_file_sizes_are_compared(bases, tmp_path):
    policy = model_folder(tmp_path / "policy", None)
    check_model_folders(prime(bases["prime"], policy, model_folder(tmp_path / "same", None)))
    other = model_folder(tmp_path / "other", None, vocab_size=3)
    with pytest.raises(ConfigError, match="vocab_size 3 and 2"):
        check_model_folders(prime(bases["prime"], policy, other))


def test_critic_of_another_vocabulary_is_refused(bases, tmp_path):
    policy, other = model_folder(tmp_path / "policy"), model_folder(tmp_path / "other", ("c", "d"))
    config = validated(TrainConfig, with_changes(bases["ppo"], {"model.path": policy, "critic.model": other}))
    with pytest.raises(ConfigError, match=r"critic\.model .* has another tokenizer"):
        check_model_folders(config)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"vocab": 3}}'])
def test_damaged_tokenizer_file_is_named(bases, tmp_path, text):
    policy, other = model_folder(tmp_path / "policy"), model_folder(tmp_path / "other")
    (tmp_path / "other/tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=r"other/tokenizer\.json"):
        check_model_folders(prime(bases["prime"], policy, other))


def test_weights_that_do_not_fit_the_object_store_are_refused(bases, tmp_path):
    # nine tenths of the store are for weights: 900 bytes just fit 1000
    policy = model_folder(tmp_path / "policy", weights=900)
    small = {"weight_bucket_bytes": 10, "object_store_bytes": 999}
    check_model_folders(prime(bases["prime"], policy, policy, **{**small, "object_store_bytes": 1000}))
    check_model_folders(prime(bases["prime"], policy, policy, **{**small, "object_store_bytes": None}))
    check_model_folders(prime(bases["prime"], policy, policy, **small, weight_transport="gloo"))
    with pytest.raises(
        ConfigError, match=r"object_store_bytes is 999 and the weights of model\.path .* have 900 bytes"
    ):
        check_model_folders(prime(bases["prime"], policy, policy, **small))
