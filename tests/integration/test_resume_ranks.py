"""A learner saved by some ranks goes on on another number of them: weights, Adam's state by name, and what follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprm.engine.resharding import read
from rlprm.errors import CheckpointError
from tests.integration import tiny_models
from tests.integration.resume_program import OWN_SEED, SAVED_SEED
from tests.integration.test_learner_ranks import free_port

pytestmark = pytest.mark.integration

DTYPES = ("float32", "bfloat16")
OFTEN, SELDOM = (2, 3), (0, 1)  # ZeRO stages; rising, for ZeRO-3 leaves its own matrix product behind in the process
CHANGES = ((2, 1), (1, 2), (3, 2))  # ranks that saved, ranks that go on


class Runs:
    """Groups of ranks that work through jobs in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_models.folder(folder, 0, True)

    @contextmanager
    def ranks(self, world: int, jobs: list[dict[str, Any]]) -> Iterator[None]:
        """All ranks at work while the block lasts; it ends when they do."""
        root = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        port = str(free_port())
        logs = [self.folder / f"log-{jobs[0]['name']}-{rank}" for rank in range(world)]
        started = []
        try:
            for rank, log in enumerate(logs):
                command = [sys.executable, "-m", "tests.integration.resume_program", str(rank), str(world), port,
                           self.model, str(self.folder), json.dumps(jobs)]  # fmt: skip
                with log.open("w") as output:
                    started.append(
                        subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT)
                    )
            yield
            codes = [each.wait(timeout=300) for each in started]
        finally:
            for each in started:
                each.kill()
        assert codes == [0] * world, "\n".join(log.read_text()[-3000:] for log in logs)

    def found(self, first: str, rank: int) -> dict[str, Any]:
        return torch.load(self.folder / f"{first}-findings-{rank}.pt", weights_only=True)


def saved(ranks: int, stage: int, dtype: str) -> str:
    return f"by{ranks}-{dtype}-{stage}"


def resumed(before: int, now: int, stage: int, dtype: str) -> str:
    return f"by{before}on{now}-{dtype}-{stage}"


def whole_family(folder: Path, stages: tuple[int, ...]) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """Learners of three, two and one rank that save and go on, and those that resume; by job, what each rank found."""
    cases = [(stage, dtype) for stage in stages for dtype in DTYPES]
    runs = Runs(folder)

    def train(ranks: int, stage: int, dtype: str) -> dict[str, Any]:
        return {"name": saved(ranks, stage, dtype), "stage": stage, "dtype": dtype, "steps": 3}

    def resume(before: int, now: int, stage: int, dtype: str) -> dict[str, Any]:
        of = saved(before, stage, dtype)
        return {"name": resumed(before, now, stage, dtype), "from": of, "stage": stage, "dtype": dtype}

    with runs.ranks(3, [train(3, *case) for case in cases]), runs.ranks(1, [train(1, *case) for case in cases]):
        pass
    with runs.ranks(2, [job for case in cases for job in (train(2, *case), resume(1, 2, *case), resume(3, 2, *case))]):
        pass
    with runs.ranks(1, [resume(2, 1, *case) for case in cases]):
        pass
    first = cases[0]
    groups = {saved(3, *first): 3, saved(1, *first): 1, saved(2, *first): 2, resumed(2, 1, *first): 1}
    found: dict[str, list[dict[str, Any]]] = {}
    for name, ranks in groups.items():
        each = [runs.found(name, rank) for rank in range(ranks)]
        found |= {job: [one[job] for one in each] for job in each[0]}
    return folder, found


@pytest.fixture(scope="module")
def often(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    return whole_family(tmp_path_factory.mktemp("often"), OFTEN)


@pytest.fixture(scope="module")
def seldom(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    return whole_family(tmp_path_factory.mktemp("seldom"), SELDOM)


@pytest.fixture
def family(stage: int, request: pytest.FixtureRequest) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    return request.getfixturevalue("often" if stage in OFTEN else "seldom")


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """``|found - expected| / |expected|`` over all weights."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    return (difference / sum(float(tensor.double().square().sum()) for tensor in expected.values())) ** 0.5


stages = pytest.mark.parametrize("stage", [*OFTEN, *(pytest.param(stage, marks=pytest.mark.long) for stage in SELDOM)])
dtypes = pytest.mark.parametrize("dtype", DTYPES)
changes = pytest.mark.parametrize(("before", "now"), CHANGES)


@stages
@dtypes
@changes
def test_weights_are_the_same_to_the_last_bit(
    family: tuple[Path, Any], stage: int, dtype: str, before: int, now: int
) -> None:
    whole, again = family[1][saved(before, stage, dtype)][0], family[1][resumed(before, now, stage, dtype)][0]
    assert whole["before"].keys() == again["before"].keys()
    assert all(torch.equal(again["before"][name], tensor) for name, tensor in whole["before"].items())


@stages
@dtypes
@changes
def test_the_next_steps_are_those_of_the_run_that_was_not_cut(
    family: tuple[Path, Any], stage: int, dtype: str, before: int, now: int
) -> None:
    whole, again = family[1][saved(before, stage, dtype)][0], family[1][resumed(before, now, stage, dtype)][0]
    moved = distance(whole["after"], whole["before"])
    # bf16 rounds differently where other sequences share a micro-batch
    allowed = 1e-6 if dtype == "float32" else moved / 10
    assert distance(again["after"], whole["after"]) < allowed < moved / 5
    assert torch.allclose(
        torch.tensor(again["losses"]), torch.tensor(whole["losses"]), rtol=2e-5 if dtype == "float32" else 0.03
    )
    assert again["steps"] == whole["steps"] == 5
    assert again["groups"] == whole["groups"]  # weight decay on matrices only, and the learning rate


@pytest.mark.parametrize("stage", [*OFTEN, pytest.param(1, marks=pytest.mark.long)])
@dtypes
@changes
def test_adam_goes_on_by_name(family: tuple[Path, Any], stage: int, dtype: str, before: int, now: int) -> None:
    """What the new ranks save at once is what the old ones had saved: each parameter's float32 weights and moments."""
    folder = family[0]
    old = read(folder / saved(before, stage, dtype) / "state", before)
    new = read(folder / resumed(before, now, stage, dtype) / "state", now)
    assert old.pieces.keys() == new.pieces.keys()
    assert float(old.scalars["step"]) == float(new.scalars["step"]) == 3
    for name, quantities in old.pieces.items():
        assert quantities.keys() == {"fp32", "exp_avg", "exp_avg_sq"}
        for quantity in quantities:
            assert torch.equal(old.full(name, quantity), new.full(name, quantity)), (name, quantity)
    assert any(float(old.full(name, "exp_avg_sq").sum()) > 0 for name in old.pieces)


@stages
@dtypes
def test_random_states_belong_to_ranks(family: tuple[Path, Any], stage: int, dtype: str) -> None:
    """Rank 0 goes on with its own; a rank that the checkpoint does not know keeps what it has."""
    first, second = (rank["random"] for rank in family[1][resumed(1, 2, stage, dtype)])
    assert torch.equal(first, torch.manual_seed(SAVED_SEED).get_state())
    assert torch.equal(second, torch.manual_seed(OWN_SEED).get_state())
    _, second = (rank["random"] for rank in family[1][resumed(3, 2, stage, dtype)])
    assert torch.equal(second, torch.manual_seed(SAVED_SEED + 1).get_state())


def test_a_missing_part_is_named(often: tuple[Path, Any]) -> None:
    folder = often[0] / saved(3, 2, "float32") / "state"
    assert len(list(folder.glob("*_optim_states.pt"))) == 3
    with pytest.raises(CheckpointError, match=r"0 files .* of rank 3"):
        read(folder, 4)
    with pytest.raises(CheckpointError, match=r"has \d+ elements and its parts on 2 ranks have"):
        read(folder, 2)


def test_another_stage_is_refused(often: tuple[Path, Any]) -> None:
    from rlprm.engine.checkpoints import read_card

    folder = often[0] / saved(3, 2, "float32")
    assert read_card(folder, {"zero_stage": 2, "dtype": "float32"})["world_size"] == 3
    with pytest.raises(CheckpointError, match="written with zero_stage=2 and this run has zero_stage=3"):
        read_card(folder, {"zero_stage": 3, "dtype": "float32"})
