"""What the options of ``cluster/`` mean: where processes run. Environment only; no value here changes a result."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlprm.config_base import Count, NonNegative, Positive, Section


class NodeShape(Section):
    """What one node has, for planning before anything starts; what is really there is measured by the preflight."""

    gpu: str | None  # a name of cluster/hardware/gpus.yaml; null: no GPUs
    gpus: Annotated[int, Field(ge=0)]
    cpus: Count
    memory_gb: Positive  # of the host


class ClusterBase(Section):
    """What every way to start a job has."""

    node: NodeShape
    directory: str | None  # where the command runs on every node; null: this folder
    python: str | None  # the interpreter on every node; null: this one
    environment: dict[str, str]  # exported on every node
    secrets: list[str]  # names of variables that are handed on; their values are never written or shown
    wait_s: Positive  # for the nodes to join
    preflight: Literal["full", "quick", "off"]


class OwnRay(ClusterBase):
    """What is chosen where the launch starts Ray itself."""

    port: Annotated[int, Field(ge=0, le=65535)]  # of Ray's head; 0: any
    dashboard: bool  # Ray's, on loopback of the head
    object_store_bytes: Count | None  # of each node


class LocalCluster(OwnRay):
    """This machine; a recipe of several nodes gets as many Ray nodes on one address."""

    kind: Literal["local"]


class HostsCluster(OwnRay):
    """Machines that a command reaches, ssh as a rule."""

    kind: Literal["hosts"]
    hosts: list[str]  # the first is the head
    addresses: list[str] | None  # of the nodes among each other; null: each host's own
    connect: Annotated[list[str], Field(min_length=1)]  # "{host}" stands for the host
    shell: bool  # does the command hand what follows to a shell there, as ssh does?


class SlurmCluster(OwnRay):
    """A batch job."""

    kind: Literal["slurm"]
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    time: str | None  # as sbatch reads it, for example 1-12:00:00
    save_s: Annotated[
        int, Field(ge=0)
    ]  # before that time is over, the run shall finish its step, save and end; 0: it is cut off
    gpu_option: Literal["gres", "gpus-per-node"]  # how GPUs are asked for
    extra: list[str]  # further lines of #SBATCH
    setup: list[str]  # shell lines before anything starts on a node (modules, environments)
    poll_s: Positive  # between looks at the queue


class SecretReference(Section):
    """A value that Kubernetes keeps."""

    secret: str
    key: str


class KubeRayCluster(ClusterBase):
    """A RayJob of the KubeRay operator, which chooses Ray's port and needs its dashboard."""

    kind: Literal["kuberay"]
    namespace: str
    context: str | None  # of kubectl; null: the current one
    image: str
    image_pull_secrets: list[str]
    service_account: str | None
    claim: str | None  # PersistentVolumeClaim that every pod mounts; the run folder must lie on it
    mount: str  # where
    shared_memory_gb: Positive
    secret_references: dict[str, SecretReference]  # variable -> where its value is
    gpu_resource: str
    node_selector: dict[str, str]
    tolerations: list[dict[str, str]]
    keep_s: NonNegative  # seconds that a finished job's pods stay
    poll_s: Positive
    object_store_bytes: Count | None
    port = property(lambda self: 0)
    dashboard = property(lambda self: True)


class ExistingCluster(ClusterBase):
    """A Ray cluster that runs already, through its jobs API."""

    kind: Literal["existing"]
    address: str  # of the dashboard, http://HOST:8265
    upload: bool  # send this checkout; false: rlprm is installed there
    poll_s: Positive
    port = property(lambda self: 0)
    dashboard = property(lambda self: True)
    object_store_bytes = property(lambda self: None)  # the cluster has its own


AnyCluster = Annotated[
    LocalCluster | HostsCluster | SlurmCluster | KubeRayCluster | ExistingCluster, Field(discriminator="kind")
]


class LaunchConfig(Section):
    """The whole configuration of ``rlprm launch``, beside the overrides that it hands on."""

    cluster: AnyCluster
