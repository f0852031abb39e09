"""`rlprm sft` through real Ray and DeepSpeed: it learns, writes a folder that loads, and repeats to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlprm.cli.main import main

pytestmark = pytest.mark.integration


def fine_tuned(folder: Path) -> bytes:
    words = [
        "recipe=chain_arithmetic_cpu", f"output={folder}/model", f"model.path={folder}/initial", "steps=4", "batch_size=8",
        "examples.size=64", "initial.hidden=64", "initial.layers=2", "initial.heads=2", "learner.warmup=1",
    ]  # fmt: skip
    assert main(["sft", *words, "--quiet"]) == 0
    return (folder / "model" / "model.safetensors").read_bytes()


def test_it_writes_a_model_that_loads_and_repeats(
    ray_once: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first, second = fine_tuned(tmp_path / "one"), fine_tuned(tmp_path / "two")
    assert first == second
    assert first != (tmp_path / "one" / "initial" / "model.safetensors").read_bytes()
    loss = float(capsys.readouterr().out.split("loss ")[-1].split()[0])
    assert 0 < loss < 3  # ln 19 = 2.94: no worse than a guess among the 19 characters
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "model")
    assert model.config.hidden_size == 64
    assert AutoTokenizer.from_pretrained(tmp_path / "one" / "model")("1+1\n")["input_ids"]
