"""The comparison of both engines: real models through the trainer's own forward pass, one of them perturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlprm.doctor import parity
from rlprm.doctor.parity import compared, tokens, trainer_side
from tests.integration import tiny_models


def told(folder: str, **changed: Any) -> dict[str, Any]:
    rows = tokens(tiny_models.VOCABULARY)
    return {
        **{"model": folder, "dtype": "float32", "attention": "sdpa", "temperature": 1.0, "device": "cpu"},
        **{"tokens": rows, "tensor_parallel": 1},
        "engine": {"_target_": "rlprm.engine.engines.transformers", "_partial_": True, "max_num_seqs": 8},
        **changed,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.folder(tmp_path_factory.mktemp("model"), 0, True)


def test_both_sides_agree_on_one_model_at_any_temperature(model: str) -> None:
    for temperature in (1.0, 0.6):
        one = told(model, temperature=temperature)
        engine, trainer = parity.rollout_side(one), trainer_side(one)
        assert [len(row) for row in engine] == list(parity.LENGTHS)
        assert engine[0][0] == trainer[0][0] == 0.0
        (found,) = compared("node0", engine, trainer, "float32")
        assert found.level == "ok", found.line()


def test_perturbed_weights_on_one_side(model: str, tmp_path: Path) -> None:
    perturbed = tiny_models.model(0, True)
    with torch.no_grad():
        perturbed.model.layers[1].mlp.down_proj.weight[3] *= 1.5  # one row of one matrix
    perturbed.save_pretrained(tmp_path)
    (found,) = compared("node0", parity.rollout_side(told(str(tmp_path))), trainer_side(told(model)), "float32")
    assert (found.level, found.node, found.check) == ("fail", "node0", "log-probs")
    assert "do not compute the same model" in found.cure


def test_another_temperature_on_one_side(model: str) -> None:
    other = parity.rollout_side(told(model, temperature=0.9))
    (found,) = compared("node0", other, trainer_side(told(model)), "float32")
    assert found.level == "fail"


@pytest.mark.parametrize(
    ("difference", "dtype", "level"),
    [(1e-5, "float32", "ok"), (2e-4, "float32", "warn"), (2e-4, "bfloat16", "ok"), (0.05, "bfloat16", "warn"),
     (0.2, "bfloat16", "fail"), (float("nan"), "float32", "fail")],
)  # fmt: skip
def test_the_tolerance_goes_with_the_dtype(difference: float, dtype: str, level: str) -> None:
    rows = [[0.0, -1.0, -2.0]]
    (found,) = compared("node0", [[value + difference for value in row] for row in rows], rows, dtype)
    assert found.level == level


def test_the_fixed_tokens_are_of_the_vocabulary_and_always_the_same() -> None:
    rows = tokens(50)
    assert rows == tokens(50)
    assert {token for row in rows for token in row} <= set(range(50))
    assert len({token for row in rows for token in row}) > 40


def test_a_model_too_large_for_one_gpu_is_not_tried() -> None:
    facts = {
        "models": {"m": {"parameters": 72_000_000_000}},
        "gpus": [{"memory": 80 << 30}],
        "memory": {"available": 1 << 40},
    }
    one = {"model": "m", "dtype": "bfloat16", "device": "cuda"}
    assert parity.too_large(one, facts) == "144 GB of weights, 86 GB on a GPU"
    facts["models"]["m"]["parameters"] = 7_000_000_000
    assert parity.too_large(one, facts) == ""
    found = parity.not_tried("node0", "why")
    assert found.level == "warn"
    assert found.cure
