"""RayJob manifests: what the operator's own schema says of them, what they ask for, and what must never be in them."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rlprm.cli.compose import composed
from rlprm.config import validated
from rlprm.config_cluster import KubeRayCluster, LaunchConfig
from rlprm.errors import ConfigError
from rlprm.launch import kuberay
from rlprm.launch.manifest import job_name, manifest
from rlprm.launch.task import Task

CRD = Path(__file__).resolve().parents[2] / "data" / "kuberay" / "ray.io_rayjobs.yaml.gz"
TASK = Task(
    id="prime_eurus2_7b-20260102-030405-ab12",
    command=("train", "recipe=prime_eurus2_7b", "resume=auto"),
    kind="kuberay",
    nodes=4,
    node_gpus=8,
    names=(),
    directory="/home/me",
    python="/home/me/.venv/bin/python",
    environment={"NCCL_DEBUG": "WARN"},
    secrets=(),
    wait_s=60.0,
    preflight="full",
    port=0,
    dashboard=True,
    object_store_bytes=None,
    cpus=10,
    run="/home/me/runs/prime_eurus2_7b/seed0",
    folder="/home/me/runs/launches/prime_eurus2_7b-20260102-030405-ab12",
)


def cluster(*overrides: str) -> KubeRayCluster:
    values = composed("launch", ["cluster=kuberay", "cluster.image=rlprm:1", "cluster.claim=runs", *overrides]).values
    return validated(LaunchConfig, values).cluster


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The operator's schema; made strict, because a real server drops a misspelt field without a word."""
    definition = yaml.load(gzip.decompress(CRD.read_bytes()), Loader=yaml.CSafeLoader)
    found = next(each for each in definition["spec"]["versions"] if each["name"] == "v1")["schema"]["openAPIV3Schema"]
    found["properties"]["metadata"] = {"type": "object"}
    return strict(found)


def strict(node: Any) -> Any:
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    inner = {key: strict(value) for key, value in node.items()}
    closed = "properties" in node and "additionalProperties" not in node and node.get("type") == "object"
    if closed and not node.get("x-kubernetes-preserve-unknown-fields"):
        inner["additionalProperties"] = False
    return inner


ALL = (
    "+cluster.secret_references={WANDB_API_KEY:{secret:wandb,key:api-key}}",
    "cluster.image_pull_secrets=[registry]",
    "cluster.service_account=trainer",
    "+cluster.node_selector={pool:gpu}",
    "cluster.tolerations=[{key:nvidia.com/gpu,operator:Exists,effect:NoSchedule}]",
    "cluster.object_store_bytes=1000000000",
)


@pytest.mark.parametrize("overrides", [(), ALL], ids=["plain", "everything"])
@pytest.mark.parametrize("nodes", [1, 4])
def test_the_operators_schema_accepts_it(schema, nodes, overrides):
    config, job = manifest(replace(TASK, nodes=nodes), cluster(*overrides), "2.60.0")
    jsonschema.Draft202012Validator(schema).validate(job)
    assert json.loads(config["data"]["task.json"])["nodes"] == nodes
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["replicas"] for group in groups] == ([] if nodes == 1 else [3])


def test_the_schema_would_find_a_misspelt_field(schema):
    _, job = manifest(TASK, cluster(), "2.60.0")
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParameters"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParameters"):
        jsonschema.Draft202012Validator(schema).validate(job)


def test_secrets_are_references_and_every_node_asks_for_its_gpus():
    _, job = manifest(TASK, cluster(*ALL), "2.60.0")
    spec = job["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
        assert {"name": "NCCL_DEBUG", "value": "WARN"} in container["env"]
        assert {
            "name": "WANDB_API_KEY",
            "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "api-key"}},
        } in container["env"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["nodeSelector"] == {"pool": "gpu"}
        assert group["rayStartParams"]["object-store-memory"] == "1000000000"
        assert group["rayStartParams"]["num-cpus"] == "64"


def test_pods_see_the_launch_folder_on_the_claim():
    config, job = manifest(TASK, cluster(), "2.60.0")
    inside = json.loads(config["data"]["task.json"])
    folder = "/mnt/rlprm/runs/launches/prime_eurus2_7b-20260102-030405-ab12"
    assert inside["folder"] == folder
    assert inside["run"] == "/mnt/rlprm/runs/prime_eurus2_7b/seed0"
    assert inside["directory"] == "/mnt/rlprm"
    assert inside["python"] == "python"
    assert job["spec"]["entrypoint"] == (
        f"mkdir -p {folder} && cp /etc/rlprm/task.json {folder}/task.json && exec python -m rlprm.launch.head {folder} --joined"
    )


@pytest.mark.parametrize(
    ("task", "overrides", "words"),
    [
        ({"secrets": ("WANDB_API_KEY",)}, (), "secret_references"),
        ({"folder": "/scratch/runs/launches/x"}, (), "does not lie on the claim"),
        ({}, ("cluster.claim=null",), "would be lost with the pods"),
    ],
)
def test_what_cannot_work_is_refused(task, overrides, words):
    with pytest.raises(ConfigError, match=words):
        manifest(replace(TASK, **task), cluster(*overrides), "2.60.0")


def test_dry_run_is_the_manifest_that_would_be_applied():
    shown = kuberay.dry_run(TASK, cluster("cluster.context=prod"))
    command, _, rest = shown.partition("\n")
    assert command == "# kubectl --context prod -n default apply -f - < this manifest"
    assert [each["kind"] for each in yaml.safe_load_all(rest)] == ["ConfigMap", "RayJob"]


def test_names_are_what_kubernetes_allows():
    assert job_name("A_b.c-20260102-030405-ab12") == "a-b-c-20260102-030405-ab12"
    long = job_name("x" * 60 + "-20260102-030405-ab12")
    assert len(long) <= 47
    assert long.endswith("-20260102-030405-ab12")
