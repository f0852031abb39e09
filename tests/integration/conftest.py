"""What whole-run tests share: one Ray, and one warmed tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import support


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
