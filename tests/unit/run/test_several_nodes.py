"""What is asked of several nodes before anything starts on them, and what is said when they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlprm.actors import same_everywhere
from rlprm.actors.nodes import Failed, Node
from rlprm.actors.seating import Seating
from rlprm.cli.compose import composed
from rlprm.config import TrainConfig, validated
from rlprm.errors import ConfigError
from rlprm.placement import Seats
from rlprm.run import several_nodes

NODES = [
    Node(index=index, id=f"id{index}", name=f"host{index}", address=f"10.0.0.{index}", cpus=8.0, gpus=0.0)
    for index in range(3)
]


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Any]], None]:
    """Lets some nodes give another answer than this process would."""

    def plant(others: dict[int, Any]) -> None:
        def on_each(nodes: Sequence[Node], function: Any, *given: Any, timeout_s: float, options: Any) -> list[Any]:
            return [others[node.index] if node.index in others else function(*given) for node in nodes]

        monkeypatch.setattr(same_everywhere, "on_each", on_each)

    return plant


def test_a_silent_node_is_a_finding(answered: Any, tmp_path: Path) -> None:
    answered({1: Failed(reason="ModuleNotFoundError: No module named 'rlprm'")})
    (found,) = same_everywhere.unequal_versions(NODES, timeout_s=1.0)
    assert found.startswith("node host1 (10.0.0.1) gave no answer: ModuleNotFoundError")
    (unseen,) = same_everywhere.unseen_folder(NODES, tmp_path, timeout_s=1.0)
    assert "host1" in unseen
    assert list(tmp_path.iterdir()) == []


def test_each_node_that_differs_is_named_with_both_versions(answered: Any) -> None:
    mine = same_everywhere.versions()
    answered({1: {**mine, "ray": "2.0.0", "python": "3.12.1"}, 2: {**mine, "source of rlprm": "abc"}})
    first, second = same_everywhere.unequal_versions(NODES, timeout_s=1.0)
    assert (
        f"node host1 (10.0.0.1) does not run what node host0 (10.0.0.0) runs: python 3.12.1 (there {mine['python']}), "
        in first
    )
    assert f"ray 2.0.0 (there {mine['ray']})" in first
    assert "source of rlprm abc" in second
    assert same_everywhere.unequal_versions(NODES[:1], timeout_s=1.0) == []


def test_a_folder_that_cannot_be_made_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (found,) = same_everywhere.unseen_folder(NODES, tmp_path / "file" / "runs", timeout_s=1.0)
    assert "cannot be written" in found


def config(*overrides: str) -> TrainConfig:
    return validated(TrainConfig, composed("train", ["model.path=/models/a", "placement.nodes=2", *overrides]).values)


def test_the_models_of_each_role() -> None:
    shared = several_nodes.of_training(config("streams.process.source.model=/models/prm", "output_dir=/shared/runs"))
    assert shared.folder == Path("/shared/runs")
    assert shared.models["policy"] == shared.models["engines"] == {"model.path": "/models/a"}
    assert shared.models["prm"] == {"model.path": "/models/a", "streams.process.source.model": "/models/prm"}


def test_several_nodes_without_a_cluster_are_refused() -> None:
    placement = config().placement
    with pytest.raises(ConfigError, match=r"placement\.nodes is 2 and placement\.ray_address null.*rlprm launch"):
        several_nodes.refuse_alone(placement)
    several_nodes.refuse_alone(placement.model_copy(update={"ray_address": "10.0.0.1:6379"}))
    several_nodes.refuse_alone(placement.model_copy(update={"nodes": 1}))


class Placed(Seating):
    """Three nodes, of which two get processes."""

    def __init__(self) -> None:
        pass

    def nodes(self) -> tuple[Node, ...]:
        return tuple(NODES)

    def node(self, number: int) -> Node:
        return NODES[number]

    def preview(self, placement: Any, own_engines: int, *, prm: bool) -> Seats:
        return Seats(policy=(0, 1), prm=(0,), engines=(1,), own_engines=())


def test_nothing_starts_on_nodes_that_differ(answered: Any, tmp_path: Path) -> None:
    """Only nodes that get a process are asked; a model is looked for where it is loaded."""
    place = Placed()
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    shared = several_nodes.Shared(
        folder=tmp_path / "runs", models={"policy": {"model.path": str(model)}, "prm": {"source.model": f"{model}2"}}
    )
    placement = config().placement
    answered({2: {"python": "2.7"}})  # it has no seat
    with pytest.raises(ConfigError, match=r"not alike:\nnode host0 .* has no model at .*model2 \(source\.model\)"):
        several_nodes.require_alike(place, placement, 0, shared)
    answered({1: {"python": "2.7"}})
    with pytest.raises(ConfigError, match=r"node host1 .* python 2\.7"):
        several_nodes.require_alike(place, placement, 0, shared)
    several_nodes.require_alike(None, placement, 0, shared)  # a run with its own Ray has one node
