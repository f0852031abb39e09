"""What a run would run on: a cluster's node section, what the recipe names, or this machine."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil
import yaml

from rlprm.config_cluster import NodeShape
from rlprm.errors import ConfigError
from rlprm.paths import cluster_dir

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One model of GPU; flops and bytes per second as its data sheet says."""

    name: str
    memory: int  # bytes that torch sees
    flops: float  # dense bf16
    bandwidth: float  # of its memory
    link: float  # to the other GPUs of its node, both ways together


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Nodes, all alike."""

    nodes: int
    gpu: Gpu | None
    node_gpus: int
    node_cpus: int
    node_memory: int  # bytes
    network: float  # bytes per second between nodes, of a node in one direction
    told_by: str


@functools.cache
def _content() -> Mapping[str, Any]:
    file = cluster_dir() / "hardware" / "gpus.yaml"
    content: Mapping[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def gpu_named(name: str) -> Gpu:
    """The GPU of that name, or of the only name that begins so.

    >>> gpu_named("H100-80GB").memory >> 30, gpu_named("a10g").name
    (79, 'A10G-24GB')

    Raises:
        ConfigError: none, or several.
    """
    rows = _content()["gpus"]
    fitting = [each for each in rows if each.lower() == name.lower()]
    fitting = fitting or [each for each in rows if each.lower().startswith(name.lower())]
    if len(fitting) != 1:
        raise ConfigError(
            f"GPU {name!r} is {'several' if fitting else 'none'} of those in cluster/hardware/gpus.yaml; expected one of "
            f"{', '.join(rows)}, or a row of your own there"
        )
    row = rows[fitting[0]]
    return Gpu(
        name=fitting[0],
        memory=int(row["memory_gib"] * GIB),
        flops=row["tflops"] * 1e12,
        bandwidth=row["memory_gb_per_s"] * 1e9,
        link=row["link_gb_per_s"] * 1e9,
    )


def of_node(node: NodeShape, nodes: int, told_by: str) -> Hardware:
    """Nodes of a cluster's section, or of a recipe's.

    Raises:
        ConfigError: a GPU that is not known, or GPUs without a name.
    """
    if node.gpus and node.gpu is None:
        raise ConfigError(
            f"{told_by} says {node.gpus} GPUs a node and not which; set cluster.node.gpu to one of "
            f"{', '.join(_content()['gpus'])}"
        )
    return Hardware(
        nodes=nodes,
        gpu=None if node.gpu is None else gpu_named(node.gpu),
        node_gpus=node.gpus,
        node_cpus=node.cpus,
        node_memory=int(node.memory_gb * 1e9),
        network=_content()["network_gb_per_s"] * 1e9,
        told_by=told_by,
    )


def of_recipe(recipe: str, said: Mapping[str, Any], nodes: int) -> Hardware:
    """What ``hardware`` of a recipe's expected.json names.

    Raises:
        ConfigError: keys missing, or a GPU that is not known.
    """
    told_by = f"recipes/{recipe}/expected.json"
    keys = {"gpu", "node_gpus", "node_cpus", "node_memory_gb"}
    if missing := sorted(keys - set(said)):
        raise ConfigError(f"hardware in {told_by} has no {', '.join(missing)}; add it, or give cluster=...")
    section = NodeShape(
        gpu=said["gpu"], gpus=said["node_gpus"], cpus=said["node_cpus"], memory_gb=float(said["node_memory_gb"])
    )
    return of_node(section, nodes, told_by)


def gpus_like(hardware: Hardware) -> list[Hardware]:
    """The same nodes with each other GPU that is known."""
    return [replace(hardware, gpu=gpu_named(name)) for name in _content()["gpus"]]


def this_machine(nodes: int) -> Hardware:
    """Nodes like this machine, without GPUs."""
    section = NodeShape(gpu=None, gpus=0, cpus=os.cpu_count() or 1, memory_gb=psutil.virtual_memory().total / 1e9)
    return of_node(section, nodes, "this machine")
