"""Every method of `conf/method/` trains for three steps through the real stack, one after another on kept engines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlprm.cli.compose import groups
from rlprm.cli.main import main
from rlprm.run import training
from rlprm.run.kept import Kept
from rlprm.run.progress import Progress
from rlprm.sources.judge_server import ChainJudge, JudgeServer
from tests.contract import options as listing
from tests.integration.support import CHAIN, PRM, VLLM, configured, json_lines

pytestmark = [pytest.mark.integration, pytest.mark.long]

METHODS = groups()["method"]
QUIET = Progress(Console(quiet=True), patience=1e9)
WORKED = [f"data.train.{name}.reader.source.size=64" for name in ("fill", "order")]
# What the embedded task needs of a method that was written for other answers.
ON_CHAINS = {
    "prof": ["select.keep=2"],
    "prl_segments": ["splitter.tokens=4"],  # answers here are shorter than one of its segments
    "dapo": ["keep.max_rounds=8"],
    "ppo": ["critic.learner.warmup=0"],
    "prime_ppo": ["critic.learner.warmup=0"],
    "ppr": ["critic.learner.warmup=0"],
    "mr_rlvr": [
        "data=chain_arithmetic_masked", "verifier=worked_steps", *CHAIN, *WORKED, "data.train.fill.reader.source.hide=1",
        "data.max_prompt_tokens=32", "prompts_per_step=8",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def kept(ray_once: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    with Kept(tmp_path_factory.mktemp("kept") / "logs", QUIET) as standing:
        yield standing


@pytest.fixture(scope="module")
def judge() -> Iterator[str]:
    with JudgeServer(ChainJudge(modulus=3, error_rate=0.1, unparsable_rate=0.1, delay_s=0.0, seed=0), 0) as server:
        yield server.url


@pytest.fixture(scope="module")
def prm(ray_once: None, model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PRM made on the spot; how good it is does not matter here."""
    output = tmp_path_factory.mktemp("prm") / "model"
    task = [f"{part}.{word}" for part in ("solutions", "held_out") for word in ("modulus=3", "operations=[2,2]")]
    words = [f"model.path={model}", f"output={output}", "steps=4", "batch_size=16", "learner.warmup=0", *task]
    assert main(["prm", *words, "solutions.size=96", "held_out.size=16", "--quiet"]) == 0
    return str(output)


def overrides(method: str, judge: str, prm: str) -> list[str]:
    """The method with what only a user can know filled in, on answers that are lines without a box."""
    known = [each.replace(listing.JUDGE, judge) for each in listing.given_to_sources("method", method)]
    sources = {package: listing.chosen_in(method, package) for package in packages(method)}
    fitting = []
    for package, source in sources.items():
        if source in ("qwen_prm", "reasonflux_prm", "discriminative"):
            fitting.append(f"source@{package}=discriminative")
        elif source == "format":
            fitting.append(f"source@{package}=format_lines")
        elif source.startswith("implicit") and source != "implicit_istar_released":
            fitting += [each.replace("streams.process.source", package) for each in PRM]
    models = [each if not each.endswith("=somewhere") else each.replace("somewhere", prm) for each in known]
    return [f"method={method}", *fitting, *models, *ON_CHAINS.get(method, [])]


def packages(method: str) -> list[str]:
    content = listing.read(listing.conf_dir() / "method" / f"{method}.yaml")
    return [package for group, package in listing.defaults_of(content) if group == "source"]


@pytest.mark.parametrize("method", METHODS)
def test_method_trains_for_three_steps(
    method: str, kept: Kept, judge: str, prm: str, model: str, tmp_path: Path
) -> None:
    config, made = configured(tmp_path, model, *VLLM, "steps=3", f"name={method}", *overrides(method, judge, prm))
    rows: list[dict[str, Any]] = json_lines(training.train(config, made, QUIET, kept) / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert "training/nonfinite_metrics" not in row  # written only where there are some
        assert row["actor/updates"] >= 1
        assert row["actor/ratio_first_diff"] <= 1e-5
        for name, stream in config.streams.items():
            if stream.weight is not None:
                assert 0 <= row[f"reward/{name}/frac_present"] <= 1
                assert math.isfinite(row[f"adv/{name}/std"])
    paid = [name for name, stream in config.streams.items() if stream.weight]
    assert any(row[f"adv/{name}/std"] > 0 for row in rows for name in paid), "no step had any credit"
