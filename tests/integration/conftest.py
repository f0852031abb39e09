"""What whole-run tests share: one Ray, and one warmed tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import support
from tests.integration.support import PRM, VLLM, Done


@pytest.fixture(scope="session")
def ray_once() -> Iterator[None]:
    """Ray, started once by the program's own code; every run of the session finds it and leaves it up."""
    from rlprm.actors.cluster import cluster

    root = str(Path(__file__).resolve().parents[2])
    with cluster(address=None, num_actors=12, gpus=0.0, object_store_bytes=200_000_000, working_dir=root):
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny model that is right about some chains."""
    return support.warmed_model(tmp_path_factory.mktemp("model"))


# Everything that a run can write, and every step saved.
THREE_STEPS = (
    *PRM, *VLLM, "placement=cpu_two_ranks", "policy.zero_stage=2", "steps=3", "gate@streams.process.gate=trust",
    "tracker=wandb", "tracker.rollout_groups=2", "tracker.tensorboard=true", "checkpoint.every=1",
    "checkpoint.keep_last=3", "evaluation.every=2", "evaluation.samples=2",
)  # fmt: skip


@pytest.fixture(scope="session")
def three_steps(ray_once: None, model: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """PRIME for three steps on 2 policy ranks (ZeRO-2), 1 PRM rank and 1 vLLM engine."""
    return support.train(tmp_path_factory.mktemp("three_steps"), model, *THREE_STEPS)
