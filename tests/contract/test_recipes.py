"""Every recipe keeps the form that `recipes/README.md` promises: configuration, page, numbers, preparation and plan."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from rlprm.cli.compose import composed, groups, parsed
from rlprm.cli.main import COMMANDS, main
from rlprm.cli.plan import hardware_of, split
from rlprm.config import TrainConfig, validated
from rlprm.config_prepare import PrepareConfig
from rlprm.core.metric_table import METRICS
from rlprm.paths import recipes_dir
from rlprm.planning.plan import made_plan, shapes_for
from rlprm.planning.report import report
from rlprm.run.build import gpus_needed
from rlprm.run.factories import on_prm_ranks
from tests.contract import options as listing

RECIPES = listing.recipes()
PREPARED = [name for name in RECIPES if (recipes_dir() / name / "prepare.yaml").is_file()]
STATUSES = ("measured", "reported", "not yet run", "needs sequence parallelism")
HARDWARE = {"nodes": int, "node_gpus": int, "gpu": (str, type(None)), "node_cpus": int, "node_memory_gb": (int, float)}
HEADINGS = ("## Curve", "## What to look at", "## Source", "## What differs from the authors' setting")
# What each command composes; the others take no configuration of their own.
ENTRIES = {"train": "train", "plan": "train", "launch": "train", "prepare": "prepare", "sft": "sft", "prm": "prm"}
OPTIONS = ("--command", "--cells", "--baseline", "--seeds", "--from", "--only")  # each with a word of its own


def page(recipe: str) -> str:
    return (recipes_dir() / recipe / "README.md").read_text(encoding="utf-8")


def numbers(recipe: str) -> dict[str, Any]:
    return json.loads((recipes_dir() / recipe / "expected.json").read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """The words after `rlprm` of every indented command of a page."""
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("    rlprm ")]


@cache
def training(recipe: str) -> Mapping[str, Any]:
    """What the recipe composes, with data in /d and models in /m."""
    with mock.patch.dict(os.environ, RLPRM_DATA="/d", RLPRM_MODELS="/m"):
        return composed("train", [f"recipe={recipe}"]).values


@cache
def config_of(recipe: str) -> TrainConfig:
    return validated(TrainConfig, training(recipe))


def overrides(words: list[str]) -> list[str]:
    """What a command composes: its words without options, and without what belongs to the cluster."""
    found, skip = [], False
    for word in words:
        if skip or word.startswith("-"):
            skip = not skip and word in OPTIONS
            continue
        if not word.lstrip("+").startswith(("cluster=", "cluster.")):
            found.append(word)
    return found


def written(recipe: str) -> Mapping[str, Any]:
    return yaml.safe_load((recipes_dir() / recipe / "config.yaml").read_text(encoding="utf-8"))


def _choices(content: Mapping[str, Any], start: str) -> list[tuple[str, str]]:
    lines = [next(iter(line.items())) for line in content.get("defaults", []) if isinstance(line, dict)]
    return [(key, value) for key, value in lines if key.startswith(start)]


def _whole(chosen: list[str]) -> list[str]:
    """Options with what they leave open."""
    return [*chosen, *(["data.train.prepared.reader.path=a"] if "data=prepared" in chosen else [])]


def _adds(content: Mapping[str, Any]) -> bool:
    method = dict(_choices(content, "override /")).get("override /method", "")
    return any("@streams" in key for key, _ in _choices(content, "/")) or method in ("pure", "prof")


def _leaves(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, Mapping) or not node:
        return [(prefix, node)]
    return [leaf for key, value in node.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_under_its_own_name(recipe):
    assert config_of(recipe).name == recipe


COMPARED = [name for name in PREPARED if not _adds(written(name))]  # the others' streams are their own


@pytest.mark.parametrize("recipe", COMPARED)
def test_nothing_but_what_differs_is_written(recipe):
    """A key that is set to what it would be anyway says something untrue: that it differs."""
    content = written(recipe)
    chosen = [f"{key.removeprefix('override /')}={value}" for key, value in _choices(content, "override /")]
    below = [key.removeprefix("/").partition("@")[0] for key, value in _choices(content, "/") if value == "config"]
    base = [f"recipe={name}" for name in below] or ["model.path=a"]
    before = dict(_leaves(composed("train", [*base, *_whole(chosen)]).values))
    after = dict(_leaves(training(recipe)))
    own = [key for key, _ in _leaves(content) if not key.startswith("defaults")]
    assert own
    assert [key for key in own if key in before and before[key] == after[key]] == []


def test_a_prm_fills_its_gpus_as_the_policy_does_unless_it_is_said():
    learner = {
        name: training(name)["streams"]["process"]["source"]["learner"]
        for name in PREPARED
        if "prime" in name and "grpo" not in name
    }
    assert all(found["layout"] == "packed" for found in learner.values())
    assert {name for name, found in learner.items() if found["offload"] == "cpu"} == {"prime_eurus2_7b"}
    assert learner["dapo_prime_32b"]["zero_stage"] == 3
    assert learner["dapo_prime_32b"]["mini_batches"] == 1  # how it learns is its own


@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers_have_their_form(recipe):
    said = numbers(recipe)
    assert said["recipe"] == recipe
    assert said["status"] in STATUSES
    assert said["hardware"].keys() == HARDWARE.keys()
    for key, kind in HARDWARE.items():
        assert isinstance(said["hardware"][key], kind), key
    assert (said["hardware"]["node_gpus"] > 0) == (said["hardware"]["gpu"] is not None)
    assert ({"metric", "mean", "tolerance", "seeds", "commit"} <= said.keys()) == (said["status"] == "measured")
    if "baseline" in said:
        assert said["baseline"] in RECIPES
        assert said["baseline"] in page(recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_hardware_is_what_the_placement_takes(recipe):
    """GPUs of a node, and nodes: what `expected.json` promises is what the run asks for."""
    placement, hardware = config_of(recipe).placement, numbers(recipe)["hardware"]
    assert placement.nodes == hardware["nodes"]
    taken = gpus_needed(placement, 0, prm=on_prm_ranks(config_of(recipe)))
    assert math.ceil(taken) == hardware["nodes"] * hardware["node_gpus"]
    assert config_of(recipe).verifier.workers <= hardware["nodes"] * hardware["node_cpus"]


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "baseline" in numbers(name)])
def test_a_baseline_samples_what_its_neighbour_does(recipe):
    mine, baseline = config_of(recipe), config_of(numbers(recipe)["baseline"])
    assert baseline.streams.keys() == {"outcome"}
    assert (mine.model.path, mine.max_response_tokens) == (baseline.model.path, baseline.max_response_tokens)
    if recipe.startswith(("prime", "gsm8k")):
        for key in ("prompts_per_step", "responses_per_prompt", "steps", "temperature", "keep", "data", "verifier"):
            if key == "verifier":
                assert mine.verifier.function == baseline.verifier.function
            else:
                assert getattr(mine, key) == getattr(baseline, key), key
        assert mine.policy.lr == baseline.policy.lr


@pytest.mark.parametrize("recipe", RECIPES)
def test_page_says_claim_hardware_and_command(recipe):
    text = page(recipe)
    assert text.startswith(f"# {recipe}\n\n**Claim.** ")
    assert "**Hardware:** " in text
    assert any(f"recipe={recipe}" in words for words in commands(text))


@pytest.mark.parametrize("recipe", PREPARED)
def test_page_of_a_recipe_for_gpus_is_complete(recipe):
    text, said = page(recipe), numbers(recipe)
    for heading in HEADINGS:
        assert f"\n{heading}\n\n" in text, heading
    time = re.search(r"\*\*Time:\*\* (.+?)\n\n", text, re.DOTALL)
    assert time is not None
    assert "hours" in time[1]
    assert "GPU-hours" in time[1]
    assert "Basis: " in time[1]  # never a number from nowhere
    assert ("Not yet run" in text) == (said["status"] in STATUSES[2:])
    first = [words[0] for words in commands(text)][:3]
    assert first[:2] == ["prepare", "plan"]
    assert first[2] in ("launch", "ablate")
    assert "arXiv:" in text.split("## Source")[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_commands_of_a_page_are_real(recipe):
    known = groups()
    for words in commands(page(recipe)):
        name, *rest = words
        assert name in COMMANDS
        for word in rest:
            if word.startswith("cluster="):
                assert word.partition("=")[2] in known["cluster"]
            if word.startswith("--cells="):
                assert Path(word.partition("=")[2]).is_file()
        if "--cells" in rest:
            assert (recipes_dir().parent / rest[rest.index("--cells") + 1]).is_file()
        if name in ENTRIES and "--command" not in rest:
            given = overrides(rest)
            assert parsed(given)
            values = composed(ENTRIES[name], given).values if given != [f"recipe={recipe}"] else {}
            if ENTRIES[name] == "train" and values:
                validated(TrainConfig, values)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if list((recipes_dir() / name).glob("*.yaml"))])
def test_cells_of_an_ablation_validate(recipe):
    for words in commands(page(recipe)):
        if words[0] == "ablate" and recipe in PREPARED:
            file = recipes_dir().parent / words[words.index("--cells") + 1]
            cells = yaml.safe_load(file.read_text(encoding="utf-8"))
            assert words[words.index("--baseline") + 1] in cells
            for cell, changes in cells.items():
                assert validated(TrainConfig, composed("train", [f"recipe={recipe}", *changes]).values), cell


@pytest.mark.parametrize("recipe", PREPARED)
def test_what_is_prepared_is_what_is_read(recipe):
    prepared: PrepareConfig = validated(PrepareConfig, composed("prepare", [f"recipe={recipe}"]).values)
    leaves = [(key, str(value)) for key, value in _leaves(training(recipe))]
    made = {f"/d/{each.output}" for each in prepared.data.values()}
    made |= {f"/m/{each.output}" for each in prepared.models.values()}
    assert made == {value for _, value in leaves if value.startswith(("/d/", "/m/"))}
    held_out = {value for key, value in leaves if key.startswith("data.evaluation")}
    for name, section in prepared.data.items():
        assert (f"/d/{section.output}" in held_out) == (section.role == "evaluation"), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_metrics_that_a_page_names_are_logged(recipe):
    table = {re.sub(r"\\{\w+\\}", r"[^`]+", re.escape(spec.name)) for spec in METRICS}
    families = {spec.name.split("/")[0] for spec in METRICS if not spec.name.startswith("{")}
    for name in re.findall(r"`([a-z\-_]+/[^`\s]+)`", page(recipe)):
        if name.split("/")[0] in families and "." not in name:
            assert any(re.fullmatch(pattern, name) for pattern in table), name


def test_the_table_of_recipes_names_each_with_its_status():
    lines = (recipes_dir() / "README.md").read_text(encoding="utf-8").splitlines()
    rows = {match[1]: line for line in lines if (match := re.match(r"\| \[`([\w.]+)`\]\(\1/README\.md\)", line))}
    assert sorted(rows) == RECIPES
    for recipe, line in rows.items():
        assert line.rstrip(" |").endswith(numbers(recipe)["status"]), recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_passes_its_plan(recipe):
    config = config_of(recipe)
    plan = made_plan(config, shapes_for(config, {}), hardware_of([], [f"recipe={recipe}"], config), None)
    assert plan.fits, report(plan, None, [])


LAUNCHED = [(name, shlex.join(words[1:])) for name in PREPARED for words in commands(page(name))
            if words[0] == "launch" and "--command" not in words]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "line"), LAUNCHED, ids=[f"{name}-{number}" for number, (name, _) in enumerate(LAUNCHED)]
)
def test_what_a_page_launches_fits_the_nodes_that_it_says(recipe, line):
    """The node of cluster/*.yaml is what the command would run on, unless the command names another."""
    about, rest = split([word for word in shlex.split(line) if not word.startswith("-")])
    config = validated(TrainConfig, composed("train", rest).values)
    if not any(word.startswith("cluster.node.") or word == "cluster=slurm" for word in about):
        about = []  # the node of such a cluster is this machine's; the recipe says what it reckons with
    plan = made_plan(config, shapes_for(config, {}), hardware_of(about, rest, config), None)
    assert plan.fits, report(plan, None, [])


def test_times_of_a_page_are_the_plans():
    """Where the page says that the plan is its basis, it has the plan's numbers."""
    compared = []
    for recipe in PREPARED:
        said = re.search(r"\*\*Time:\*\* (.+?)\n\n", page(recipe), re.DOTALL)
        assert said is not None
        if "Basis: `rlprm plan`" not in said[1].replace("\n", " "):
            continue
        config = config_of(recipe)
        plan = made_plan(config, shapes_for(config, {}), hardware_of([], [f"recipe={recipe}"], config), None)
        assert plan.times is not None
        assert f"{plan.times.step:.0f} s a step" in said[1].replace("\n", " "), (recipe, plan.times.step)
        compared.append(recipe)
    assert {"pure_qwen2.5_math_7b", "dapo_prime_32b"} <= set(compared)


def test_the_command_plans_a_recipe_by_name(capsys):
    assert main(["plan", "recipe=gsm8k_qwen2.5_0.5b"]) == 0
    said = capsys.readouterr().out
    assert "as recipes/gsm8k_qwen2.5_0.5b/expected.json says" in said
    assert "status of the recipe" not in said  # not yet run, as most


def test_the_plan_says_what_a_recipe_lacks(capsys):
    assert main(["plan", "recipe=dapo_prime_32b"]) == 0
    assert (
        "status of the recipe: needs sequence parallelism (see recipes/dapo_prime_32b/README.md)"
        in capsys.readouterr().out
    )
    assert main(["plan", "recipe=dapo_prime_32b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"].startswith("needs sequence parallelism")
