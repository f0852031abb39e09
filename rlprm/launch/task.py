"""What is to be run, on how many nodes, and the folder in which it leaves its traces; every way to launch starts here."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rlprm.errors import ConfigError

TASK = "task.json"  # this file, without secrets
TOKEN = "token"  # Ray's authentication token, readable by its owner only
LOG = "driver.log"  # what the run printed
EXIT = "exit_code"  # written by the head when the run has ended
HEAD = "head.json"  # {"address": HOST:PORT}, written by the head when Ray answers
STOP = "stop"  # whoever makes this file asks the head to end the run; the workers leave when it has ended
LAUNCHES = "launches"  # beside the runs: <output_dir>/launches/<id>


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One launch."""

    id: str
    command: tuple[str, ...]  # after `rlprm`, for example ("train", "recipe=...", "resume=auto")
    kind: str  # of the cluster: local, hosts, slurm, kuberay, existing
    nodes: int
    node_gpus: int
    names: tuple[str, ...]  # of the nodes, where the launcher chooses them; the head's first
    directory: str
    python: str
    environment: Mapping[str, str]  # nothing secret
    secrets: tuple[str, ...]  # names only
    wait_s: float
    preflight: str
    port: int
    dashboard: bool
    object_store_bytes: int | None
    cpus: int  # logical CPUs that every node offers to Ray, at least: processes are more than cores and take turns
    run: str  # folder of the run, or of several of them; no two launches at once in it
    folder: str  # <output_dir>/launches/<id>, on storage that all nodes share where there are several

    @property
    def path(self) -> Path:
        return Path(self.folder)


def new_id(name: str) -> str:
    """A launch's id: the run's name, the time, and four letters against two at once."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def write(task: Task) -> None:
    """Make the launch folder with the task and a fresh token in it.

    Raises:
        ConfigError: the folder cannot be made.
    """
    try:
        task.path.mkdir(parents=True)
        (task.path / TASK).write_text(json.dumps(asdict(task), indent=1) + "\n", encoding="utf-8")
        descriptor = os.open(task.path / TOKEN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(secrets.token_hex(32) + "\n")
    except OSError as error:
        raise ConfigError(f"launch folder {task.folder} cannot be made ({error}); choose another output_dir") from error


def read(folder: str | Path) -> Task:
    """The task of a launch folder.

    Raises:
        ConfigError: there is none, or it was written by another version.
    """
    path = Path(folder) / TASK
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        tuples = {key: tuple(values[key]) for key in ("command", "names", "secrets")}
        return Task(**{**values, **tuples})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is no launch that this version can read ({error}); see rlprm status") from error


def token(folder: str | Path) -> str:
    """Ray's authentication token of a launch.

    Raises:
        ConfigError: it cannot be read, for example by somebody else than who has launched.
    """
    path = Path(folder) / TOKEN
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"the token of this launch cannot be read ({error}); only its owner may") from error


def put(folder: str | Path, name: str, text: str) -> None:
    """Write a file of the launch folder so that no reader ever sees half of it."""
    path = Path(folder) / name
    partial = path.with_name(f".{name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def stop_is_asked(folder: str | Path) -> bool:
    """Has somebody asked the run to end?"""
    return (Path(folder) / STOP).exists()


def exit_code(folder: str | Path) -> int | None:
    """The run's exit code; None: it has not ended."""
    path = Path(folder) / EXIT
    return int(path.read_text(encoding="utf-8")) if path.is_file() else None
