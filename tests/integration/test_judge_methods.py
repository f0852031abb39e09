"""Whole runs with a generative judge: a server over HTTP, and a model on an engine of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlprm.data.tasks.chain_arithmetic import write_model_folder
from rlprm.sources.judge_server import ChainJudge, JudgeServer
from tests.integration.support import TRANSFORMERS, VLLM, Done, moved, train

pytestmark = pytest.mark.integration

# The stream that has the judge, and what a method needs on answers that are lines without \boxed{}.
METHODS = {
    "capo": ("process", ()),
    "ppr": ("process", ("critic.learner.warmup=0",)),
    "posterior_grpo": ("process", ("source@streams.format.source=format_lines",)),
    "papo": ("process", ()),
    "tp_grpo": ("process", ()),
    "verdict_probability": ("process", ()),
    "spark_process_aware": ("verdict", ("source@streams.format.source=format_lines",)),
    "spark_step_augmented": ("verdict", ("source@streams.format.source=format_lines",)),
    "spark_selective": ("steps", ("source@streams.format.source=format_lines",)),
    "spark_global_step": ("steps", ("source@streams.format.source=format_lines",)),
}


@pytest.fixture(scope="module")
def judge() -> Iterator[JudgeServer]:
    """Wrong in one verdict of ten, unreadable in one reply of ten."""
    with JudgeServer(ChainJudge(modulus=3, error_rate=0.1, unparsable_rate=0.1, delay_s=0.0, seed=0), 0) as server:
        yield server


def run(folder: Path, model: str, url: str, method: str, *overrides: str) -> tuple[Done, str]:
    """Two steps; the name of the stream that has the judge."""
    stream, needed = METHODS[method]
    done = train(
        folder, model, *TRANSFORMERS, "steps=2", "tracker.rollout_groups=4", f"method={method}",
        f"streams.{stream}.source.kind.client.url={url}", *needed, *overrides,
    )  # fmt: skip
    return done, stream


def test_capo_learns_from_a_judge_over_http(ray_once: None, model: str, tmp_path: Path, judge: JudgeServer) -> None:
    before = judge.answered
    done, _ = run(tmp_path, model, judge.url, "capo")
    assert moved(done.exported / "policy", model) > 1e-4
    calls = 0.0
    for row in done.metrics_of_steps:
        calls += row["judge/process/calls"]
        assert row["judge/process/calls"] == 4 * row["training/rollouts_total"] / row["step"]  # four votes each
        assert 0 < row["judge/process/frac_unparsed"] < 0.3
        assert row["judge/process/frac_failed"] == 0
        assert row["judge/process/frac_absent"] == 0  # four votes, of which one in ten fails
        assert 0 < row["judge/process/disagreement"] < 1
        assert row["judge/process/label_agreement"] > 0.8
        assert row["reward/process/max"] <= 2.0
        assert row["reward/process/min"] >= -1.0
    assert judge.answered - before == calls


@pytest.mark.long
@pytest.mark.parametrize("method", [method for method in METHODS if method != "capo"])
def test_every_other_judge_method_takes_two_steps(
    method: str, ray_once: None, model: str, tmp_path: Path, judge: JudgeServer
) -> None:
    done, stream = run(tmp_path, model, judge.url, method)
    assert moved(done.exported / "policy", model) > 1e-5
    for row in done.metrics_of_steps:
        assert row[f"judge/{stream}/calls"] > 0
        assert row[f"judge/{stream}/frac_absent"] < 0.5


def test_a_judge_that_says_nothing_readable_pays_nothing_and_the_run_goes_on(
    ray_once: None, model: str, tmp_path: Path
) -> None:
    """A random model on a vLLM engine of its own: every reply is noise."""
    folder = tmp_path / "judge"
    write_model_folder(folder, 1, hidden=64, layers=1, heads=2, mlp=64, context=1024)
    done = train(
        tmp_path, model, *VLLM, "steps=2", "method=tp_grpo", "judge_client@streams.process.source.kind.client=engines_plain",
        f"streams.process.source.model={folder}", "streams.process.source.kind.max_tokens=32",
        "streams.process.source.kind.client.max_prompt_tokens=768", "streams.process.source.kind.max_absent=1.0",
    )  # fmt: skip
    for row in done.metrics_of_steps:
        assert row["judge/process/calls"] == 16
        assert row["judge/process/frac_failed"] == 0  # the engine answered every time
        assert row["judge/process/frac_unparsed"] == 1.0
        assert row["judge/process/frac_absent"] == 1.0
        assert row["reward/process/frac_present"] == 0
        assert row["adv/process/abs_mean"] == 0
    assert moved(done.exported / "policy", model) > 1e-4  # the outcome goes on
