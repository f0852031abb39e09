"""Worker processes of an ablation; no run gets as far as starting an engine."""

from __future__ import annotations

import json

import pytest

from rlprm.cli.main import main
from rlprm.errors import ConfigError
from rlprm.run.ablation_workers import _devices

DIES = "data.template._target_=tests.integration.planted_templates.killing"
FAILS = "data.max_prompt_tokens=1"
QUICK = ("recipe=chain_arithmetic_cpu", "data.train.chain.reader.source.size=4", "seeds=1", "--quiet")


def states(root):
    found = json.loads((root / "ablation" / "ablation.json").read_text())
    return {name: [run["error"] for run in cell["seeds"].values()] for name, cell in found["cells"].items()}


def test_a_worker_that_dies_takes_one_run_with_it_and_the_others_go_on(tmp_path, capsys):
    words = ["ablate", *QUICK, f"output_dir={tmp_path}", "--parallel", "2"]
    words += ["--cell", f"dies: {DIES}", "--cell", f"fails: {FAILS}", "--cell", f"fails_too: {FAILS} steps=3"]
    assert main(words) == 1
    found = states(tmp_path)
    assert all("worker process ended with exit code -9" in error for error in found["dies"])
    assert all("max_prompt_tokens" in error for cell in ("fails", "fails_too") for error in found[cell])
    said = capsys.readouterr()
    assert said.err.count("failed:") == 3
    assert "- dies, seed 0 failed: its worker process ended" in said.out


def test_in_one_process_a_failed_run_does_not_end_the_others(tmp_path):
    words = ["ablate", *QUICK, f"output_dir={tmp_path}"]
    assert main([*words, "--cell", f"one: {FAILS}", "--cell", f"two: {FAILS} steps=3"]) == 1
    assert set(states(tmp_path)) == {"one", "two"}


def test_gpus_are_dealt_out(tmp_path, monkeypatch):
    from tests.unit.run.test_ablation import planned

    cpu = planned(tmp_path)
    engine = ("rollout=vllm_gpu", "rollout.engine.gpu_memory_utilization=0.4")
    gpu = planned(tmp_path, "a", 0, "placement=gpu1", *engine)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7,9")
    assert _devices([cpu], 3) == [None] * 3
    assert _devices([cpu, gpu], 2) == ["2,3", "5,7"]
    with pytest.raises(ConfigError, match="--parallel 6 with 5 GPUs"):
        _devices([gpu], 6)
