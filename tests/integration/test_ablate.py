"""An ablation on the real stack: what runs on kept engines is what runs alone, and nothing is run twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlprm.cli.compose import composed
from rlprm.cli.main import main
from rlprm.config import TrainConfig, validated
from rlprm.run import kept, starting, training
from rlprm.run.progress import Progress
from tests.integration.support import CHAIN, PRM, SMALL, VLLM, json_lines

pytestmark = pytest.mark.integration

SHARED = (*SMALL, *CHAIN, *VLLM, "steps=2", "evaluation.every=2", "tracker.rollout_groups=2")
PRIME = ("method=prime_as_written", *PRM)


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Everything that a run has logged, but for what the clock and the machine say."""
    rows = json_lines(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(("timing_s/", "perf/"))} for row in rows]


def alone(folder: Path, *overrides: str) -> Path:
    """The same run with engines and processes of its own."""
    made = composed("train", [*overrides, f"output_dir={folder}"])
    return training.train(validated(TrainConfig, made.values), made, Progress(quiet=True))


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each start of engines or learner processes from now on; the real ones start."""
    seen: list[str] = []
    sampling, learners = starting.sampling_actors, starting.ranks

    def watched_sampling(*given: Any) -> Any:
        seen.append("engines")
        return sampling(*given)

    def watched_learners(name: str, *given: Any) -> Any:
        seen.append(name)
        return learners(name, *given)

    monkeypatch.setattr(starting, "sampling_actors", watched_sampling)
    monkeypatch.setattr(starting, "ranks", watched_learners)
    return seen


def test_two_cells_two_seeds(
    ray_once: None, model: str, tmp_path: Path, starts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shared = [*SHARED, f"model.path={model}"]
    words = ["ablate", *shared, f"output_dir={tmp_path}", "name=two", "seeds=2", "--quiet", "--baseline", "rloo"]
    words += ["--cell", "rloo: method=outcome_rloo", "--cell", f"prime: {' '.join(PRIME)}"]
    broken = ["--cell", "broken: data.max_prompt_tokens=1"]
    assert main([*words, *broken]) == 1
    # engines and the policy's processes once, the PRM's when a cell has one, although three cells took turns
    assert starts == ["engines", "policy", "prm"]
    said = capsys.readouterr()
    assert "broken, seed 0 failed" in said.err
    root = tmp_path / "two"
    found = json.loads((root / "ablation.json").read_text())
    states = {name: [run["state"] for run in cell["seeds"].values()] for name, cell in found["cells"].items()}
    assert states == {"rloo": ["finished"] * 2, "prime": ["finished"] * 2, "broken": ["failed"] * 2}
    assert found["rollouts"] == 2 * 4 * 4
    assert found["cells"]["prime"]["values"]["auc"] is not None
    assert found["cells"]["prime"]["minus_baseline"]["sampled"]["count"] == 2
    assert "32 sampled rollouts" in (root / "report.md").read_text()
    assert (root / "sampled_curves.png").is_file()
    assert not (root / "prime" / "seed1" / "checkpoints").exists()

    # the last run on kept engines, after other weights, other seeds and another method, and the same run alone
    by_itself = alone(tmp_path / "alone", *shared, *PRIME, "seed=1", "name=prime")
    assert numbers(root / "prime" / "seed1") == numbers(by_itself)
    assert (root / "prime" / "seed1" / "rollouts.jsonl").read_bytes() == (by_itself / "rollouts.jsonl").read_bytes()
    assert numbers(root / "prime" / "seed0") != numbers(by_itself)

    # the second call has nothing to run but what failed, and without that it starts nothing
    before = {path: path.stat().st_mtime_ns for path in root.glob("*/seed*/metrics.jsonl")}
    starts.clear()
    assert main(words) == 0
    assert starts == []
    assert {path: path.stat().st_mtime_ns for path in root.glob("*/seed*/metrics.jsonl")} == before
    assert "broken" not in (root / "report.md").read_text()


@pytest.mark.long
def test_kept_ranks_of_zero3_with_a_critic_repeat_a_run_to_the_last_bit(
    ray_once: None, model: str, tmp_path: Path, starts: list[str]
) -> None:
    """Two policy ranks, partitioned weights, a value head drawn at random, weights sent over gloo."""
    overrides = [
        *SHARED, f"model.path={model}", "method=ppo", "placement=cpu_two_ranks", "policy.zero_stage=3",
        "critic.learner.zero_stage=3", "placement.weight_transport=gloo",
    ]  # fmt: skip
    with kept.Kept(tmp_path / "logs", Progress(quiet=True)) as standing:
        for name, extra in (
            ("first", ("seed=0",)),
            ("prime", (*PRIME, "seed=5", "critic=null")),
            ("again", ("seed=0",)),
        ):
            made = composed("train", [*overrides, *extra, f"name={name}", f"output_dir={tmp_path}"])
            training.train(validated(TrainConfig, made.values), made, Progress(quiet=True), standing)
    assert starts == ["engines", "policy", "prm"]
    assert numbers(tmp_path / "again" / "seed0") == numbers(tmp_path / "first" / "seed0")
    assert numbers(tmp_path / "prime" / "seed5") != numbers(tmp_path / "first" / "seed0")


@pytest.mark.long
def test_workers_share_the_cells_and_one_that_dies_takes_one_run_with_it(model: str, tmp_path: Path) -> None:
    """Each worker has a Ray of its own; the one that runs `dies` is killed by its own run."""
    words = ["ablate", *SHARED, f"model.path={model}", f"output_dir={tmp_path}", "name=side", "seeds=1", "--quiet"]
    words += ["--cell", "rloo: method=outcome_rloo", "--cell", f"prime: {' '.join(PRIME)}", "--parallel", "2"]
    dies = "dies: data.template._target_=tests.integration.planted_templates.killing"
    assert main([*words, "--cell", dies]) == 1
    found = json.loads((tmp_path / "side" / "ablation.json").read_text())
    states = {name: cell["seeds"]["0"]["state"] for name, cell in found["cells"].items()}
    assert states == {"rloo": "finished", "prime": "finished", "dies": "failed"}
    assert "exit code -9" in found["cells"]["dies"]["seeds"]["0"]["error"]
