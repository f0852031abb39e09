"""What a command's configuration asks of its environment; and the command line of `rlprm doctor` itself."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from rlprm.cli import doctor
from rlprm.cli.main import main
from rlprm.doctor.wanted import files_in, wanted
from rlprm.errors import ConfigError
from rlprm.paths import recipes_dir
from rlprm.run.preflight import connectable

RECIPE = "recipe=chain_arithmetic_cpu"
MODEL = str(recipes_dir() / "chain_arithmetic_cpu" / "model")


def of(*words: str, command: str = "train") -> Any:
    return wanted(doctor.configured(command, words))


def test_training() -> None:
    run = of(RECIPE, "output_dir=there", "checkpoint.keep_last=2", "tracker=wandb")
    assert run.models == {"model.path": MODEL, "streams.process.source.model": MODEL}
    assert run.trained == (MODEL, MODEL)
    assert run.checkpoints == 3
    assert run.wandb
    assert run.folder == str(Path("there").absolute())
    assert run.rollout is not None
    assert run.rollout["_target_"].endswith(".vllm")


def test_evaluation_has_no_learner_and_no_checkpoint() -> None:
    run = of(RECIPE, command="evaluate")
    assert run.models == {"model.path": MODEL}
    assert run.trained == ()
    assert run.checkpoints == 0
    assert run.verifier is not None
    assert not run.wandb
    assert run.folder is None


def test_fine_tuning_that_makes_its_own_model(tmp_path: Path) -> None:
    run = of("recipe=chain_arithmetic_cpu", f"output={tmp_path / 'out'}", command="sft")
    assert run.models == {}
    assert run.folder == str(tmp_path)
    assert run.verifier is None


def test_an_ablation_asks_what_its_runs_have_in_common() -> None:
    run = of(RECIPE, "normalizer=raw,group_zscore", "seeds=3", "placement.nodes=2", command="ablate")
    assert run.nodes == 2
    assert run.models["model.path"] == MODEL


def test_a_command_without_a_configuration_asks_nothing() -> None:
    assert doctor.configured("report", ["somewhere"]) is None
    assert wanted(None).models == {}
    assert wanted(None).nodes == 1


def test_files_are_found_in_readers_whatever_they_are_nested_in() -> None:
    values = {"a": [{"reader": {"_target_": "x", "paths": ["one", "two"]}}], "path": "three", "format": "{path}"}
    assert list(files_in(values)) == ["one", "two", "three"]


def test_overrides_of_the_launch_are_told_from_those_of_the_run() -> None:
    mine, words = doctor.split([RECIPE, "cluster=local", "cluster.port=7001", "steps=2"])
    assert mine == ["cluster=local", "cluster.port=7001"]
    assert words == [RECIPE, "steps=2"]
    run = wanted(doctor.configured("train", words), cluster=doctor.launched(mine))
    assert run.port == 7001


def test_a_wrong_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "recipe=chain_arithmetic_cp"]) == 1
    assert "nearest is 'chain_arithmetic_cpu'" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["somewhere", "host:", ":6379", "host:port"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        connectable(address)


def test_this_machine_is_examined_quickly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", RECIPE, "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["check"] for each in found} >= {"versions", "model", "verifier", "W&B", "ports", "disk space"}
    assert not {each["check"] for each in found} & {"log-probs", "all-reduce"}
    assert all(set(each) == {"check", "node", "level", "found", "cure", "seconds"} for each in found)
    assert all(each["seconds"] > 0 for each in found if each["check"] in ("model", "versions"))


def test_a_fault_of_this_machine_is_a_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main(["doctor", RECIPE, "--quick", "cluster=local", f"cluster.port={port}", "placement.nodes=2"]) == 1
    said = capsys.readouterr().out.splitlines()
    bad = [line for line in said if not line.startswith("ok")]
    assert bad[0].startswith("fail  ports")
    assert str(port) in bad[0]
    assert bad[1].startswith("warn  nodes")
    assert "--address" in bad[1]
    assert bad[2].endswith("1 warn, 1 fail")
