"""A launch as Kubernetes objects: a ConfigMap with the task and a RayJob of the KubeRay operator. Plain data, no I/O."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import PurePosixPath
from typing import Any

from rlprm.config_cluster import KubeRayCluster
from rlprm.errors import ConfigError
from rlprm.launch.node import environment
from rlprm.launch.task import TASK, Task

LONGEST = 47  # of a RayJob's name: the operator appends to it, and Kubernetes stops at 63
CONFIG = "/etc/rlprm"  # where the task is mounted
GI = 1024**3


def manifest(task: Task, cluster: KubeRayCluster, ray_version: str) -> list[dict[str, Any]]:
    """The objects to apply, in order. Nothing secret is in them: variables name the Secret that holds their value.

    Raises:
        ConfigError: no claim, a folder that is not on it, or secrets by value, which a manifest must not carry.
    """
    if task.secrets:
        raise ConfigError(
            f"cluster.secrets names {', '.join(task.secrets)}, and a manifest carries no values; say where Kubernetes keeps "
            "them in cluster.secret_references ({NAME: {secret: ..., key: ...}}) and set cluster.secrets=[]"
        )
    name = job_name(task.id)
    inside = in_pod(task, cluster)
    metadata = {"name": name, "namespace": cluster.namespace, "labels": {"app.kubernetes.io/name": "rlprm"}}
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": {TASK: json.dumps(asdict(inside), indent=1) + "\n"},
        },
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": metadata,
            "spec": {
                "entrypoint": entrypoint(inside),
                "submissionMode": "K8sJobMode",
                # a failed run is continued by the same command, by somebody who has looked at why
                "backoffLimit": 0,
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": int(cluster.keep_s),
                "rayClusterSpec": {
                    "rayVersion": ray_version,
                    "authOptions": {"mode": "token"},  # the operator draws the token and keeps it in a Secret
                    "headGroupSpec": {
                        # the operator asks the dashboard how the job stands, so it cannot stay on the pod's loopback; the
                        # service is ClusterIP, and every request needs the token
                        "serviceType": "ClusterIP",
                        "rayStartParams": {"dashboard-host": "0.0.0.0", **_start(inside, cluster)},
                        "template": _pod(name, "ray-head", inside, cluster),
                    },
                    "workerGroupSpecs": _workers(name, inside, cluster),
                },
            },
        },
    ]


def entrypoint(inside: Task) -> str:
    """What runs on the head, in a shell, once Ray is up there: the task goes where every program looks for it."""
    folder = shlex.quote(inside.folder)
    head = shlex.join([inside.python, "-m", "rlprm.launch.head", inside.folder, "--joined"])
    return f"mkdir -p {folder} && cp {CONFIG}/{TASK} {folder}/{TASK} && exec {head}"


def job_name(identity: str) -> str:
    """A launch's id as Kubernetes allows names.

    >>> job_name("prime_eurus2_7b-20260102-030405-ab12")
    'prime-eurus2-7b-20260102-030405-ab12'
    """
    cleaned = re.sub(r"[^a-z0-9-]+", "-", identity.lower()).strip("-")
    return cleaned if len(cleaned) <= LONGEST else f"r{cleaned[-(LONGEST - 1) :].lstrip('-')}"


def in_pod(task: Task, cluster: KubeRayCluster) -> Task:
    """The task as the pods see it: its folder on the claim, the image's own Python.

    Raises:
        ConfigError: no claim is named, or an absolute folder lies elsewhere.
    """
    if cluster.claim is None:
        raise ConfigError(
            "cluster.claim is null: checkpoints and logs would be lost with the pods, and several pods would not see the same "
            "run folder; name a PersistentVolumeClaim (ReadWriteMany for several nodes)"
        )
    directory = cluster.directory or cluster.mount
    folder = _moved(task.folder, task.directory, directory)
    if not folder.is_relative_to(cluster.mount):
        raise ConfigError(
            f"the run's folder {folder} does not lie on the claim, which is mounted at {cluster.mount}; set output_dir to a "
            "folder below it, or to a relative one"
        )
    run = str(_moved(task.run, task.directory, directory)) if task.run else ""
    return replace(task, folder=str(folder), run=run, directory=directory, python=cluster.python or "python")


def _moved(path: str, here: str, there: str) -> PurePosixPath:
    """What lies below this machine's folder lies below the pods'; other absolute paths stay what they are."""
    found = PurePosixPath(path)
    return PurePosixPath(there, found.relative_to(here)) if found.is_relative_to(here) else PurePosixPath(there, found)


def _start(inside: Task, cluster: KubeRayCluster) -> dict[str, str]:
    # logical CPUs: there are more processes than a small node has cores, and they take turns
    cpus = {"num-cpus": str(max(inside.cpus, cluster.node.cpus))}
    size = cluster.object_store_bytes
    return cpus if size is None else {**cpus, "object-store-memory": str(size)}


def _workers(name: str, inside: Task, cluster: KubeRayCluster) -> list[dict[str, Any]]:
    count = inside.nodes - 1
    if count == 0:
        return []
    return [
        {
            "groupName": "nodes",
            "replicas": count,
            "minReplicas": count,
            "maxReplicas": count,
            "rayStartParams": _start(inside, cluster),
            "template": _pod(name, "ray-worker", inside, cluster),
        }
    ]


def _pod(name: str, container: str, inside: Task, cluster: KubeRayCluster) -> dict[str, Any]:
    node = cluster.node
    resources: dict[str, str] = {"cpu": str(node.cpus), "memory": f"{int(node.memory_gb)}G"}
    if inside.node_gpus:
        resources[cluster.gpu_resource] = str(inside.node_gpus)
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "securityContext": {"runAsNonRoot": True, "fsGroup": 1000},
        "containers": [
            {
                "name": container,
                "image": cluster.image,
                "workingDir": inside.directory,
                "env": _environment(inside, cluster),
                "resources": {"limits": resources, "requests": resources},
                "volumeMounts": [
                    {"name": "runs", "mountPath": cluster.mount},
                    {"name": "task", "mountPath": CONFIG, "readOnly": True},
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": cluster.claim}},
            {"name": "task", "configMap": {"name": name}},
            {
                "name": "shared-memory",
                "emptyDir": {"medium": "Memory", "sizeLimit": str(int(cluster.shared_memory_gb * GI))},
            },
        ],
    }
    if cluster.service_account is not None:
        spec["serviceAccountName"] = cluster.service_account
    if cluster.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": each} for each in cluster.image_pull_secrets]
    if cluster.node_selector:
        spec["nodeSelector"] = dict(cluster.node_selector)
    if cluster.tolerations:
        spec["tolerations"] = [dict(each) for each in cluster.tolerations]
    return {"metadata": {"labels": {"app.kubernetes.io/name": "rlprm", "rlprm/launch": name}}, "spec": spec}


def _environment(inside: Task, cluster: KubeRayCluster) -> list[dict[str, Any]]:
    plain = [{"name": key, "value": value} for key, value in sorted(environment(inside, None, {}).items())]
    kept = [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": where.secret, "key": where.key}}}
        for key, where in sorted(cluster.secret_references.items())
    ]
    return plain + kept
