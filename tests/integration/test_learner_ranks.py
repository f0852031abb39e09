"""The learner over two real ranks (gloo): ZeRO stages agree, uneven ranks, refused steps, resuming, exporting."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprm.engine import distributed
from rlprm.engine.learner import Learner
from rlprm.engine.model import load_causal
from rlprm.errors import CheckpointError
from tests.integration import learner_program as program
from tests.integration import tiny_models

pytestmark = pytest.mark.integration

STAGES = (0, 1, 2, 3)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tiny_models.folder(tmp_path_factory.mktemp("learner"), 0, True)
    (Path(path) / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def folder(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both ranks have run :mod:`learner_program` and left their findings here."""
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    port = str(free_port())
    logs = [folder / f"log-{rank}" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            command = [
                sys.executable,
                "-m",
                "tests.integration.learner_program",
                str(rank),
                "2",
                port,
                model,
                str(folder),
            ]
            ranks.append(subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=400) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return folder


@pytest.fixture(scope="module")
def findings(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"findings-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def expected(model: str) -> dict[str, Tensor]:
    """The gradient in plain torch, float64, one sequence after another, log-softmax and entropy written out."""
    subject = tiny_models.model(0, True).double()
    data = program.corpus()
    denominator = int(data.response.sum())
    start = 0
    for size, prompt in zip(program.LENGTHS, program.PROMPTS, strict=True):
        ids = data.tokens[start : start + size]
        advantages = data.advantages[start + prompt : start + size].double()
        log_p = torch.log_softmax(subject(input_ids=ids[None]).logits[0, prompt - 1 : -1] / 0.7, -1)
        picked = log_p.gather(-1, ids[prompt:, None]).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        (-(torch.exp(picked / 4) * advantages + 0.1 * entropy).sum() / denominator).backward()
        start += size
    return {name: parameter.grad for name, parameter in subject.named_parameters()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """``|found - expected| / |expected|`` over the whole gradient vector."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(tensor.square().sum()) for tensor in expected.values())) ** 0.5


def test_the_ranks_are_uneven(findings: list[dict[str, Any]]) -> None:
    assert [one["micro_batches"] for one in findings] == [4, 1]


@pytest.mark.parametrize("case", [*(f"gradient-{stage}" for stage in STAGES), "gradient-packed", "gradient-idle-rank"])
def test_gradient_is_the_plain_full_batch_one(
    findings: list[dict[str, Any]], expected: dict[str, Tensor], case: str
) -> None:
    assert distance(findings[0][case], expected) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_norms_are_those_of_one_rank(findings: list[dict[str, Any]], model: str, stage: int) -> None:
    two = torch.tensor(findings[0][f"float32-{stage}"]["losses"])
    one = torch.tensor(findings[0]["float32-0"]["losses"])
    assert torch.allclose(two, one, rtol=2e-5), (two, one)
    assert findings[0][f"float32-{stage}"]["losses"] == findings[1][f"float32-{stage}"]["losses"]
    assert two[2, 0] < two[0, 0], "three steps do not lower the loss"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_loss_on_one_rank_is_refused_by_both(findings: list[dict[str, Any]], stage: int, dtype: str) -> None:
    both = [one[f"{dtype}-{stage}"] for one in findings]
    assert both[0]["refused"] == both[1]["refused"]
    assert "step 4 was not taken: rank 1: the loss is not finite" in both[0]["refused"]
    assert "rank 0" not in both[0]["refused"]
    assert [one["steps"] for one in both] == [3, 3]
    assert not both[0]["moved_by_refused"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_learner_goes_on_bit_by_bit_the_same(findings: list[dict[str, Any]], stage: int, dtype: str) -> None:
    one = findings[0][f"{dtype}-{stage}"]
    assert one["resumed"] == one["continued"]
    assert one["continued"][0] != one["continued"][1]
    assert one["resumed_weights_equal"]
    assert one["resumed_steps"] == 5


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_follows_float32(findings: list[dict[str, Any]], stage: int) -> None:
    half = torch.tensor(findings[0][f"bfloat16-{stage}"]["losses"])[:, 0]
    full = torch.tensor(findings[0][f"float32-{stage}"]["losses"])[:, 0]
    assert torch.allclose(half, full, atol=0.02), (half, full)


def test_scoring_under_zero_3_survives_uneven_ranks(findings: list[dict[str, Any]]) -> None:
    reference = tiny_models.model(0, True)
    for one, (lengths, prompts) in zip(findings, ((program.LENGTHS, program.PROMPTS), ((5,), (2,))), strict=True):
        data = program.corpus(lengths, prompts)
        start = 0
        for size, prompt in zip(lengths, prompts, strict=True):
            plain = tiny_models.logprobs(reference, data.tokens[start : start + size].tolist(), 0.7)
            found = one["logprobs"][start : start + size]
            assert torch.allclose(found[prompt:], plain[prompt - 1 :], atol=1e-5)
            assert not found[:prompt].any()
            start += size


def test_weights_come_once_on_rank_0_with_known_shapes(findings: list[dict[str, Any]]) -> None:
    shapes = dict(findings[1]["shapes"])
    assert findings[0]["names"] == list(shapes)
    assert findings[1]["names"] == []
    assert "lm_head.weight" not in shapes  # tied to the embedding
    assert shapes["model.embed_tokens.weight"] == (tiny_models.VOCABULARY, 64)


def test_the_export_loads_in_transformers_with_its_tokenizer(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder / "export").state_dict()
    original = tiny_models.model(0, True).state_dict()
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in original.items())
    assert (folder / "export" / "tokenizer.json").read_text() == "{}"


def test_reductions_are_exact_and_keep_nan(findings: list[dict[str, Any]]) -> None:
    assert all(one["sum"] == [2 * (2**24 + 1), 1] for one in findings)
    assert all(one["largest"] != one["largest"] for one in findings)


def test_another_stage_and_damage_are_named(folder: Path, model: str, tmp_path: Path) -> None:
    distributed.join(0, 1, "127.0.0.1", free_port())
    try:
        subject = Learner(
            load_causal(model, "float32", attention="sdpa", gradient_checkpointing=False), program.SETTINGS
        )
        with pytest.raises(CheckpointError, match=r"zero_stage=3 and this run has zero_stage=\d"):
            subject.load(folder / "float32-3")
        with pytest.raises(CheckpointError, match="no learner state"):
            subject.load(tmp_path)
        subject.save(tmp_path / "good")
        for file in (tmp_path / "good").rglob("*.pt"):
            shutil.copyfile(__file__, file)
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            subject.load(tmp_path / "good")
        subject.close()
    finally:
        distributed.leave()
