"""A plan from a configuration alone: what fits, what does not, and the change that makes it fit."""

from __future__ import annotations

import functools
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlprm.cli.compose import composed
from rlprm.cli.main import main
from rlprm.config import TrainConfig, validated
from rlprm.config_cluster import NodeShape
from rlprm.errors import ConfigError
from rlprm.planning import search
from rlprm.planning.arithmetic import arithmetic
from rlprm.planning.hardware import Hardware, gpu_named, of_node, of_recipe
from rlprm.planning.measure import measured
from rlprm.planning.plan import Plan, as_json, made_plan, shapes_for

SEVEN = (
    "method=prime_as_written", "placement=gpu8", "rollout=vllm_gpu", "model.path=PRIME-RL/Eurus-2-7B-SFT",
    "model.dtype=bfloat16", "max_response_tokens=960", "data.max_prompt_tokens=64", "prompts_per_step=256",
    "keep.min_prompts=8",
)  # fmt: skip
SMALL = (*SEVEN, "model.path=Qwen2.5-0.5B", "streams.process.source.model=Qwen2.5-0.5B")


@functools.cache
def config(*overrides: str) -> Any:
    return validated(TrainConfig, composed("train", overrides).values)


def node(gpu: str = "A100-80GB", gpus: int = 8, memory_gb: float = 900.0, nodes: int = 1) -> Hardware:
    return of_node(NodeShape(gpu=gpu, gpus=gpus, cpus=64, memory_gb=memory_gb), nodes, "a test")


def planned(*overrides: str, hardware: Hardware | None = None) -> Plan:
    one = config(*overrides)
    return made_plan(one, shapes_for(one, {}), hardware or node(), None)


def nearest(*overrides: str, hardware: Hardware | None = None) -> dict[str, Any] | None:
    one = config(*overrides)
    return search.nearest(one, shapes_for(one, {}), hardware or node(), lambda further: config(*overrides, *further))


def test_a_small_model_fits_and_every_rank_has_a_gpu_of_its_own() -> None:
    plan = planned(*SMALL, "policy.layout=packed")
    assert plan.fits
    assert plan.layout is not None
    assert [each.gpus for each in plan.layout.processes] == [(number,) for number in range(8)]
    assert plan.layout.roles == {"policy": (0,) * 4, "prm": (0,) * 2, "rollout engine": (0, 0)}
    assert all(room.fits for room in plan.layout.gpus)


def test_what_does_not_fit_is_named_with_a_change_that_does() -> None:
    one = config(*SEVEN)
    shapes = shapes_for(one, {})
    plan = made_plan(one, shapes, node(), None)
    assert not plan.fits
    (problem,) = [each for each in plan.problems if "prm" in each.what]
    assert problem.where == "node 0 GPU 4 and 1 more like it"
    change = nearest(*SEVEN)
    assert change is not None
    other = config(*SEVEN, *shlex.split(search.written(change)))  # pasted behind the same command
    assert made_plan(other, shapes, node(), None).fits


def test_the_nearest_change_is_the_smallest() -> None:
    """A budget that is too large by a factor of two or four is lowered; nothing else is touched."""
    overrides = (*SMALL, "policy.token_budget=131072", "policy.layout=padded")
    assert not planned(*overrides).fits
    change = nearest(*overrides)
    assert change is not None
    assert set(change) <= {"policy.token_budget", "model.gradient_checkpointing"}


def test_an_engine_that_shares_its_gpu_gets_less_of_it() -> None:
    overrides = (*SMALL, "placement=gpu1", "rollout.engine.gpu_memory_utilization=0.5", "policy.token_budget=32768")
    alone = node("A100-40GB", gpus=1)
    assert not planned(*overrides, hardware=alone).fits
    change = nearest(*overrides, hardware=alone)
    assert change is not None
    assert planned(*overrides, *search.written(change).split(), hardware=alone).fits


def test_the_object_store_must_hold_the_weights_that_travel_through_it() -> None:
    overrides = (*SMALL, "placement.weight_transport=object_store", "placement.object_store_bytes=100000000")
    plan = planned(*overrides)
    assert "object store" in " ".join(each.where for each in plan.problems)
    change = nearest(*overrides)
    assert change is not None
    assert change["placement.object_store_bytes"] > 2 * 494_032_768


def test_values_that_follow_a_changed_one_are_planned_too() -> None:
    """The PRM's budget is the policy's: the pasted override changes both."""
    overrides = (
        *SEVEN,
        "streams.process.source.learner.token_budget=${policy.token_budget}",
        "policy.token_budget=65536",
    )
    change = nearest(*overrides)
    assert change is not None
    assert planned(*overrides, *search.written(change).split()).fits


def test_hosts_need_memory_for_what_is_offloaded_and_loaded() -> None:
    plan = planned(*SEVEN, "policy.offload=cpu", hardware=node(memory_gb=100.0))
    assert any(each.where == "node 0 memory" for each in plan.problems)


def test_processes_without_a_seat_are_a_problem_of_the_placement() -> None:
    plan = planned(*SMALL, "placement.policy_ranks=8", hardware=node())
    assert plan.layout is None
    assert plan.problems[0].where == "placement"
    change = nearest(*SMALL, "placement.policy_ranks=8")
    assert change is not None
    assert set(change) == {"placement.policy_ranks", "placement.prm_ranks", "placement.engines"}


SMALLER = ("cluster=local", "cluster.node.gpu=A100-40GB", "cluster.node.gpus=4", "cluster.node.memory_gb=900.0")


def test_numbers_that_find_room_are_planned_with_what_their_memory_asks(capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer ranks alone hold larger shares of the optimizer: the change that is printed is planned with all of it."""
    assert main(["plan", "recipe=prime_eurus2_7b", *SMALLER, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert "Nearest change" not in found["problems"][0]["what"]  # seats alone give no advice here
    assert found["nearest"]["placement.policy_ranks"] < 3
    assert any(not key.startswith("placement.") for key in found["nearest"])
    assert main(["plan", "recipe=prime_eurus2_7b", *SMALLER, *search.written(found["nearest"]).split()]) == 0


def test_where_no_numbers_help_the_plan_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    small = (*SMALLER, "cluster.node.gpu=A10G", "cluster.node.memory_gb=200.0")
    assert main(["plan", "recipe=prime_eurus2_7b", *small]) == 1
    said = capsys.readouterr().out
    assert "None of the changes that were tried fits" in said
    assert (
        "With placement.policy_ranks=2 placement.prm_ranks=1 placement.engines=1 all processes find room, and then: "
        in said
    )
    assert "policy would take" in said


def test_lists_that_leave_no_room_are_taken_back() -> None:
    lists = ("placement.nodes=2", "placement.policy_nodes=[0]", "placement.prm_nodes=[0]", "placement.engine_nodes=[0]")
    assert planned(*SMALL, *lists, "placement.engines=3", hardware=node(nodes=2)).layout is None
    change = nearest(*SMALL, *lists, "placement.engines=3", hardware=node(nodes=2))
    assert change == {f"placement.{key}": None for key in search.LISTS}


def test_engines_wider_than_a_node_become_narrower() -> None:
    change = nearest(*SMALL, "placement.tensor_parallel=2", "placement.engines=1", hardware=node(gpus=1, nodes=7))
    assert change == {"placement.tensor_parallel": 1}


def test_a_run_without_a_prm_has_the_whole_node() -> None:
    outcome = (
        *(
            "method=outcome_grpo",
            "placement=gpu8",
            "rollout=vllm_gpu",
            "model.path=Qwen2.5-0.5B",
            "model.dtype=bfloat16",
        ),
        *("max_response_tokens=960", "data.max_prompt_tokens=64", "placement.policy_ranks=4", "placement.engines=4"),
    )
    plan = planned(*outcome)
    assert plan.fits, plan.problems
    assert plan.layout is not None
    assert plan.layout.roles == {"policy": (0,) * 4, "rollout engine": (0,) * 4}


def test_nothing_that_was_tried_fits_and_which_gpus_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "TRIES", 40)
    huge = ("model.path=Qwen2.5-72B", "streams.process.source.model=Qwen2.5-72B")
    assert nearest(*SEVEN, *huge, hardware=node("A10G")) is None
    small = config(*SMALL, "policy.token_budget=16384")
    fitting = search.gpus_that_fit(small, shapes_for(small, {}), node("A10G"))
    assert "A100-80GB" in fitting
    assert "A10G-24GB" not in fitting


def test_a_cuda_placement_asks_for_gpus() -> None:
    with pytest.raises(ConfigError, match=r"a test has no GPUs; .*cluster\.node\.gpu=H100-80GB"):
        planned(*SMALL, hardware=replace(node(), gpu=None, node_gpus=0))


def test_batch_arithmetic_and_what_does_not_divide() -> None:
    one = config(
        *SMALL, "prompts_per_step=250", "policy.mini_batches=100", "placement.policy_ranks=3", "keep.min_prompts=20"
    )
    batch = arithmetic(one)
    assert (batch.shards, batch.groups, batch.longest) == (6, (41, 42), 1024)
    policy, prm = batch.learners
    assert (policy.prompts, policy.sequences, policy.steps) == ((2, 3), 4, 100 * one.steps)
    assert (policy.micro.rows, policy.micro_batches) == (8, 1)
    assert (prm.sequences, prm.micro_batches) == (500, 63)
    said = " | ".join(batch.warnings)
    for part in ("prompts_per_step=252 divides", "mini_batches=100 does not divide", "policy.mini_batches=83 or fewer",
                 "keep.min_prompts"):  # fmt: skip
        assert part in said


def test_a_sequence_longer_than_the_budget_is_planned_alone() -> None:
    batch = arithmetic(config(*SMALL, "policy.token_budget=1000"))
    assert batch.learners[0].micro.tokens == 1024
    assert "goes alone and above the budget" in " ".join(batch.warnings)


def test_times_shrink_with_more_ranks_and_grow_with_responses() -> None:
    one = config(*SMALL)
    shapes = shapes_for(one, {})
    short, long = (made_plan(one, shapes, node(), mean).times for mean in (100, 900))
    wide = made_plan(config(*SMALL, "placement.policy_ranks=8", "placement.nodes=2"), shapes, node(nodes=2), 100).times
    assert short is not None
    assert long is not None
    assert wide is not None
    assert long.step > short.step
    seconds = {phase.name: phase.seconds for phase in short.phases}
    assert {phase.name: phase.seconds for phase in wide.phases}["old log-probs"] == pytest.approx(
        seconds["old log-probs"] / 2
    )


def test_a_shape_can_be_chosen_for_one_model_of_several() -> None:
    one = config(*SMALL, "model.path=no/such", "streams.process.source.model=nor/this")
    with pytest.raises(ConfigError, match="the shape of the model 'no/such'"):
        shapes_for(one, {})
    found = shapes_for(one, {"model.path": "qwen3-8b", "streams.process.source.model": "qwen2.5-0.5b"})
    assert {key: shape.name for key, shape in found.items()} == {
        "model": "qwen3-8b", "streams.process.source.model": "qwen2.5-0.5b",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="this run has no such model"):
        shapes_for(one, {"critic.model": "qwen3-8b"})


def test_json_is_plain() -> None:
    found = json.loads(json.dumps(as_json(planned(*SMALL), None, [])))
    assert found["fits"] is True
    assert found["shapes"]["model"]["parameters"] == 494_032_768


def test_hardware_by_name() -> None:
    assert gpu_named("h100").name == "H100-80GB"
    with pytest.raises(ConfigError, match="is several of those"):
        gpu_named("A100")
    with pytest.raises(ConfigError, match="is none of those"):
        gpu_named("V100")
    with pytest.raises(ConfigError, match="has no gpu, node_cpus"):
        of_recipe("r", {"node_gpus": 8, "node_memory_gb": 1}, 1)


def test_the_command_refuses_with_1_and_says_the_change(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = ["cluster=local", "cluster.node.gpu=A100-80GB", "cluster.node.gpus=8", "cluster.node.memory_gb=900.0"]
    assert main(["plan", *SMALL, *cluster]) == 0
    assert "It fits." in capsys.readouterr().out
    assert main(["plan", *SEVEN, *cluster, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["fits"], bool(found["nearest"])) == (False, True)
    assert main(["plan", *SMALL]) == 1
    assert "nothing says what GPUs" in capsys.readouterr().err
    assert main(["plan", *SMALL, "cluster=locale"]) == 1
    assert "nearest is 'local'" in capsys.readouterr().err


def test_help_begins_with_the_command_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("rlprm plan ")
    for option in ("--shape", "--response-tokens", "--measure", "--json", "--config-dir", "cluster.node.gpu"):
        assert option in said
    assert len(said.splitlines()) < 40  # one screen


def test_the_shipped_recipe_is_planned_without_an_engine_or_ray_started() -> None:
    program = (
        "import sys; from rlprm.cli.main import main; code = main(['plan', 'recipe=chain_arithmetic_cpu']); "
        "assert not {'vllm', 'deepspeed', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "It fits." in done.stdout


def test_a_micro_batch_is_never_larger_than_what_a_rank_has() -> None:
    few = arithmetic(config(*SMALL, "prompts_per_step=8", "responses_per_prompt=2", "policy.token_budget=65536"))
    assert few.learners[0].micro.rows == 4  # of 64 that the budget allows: two prompts of two responses on each rank


def test_memory_is_measured_on_cpu_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"placement\.device is cuda .* use placement=cpu"):
        measured(config(*SMALL), "policy", tmp_path)
