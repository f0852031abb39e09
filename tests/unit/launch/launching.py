"""A task as `rlprm launch` makes it, in a temporary folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlprm.config_cluster import HostsCluster, LocalCluster, NodeShape
from rlprm.launch import launcher, task
from rlprm.launch.processes import this_python
from rlprm.launch.task import Task


def a_task(where: Path, launch_id: str = "small-20260102-030405-ab12", **changed: Any) -> Task:
    """Not written."""
    made = Task(
        id=launch_id, command=("train", "recipe=small", "resume=auto"), kind="hosts", nodes=1, node_gpus=0,
        names=("node0",), directory=str(where), python=this_python(), environment={}, secrets=("WANDB_API_KEY",),
        wait_s=10.0, preflight="off", port=0, dashboard=False, object_store_bytes=None, cpus=4,
        run=str(where / "runs" / "small" / "seed0"), folder=str(where / "launches" / launch_id),
    )  # fmt: skip
    return replace(made, **changed)


def written(made: Task, cluster: Any) -> Task:
    """The same with its folder."""
    task.write(made)
    launcher.write_cluster(made, cluster)
    return made


COMMON: dict[str, Any] = {
    "node": NodeShape(gpu=None, gpus=0, cpus=2, memory_gb=4.0), "directory": None, "python": None, "environment": {},
    "secrets": ["WANDB_API_KEY"], "wait_s": 10.0, "preflight": "off", "port": 0, "dashboard": False,
    "object_store_bytes": None,
}  # fmt: skip


def hosts_cluster(**changed: Any) -> HostsCluster:
    """Two hosts behind a command that starts programs as they are."""
    own = {"hosts": ["a", "b"], "addresses": None, "connect": ["env", "AT={host}"], "shell": False}
    return HostsCluster(kind="hosts", **{**COMMON, **own, **changed})


def local_cluster(**changed: Any) -> LocalCluster:
    """This machine."""
    return LocalCluster(kind="local", **{**COMMON, **changed})
