"""What `conf/` and `recipes/` hold, found by listing the folders: a newcomer is picked up without being named here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rlprm.cli import dpo, evaluate, prm, sft
from rlprm.cli.compose import composed, groups
from rlprm.config import EvaluateConfig, JudgeConfig, SftConfig, TrainConfig
from rlprm.config_cluster import LaunchConfig
from rlprm.config_dpo import DpoConfig
from rlprm.config_prepare import PrepareConfig
from rlprm.config_prm import PrmConfig
from rlprm.paths import conf_dir, recipes_dir
from rlprm.run.ablation import AblationConfig

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = {
    "train": TrainConfig,
    "sft": SftConfig,
    "dpo": DpoConfig,
    "prm": PrmConfig,
    "evaluate": EvaluateConfig,
    "judge": JudgeConfig,
    "ablate": AblationConfig,
    "prepare": PrepareConfig,
    "launch": LaunchConfig,
}
# What each command must be told, and which keys of its configuration it reads.
REQUIRED = {
    "train": ["model.path=somewhere"],
    "sft": ["model.path=somewhere", "output=somewhere"],
    "dpo": ["model.path=somewhere", "output=somewhere", "runs=somewhere"],
    "prm": ["model.path=somewhere", "output=somewhere"],
    "evaluate": ["model.path=somewhere"],
    "judge": [],
    "ablate": [],
    "prepare": [],
    "launch": [],
}
READS: Mapping[str, Callable[[str], bool]] = {
    "evaluate": evaluate.reads,
    "sft": sft.reads,
    "dpo": dpo.reads,
    "prm": prm.reads,
}
COMPANIONS = {
    "critic": ["method=ppo"],  # a critic accumulates by GAE, so the method must leave that to it
    "rollout/vllm_gpu": ["placement=gpu8"],
    # an engine on part of a GPU, and a memory share for it
    "placement/gpu1": ["rollout=vllm_gpu", "rollout.engine.gpu_memory_utilization=0.4"],
    "placement/gpu8": ["rollout=vllm_gpu"],
    "placement/gpu_4x8": ["rollout=vllm_gpu"],
    "placement/gpu_16x8": ["rollout=vllm_gpu", "prompts_per_step=64"],  # a prompt for every rank
    # where a sign says right or wrong, nothing may move zero
    "gate/sign_consistent": ["whiten=scale"],
    "gate/selective": ["whiten=scale"],
    "gate/failure_agrees": ["whiten=scale"],
    "merge/posterior_gate": ["whiten=scale"],
    # one reward a step, and it is centred by the estimator itself
    "estimator/pure_softmin": ["normalizer@streams.process.normalizer=raw", "source@streams.process.source=exact"],
    # these speak of the whole response only
    **{
        f"judge_prompt/{prompt}": ["streams.process.source.kind.pays=verdict"]
        for prompt in ("reasoning_quality", "rubric", "whole_verdict")
    },
    # 4 of 8 are kept
    "method/prof": ["responses_per_prompt=8"],
    "select/prof": ["responses_per_prompt=8"],
    "select/balanced": ["responses_per_prompt=8"],
    "normalizer/drpo": ["policy_loss=drpo"],  # its weights belong to that aggregation
    "policy_loss/gspo": ["method=outcome_rloo"],  # it averages the credit of tokens
    "normalizer/spro": ["estimator@streams.process.estimator=none"],  # it sums up itself
    "estimator/pure_sum": ["normalizer@streams.process.normalizer=raw", "source@streams.process.source=exact"],
}
# Merges by which one stream takes another in, which then has no pieces of its own.
NO_PIECES = [f"streams.process.{piece}=null" for piece in ("merge", "normalizer", "estimator", "weight", "gate")]
TAKES_IN = {"merge/sum_into", "merge/blend", "merge/gate_by", "merge/hierarchical", "merge/sum_of"}
COMPANIONS |= {option: NO_PIECES for option in TAKES_IN}
JUDGE = "http://127.0.0.1:9/v1"  # nobody listens there; nothing is asked before a run starts
STREAM = "process"  # the stream of prime_as_written that a stream's piece is tried on
ROWS = str(ROOT / "tests/data/gsm8k_small/train.jsonl")  # what a reader without a file of its own reads


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def entries() -> list[str]:
    """The files that a subcommand starts from: ``conf/*.yaml``."""
    return sorted(file.stem for file in conf_dir().glob("*.yaml"))


def options() -> list[tuple[str, str]]:
    """Every (group, option) of ``conf/``."""
    return [
        (group, option) for group, found in groups().items() if group not in ("recipe", "cluster") for option in found
    ]


def of_group(group: str) -> list[str]:
    found = groups()[group]
    assert found, f"no option in conf/{group}; the listing is broken"
    return found


def defaults_of(content: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """(group, package) of each line of a defaults list."""
    for line in (content or {}).get("defaults", []):
        if isinstance(line, dict):
            key = next(iter(line)).removeprefix("override ").lstrip("/")
            group, _, package = key.partition("@")
            yield group, package or group


def place(group: str, option: str | None = None) -> tuple[str, str]:
    """The entry that a group feeds, and where in it the option lands."""
    if f"{group}/{option}" in {*TAKES_IN, "normalizer/greedy"}:
        return "train", f"streams.outcome.{group}"
    if group == "dataset":
        return "prepare", "data.one"  # nothing is prepared unless a recipe or the command line adds it
    for entry in ("train", *entries()):
        for listed, package in defaults_of(read(conf_dir() / f"{entry}.yaml")):
            if listed == group:
                return entry, package
    for method in of_group("method"):
        for listed, package in defaults_of(read(conf_dir() / "method" / f"{method}.yaml")):
            if listed == group and package.startswith("streams.") and package.count(".") == 2:
                return "train", f"streams.{STREAM}.{group}"
    for source in of_group("source"):
        for listed, package in defaults_of(read(conf_dir() / "source" / f"{source}.yaml")):
            if listed == group:
                return "train", f"streams.{STREAM}.source.{package}"
    raise AssertionError(f"conf/{group} feeds no entry, no method and no source: nobody can choose its options")


def carrier(group: str) -> list[str]:
    """The source that a group of its pieces (a prompt, a loss) is tried in."""
    package = place(group)[1]
    if not package.startswith(f"streams.{STREAM}.source."):
        return []
    for source in of_group("source"):
        if any(listed == group for listed, _ in defaults_of(read(conf_dir() / "source" / f"{source}.yaml"))):
            return [*COMPANIONS.get(f"source/{source}", []), f"source@streams.{STREAM}.source={source}"]
    return []


def given_to_sources(group: str, option: str) -> list[str]:
    """What only the user can know of a source: the folder of its model, the address of its judge."""
    if group == "method":
        listed = defaults_of(read(conf_dir() / "method" / f"{option}.yaml"))
        return [
            each for name, package in listed if name == "source" for each in known(package, chosen_in(option, package))
        ]
    if group == "judge_client" and option != "endpoint":
        return [f"streams.{STREAM}.source.model=somewhere"]  # the judge is a model of our own
    if group == "source":
        return known(f"streams.{STREAM}.source", option)
    return known(f"streams.{STREAM}.source", carrier(group)[-1].partition("=")[2]) if carrier(group) else []


def chosen_in(method: str, package: str) -> str:
    for line in read(conf_dir() / "method" / f"{method}.yaml")["defaults"]:
        if isinstance(line, dict) and next(iter(line)) == f"/source@{package}":
            return next(iter(line.values()))
    raise AssertionError(f"conf/method/{method} has no source at {package}")


def known(package: str, source: str) -> list[str]:
    content = read(conf_dir() / "source" / f"{source}.yaml")
    judged = any(line == {"/judge_client@kind.client": "endpoint"} for line in content.get("defaults", []))
    model = [f"{package}.model=somewhere"] if content.get("model") == "???" else []
    return model + ([f"{package}.kind.client.url={JUDGE}"] if judged else [])


def chosen(group: str, option: str) -> tuple[str, list[str]]:
    """(entry, overrides) of a configuration that has this option; what the option leaves open is filled in."""
    entry, package = place(group, option)
    key = group if package == group else f"{group}@{package}"
    overrides = [
        *carrier(group),
        *given_to_sources(group, option),
        *COMPANIONS.get(group, []),
        *COMPANIONS.get(f"{group}/{option}", []),
        f"{'+' if group == 'dataset' else ''}{key}={option}",
    ]
    overrides += [*missing(read(conf_dir() / group / f"{option}.yaml"), package)]
    return entry, overrides + required(entry, overrides)


def required(entry: str, overrides: list[str]) -> list[str]:
    """The values that every run must give itself."""
    given = {line.split("=")[0] for line in overrides}
    return [each for each in REQUIRED[entry] if each.split("=")[0] not in given]


def values(entry: str, overrides: list[str]) -> Mapping[str, Any]:
    """What the command composes from the overrides."""
    return composed(entry, overrides, reads=READS.get(entry, lambda key: True)).values


def missing(content: Any, package: str) -> list[str]:
    """A value for each ``???`` in an option."""
    prefix = "" if package in ("", "_global_", "method") else f"{package}."  # a method's keys are the run's own
    return [
        f"{prefix}{key}={ROWS}" for key, value in leaves(content) if value == "???" and prefix + key != "model.path"
    ]


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


@cache
def values_of(group: str, option: str) -> Mapping[str, Any]:
    """The whole composed configuration with this option (composed once, for all tests of a run)."""
    return values(*chosen(group, option))


def content_of(group: str, option: str) -> Any:
    """What the option says, composed and resolved."""
    node: Any = values_of(group, option)
    package = place(group, option)[1]
    if group == "method":
        decides = ("streams", "whiten", "critic", "policy_loss", "keep", "select", "data", "verifier")
        return {key: node[key] for key in decides}
    for part in package.split("."):
        node = node[part]
    return node


def parts(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every outermost ``_target_`` of a configuration with its key."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
            return
        for key, value in node.items():
            yield from parts(value, f"{path}.{key}" if path else str(key))


def pieces(group: str) -> list[Any]:
    """The callable of every option of a group, for options that are one ``_target_``."""
    from rlprm.parts import made

    return [made(content_of(group, option)) for option in of_group(group)]


def recipes() -> list[str]:
    found = sorted(file.parent.name for file in recipes_dir().glob("*/config.yaml"))
    assert found, "no recipe found; the listing is broken"
    return found
