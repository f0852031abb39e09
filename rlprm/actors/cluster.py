"""Ray itself: start it here or join a cluster, and refuse what cannot fit before any actor waits for it."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import services
from ray.exceptions import RayError

from rlprm.actors.group import FOLDER
from rlprm.actors.network import addresses, variables
from rlprm.errors import ConfigError

LOOPBACK = "127.0.0.1"
KNOCK_S = 10.0


@contextmanager
def cluster(
    *, address: str | None, num_actors: int, gpus: float, object_store_bytes: int | None, working_dir: str
) -> Iterator[None]:
    """Ray, for as long as the block lasts; a cluster that was joined stays up, one that was started here goes down.

    Raises:
        ConfigError: not enough shared memory for the object store, or the cluster has too few GPUs.
    """
    if address is None and object_store_bytes is not None:
        _require_memory(object_store_bytes)
    already = ray.is_initialized()
    if not already:
        with _sigterm_stays():
            _start(address, num_actors, object_store_bytes, working_dir)
    try:
        have = ray.cluster_resources().get("GPU", 0.0)
        if have < gpus:
            raise ConfigError(
                f"the placement needs {gpus:g} GPUs and the cluster has {have:g}; use fewer ranks or engines, or "
                "placement=cpu"
            )
        yield
    finally:
        if not already:
            with _sigterm_stays():
                ray.shutdown()


@contextmanager
def _sigterm_stays() -> Iterator[None]:
    """Put a handler of SIGTERM back: Ray's start puts its own and a crash report in its place, Ray's end the default."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # without a handler of somebody's own, Ray's is better than none: it stops what was started
        if before not in (signal.SIG_DFL, None) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _start(address: str | None, num_actors: int, object_store_bytes: int | None, working_dir: str) -> None:
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
        # actors import rlprm and the user's own package from where the driver does, and understand relative paths as it does
        "runtime_env": {"env_vars": {"PYTHONPATH": _python_path(working_dir), FOLDER: os.getcwd()}},
    }
    if address is not None:
        try:
            _knock(address)
            with _loopback_stays():  # nodes that were started on loopback are known by that address
                ray.init(address=address, **options)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise ConfigError(
                f"no Ray cluster answers at placement.ray_address {address!r} ({str(error).splitlines()[0]}); start one there, "
                "give its token in RAY_AUTH_TOKEN, or set the address to null"
            ) from error
        return
    # a token for this run alone; a cluster that is joined has its own, from the environment or ~/.ray
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    options["runtime_env"]["env_vars"].update(_loopback_only())
    with _loopback_stays():
        ray.init(
            "local",  # without it Ray joins whatever runs on this machine, or RAY_ADDRESS names
            include_dashboard=False,
            _node_ip_address=LOOPBACK,  # a run of one machine listens on loopback only
            # logical: on few cores there are more processes than cores, and they take turns
            num_cpus=max(num_actors + 1, os.cpu_count() or 1),
            object_store_memory=object_store_bytes,
            **options,
        )


def _knock(address: str) -> None:
    """Does anything listen there? Ray itself would ask for minutes.

    Raises:
        OSError: nothing does.
        ValueError: the port is no number.
    """
    host, colon, port = address.rpartition(":")
    if colon and "://" not in address:
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()


@contextmanager
def _loopback_stays() -> Iterator[None]:
    """Ray takes the loopback address at its word; by itself it puts the machine's own in its place, and then every
    port is open to the network."""
    if not hasattr(services, "resolve_ip_for_localhost"):  # not public: another Ray may not have it
        yield
        return
    original = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = original


def _loopback_only() -> dict[str, str]:
    """Environment that keeps the sockets of gloo, NCCL and vLLM on loopback too; what the user has set stays.

    They would otherwise listen on the address that the machine's name stands for.
    """
    wanted = {"VLLM_HOST_IP": LOOPBACK, **variables(LOOPBACK, addresses())}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _python_path(working_dir: str) -> str:
    before = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([working_dir, before]) if before else working_dir


def _require_memory(wanted: int) -> None:
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    if free and wanted > free:
        raise ConfigError(
            f"placement.object_store_bytes is {wanted} and shared memory has {free} bytes free; lower it, or give the "
            "machine (or container: --shm-size) more shared memory"
        )


def actor_environment(*, device: str, threads: int) -> Mapping[str, str]:
    """Environment of learner and judge processes."""
    common = {
        "OMP_NUM_THREADS": str(threads),
        # with more processes than cores, spinning threads make everything ten times slower
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return {**common, "DS_ACCELERATOR": "cpu"} if device == "cpu" else common
