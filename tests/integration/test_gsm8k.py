"""Real prompts, a chat template and the maths verifier, through one whole step with a model that knows nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.support import PRM, VLLM, Done, moved, train
from tests.integration.support_bytes import byte_model

pytestmark = pytest.mark.integration

DATA = Path(__file__).resolve().parents[1] / "data" / "gsm8k_small"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    return byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def gsm8k(ray_once: None, untrained: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """One PRIME step; prompts of more than 512 bytes are left out, of 16 some are."""
    return train(
        tmp_path_factory.mktemp("gsm8k"), untrained, *PRM, *VLLM, "data=gsm8k", "verifier=math", "verifier.workers=1",
        f"data.train.gsm8k.reader.path={DATA}/train.jsonl", f"data.evaluation.gsm8k_test.path={DATA}/test.jsonl",
        "data.max_prompt_tokens=512", "max_response_tokens=48", "steps=1", "keep=all", "keep.min_prompts=2",
        "evaluation.every=1", "evaluation.limit=4", "evaluation.samples=0", "tracker.rollout_groups=4",
    )  # fmt: skip


def rendered(question: str) -> str:
    asked = f"{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"


def test_prompts_are_the_questions_in_the_chat_template(gsm8k: Done) -> None:
    questions = [json.loads(line)["question"] for line in (DATA / "train.jsonl").read_text().splitlines()]
    asked = {row["prompt"] for row in gsm8k.rollouts}
    assert len(asked) == 4
    assert asked <= {rendered(question) for question in questions}


def test_long_prompts_are_left_out_and_counted(gsm8k: Done) -> None:
    lengths = [
        len(rendered(json.loads(line)["question"]).encode()) - 2 * len("<|im_start|>") - len("<|im_end|>") + 3
        for line in (DATA / "train.jsonl").read_text().splitlines()
    ]
    row = gsm8k.metrics[-1]
    assert row["data/gsm8k/num_rows"] == 16
    assert row["data/gsm8k/num_too_long"] == sum(length > 512 for length in lengths) > 0
    assert row["prompt_length/max"] <= 512


def test_every_response_gets_a_verdict(gsm8k: Done) -> None:
    row = gsm8k.metrics[-1]
    assert row["verifier/frac_absent"] == 0
    assert row["keep/rollouts_sampled"] == 16
    assert all(each.outcome in (0.0, 1.0) for each in gsm8k.rows[0])


def test_the_untrained_model_is_evaluated_before_and_after(gsm8k: Done) -> None:
    assert [row["step"] for row in gsm8k.metrics] == [0, 1]
    for row in gsm8k.metrics:
        assert row["val-core/gsm8k_test/accuracy/greedy"] == 0
        assert 0 < row["val-aux/gsm8k_test/num_prompts"] <= 4


def test_the_prm_learns_from_the_outcomes_and_the_loop_closes(gsm8k: Done, untrained: str) -> None:
    assert moved(gsm8k.exported / "process", untrained) > 1e-5
    assert gsm8k.metrics[-1]["prm/loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: r(y) = 0 before the first update
    assert gsm8k.metrics[-1]["weights/version"] == 1
    assert all(publication.gap < 1e-5 for publication in gsm8k.published)
