"""The driver of the tests of two nodes: a run, and what can be wrong with nodes, on a Ray that is up; answers in JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray

from rlprm import driver
from rlprm.actors.cluster import cluster
from rlprm.actors.nodes import nodes
from rlprm.actors.same_everywhere import contents, read_text, unequal_versions, unseen_folder, unseen_models, versions
from rlprm.errors import ConfigError
from tests.integration.support import PRM, TRANSFORMERS, train


def here(actor: Any) -> dict[str, str]:
    """Where an actor runs, and what it has told gloo and vLLM."""
    return {
        "node": ray.get_runtime_context().get_node_id(),
        **{name: os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "VLLM_HOST_IP")},
    }


def main(address: str, model: str, folder: Path, count: int, *overrides: str) -> dict[str, Any]:
    number = {node.id: node.index for node in nodes()}
    first = ray.get_runtime_context().get_node_id()
    where: dict[str, Any] = {}
    loop = driver.train

    def looked(run: driver.Run) -> None:
        actors = {
            "policy": run.policy.group.workers,
            "prm": run.reference.group.workers,
            "engines": list(run.rollouts.engines),
            "judge": run.judges._actors,
        }
        for role, members in actors.items():
            asked = ray.get([member.__ray_call__.remote(here) for member in members], timeout=60)
            where[role] = [{**each, "node": number[each["node"]]} for each in asked]
        loop(run)

    joined = [f"placement.ray_address={address}", f"placement.nodes={count}", "placement.collective_timeout_s=60"]
    words = [*PRM, *TRANSFORMERS, "steps=2", *joined, *overrides]
    with patch.object(driver, "train", looked):
        done = train(folder / "runs", model, *words)

    def refused(*changed: str) -> str:
        try:
            train(folder / "refused", model, *words, *changed)
        except ConfigError as error:
            return str(error)
        return "it was accepted"

    def other_versions() -> dict[str, str]:
        there = ray.get_runtime_context().get_node_id() != first
        return {**versions(), "torch": "1.0.0"} if there else versions()

    def blind(path: str) -> str | None:
        return None if ray.get_runtime_context().get_node_id() != first else read_text(path)

    def other_copy(paths: list[str]) -> dict[str, list[str]]:
        there = ray.get_runtime_context().get_node_id() != first
        return {path: [*files[:-1], "model.safetensors 7 bytes"] if there else files
                for path, files in contents(paths).items()}  # fmt: skip

    alive, timeout = nodes(), 60.0
    wanted = {"model.path": (model, alive)}
    gone = {"model.path": (f"{folder}/nowhere", alive[1:])}
    return {
        "names": [node.name for node in alive],
        "where": where,
        "screen": done.screen,
        "steps": [row["step"] for row in done.metrics_of_steps],
        "gaps": [published.gap for published in done.published],
        "missing": refused("placement.nodes=9", "placement.start_timeout_s=2"),
        "alone": refused("placement.ray_address=null"),
        "no_such_node": refused(f"placement.engine_nodes=[{count}]"),
        "alike": [
            *unequal_versions(alive, timeout_s=timeout),
            *unseen_folder(alive, folder, timeout_s=timeout),
            *unseen_models(wanted, timeout_s=timeout),
        ],
        "versions": unequal_versions(alive, timeout_s=timeout, facts=other_versions),
        "unshared": unseen_folder(alive, folder, timeout_s=timeout, read=blind),
        "no_model": unseen_models(gone, timeout_s=timeout),
        "other_model": unseen_models(wanted, timeout_s=timeout, look=other_copy),
        "left": sorted(path.name for path in folder.iterdir() if path.name.startswith(".seen")),
    }


if __name__ == "__main__":
    root = str(Path(__file__).resolve().parents[2])
    with cluster(address=sys.argv[1], num_actors=0, gpus=0.0, object_store_bytes=None, working_dir=root):
        answer = main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
    (Path(sys.argv[3]) / "found.json").write_text(json.dumps(answer), encoding="utf-8")
