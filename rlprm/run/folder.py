"""One run, one folder: who holds it, and what it was started with."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from rlprm.errors import ConfigError
from rlprm.run.redact import redact_text

HEADER = "run.json"
CONFIG = "config.yaml"
LOCK = ".lock"
# Any of these means that a run was here.
_TRACES = (HEADER, CONFIG, "metrics.jsonl", "checkpoints")


class RunFolder:
    """The run's folder, held by this process alone until ``close``; the kernel lets go when the process dies.

    Raises:
        ConfigError: another process holds the folder, or it holds another run and ``resume`` is False.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"output folder {path} is a file; expected a folder that is new, empty or holds this run")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output folder {path} cannot be made ({error}); choose another output_dir") from None
        self.path = path
        self._lock: IO[str] = _lock(path)
        traces = [name for name in _TRACES if _holds_something(path / name)]
        if traces and not resume:
            self.close()
            raise ConfigError(
                f"output folder {path} holds another run ({', '.join(traces)}); continue that one with resume=auto, "
                "or choose another output_dir or name"
            )

    def close(self) -> None:
        """Let the next run have the folder. Calling it twice is fine."""
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def write_run_header(
    folder: Path,
    resolved_config_yaml: str,
    versions: Mapping[str, str],
    commit: str | None,
    *,
    lost: str | None = None,
) -> None:
    """Write what the run is, before step 1: ``config.yaml`` (without secrets) and ``run.json`` (one entry per start).

    ``lost``: what was lost, where the run has started again by itself.

    A resumed run keeps the first configuration; if it is started with another one, that is written beside it as
    ``config.start2.yaml`` and so on. ``commit`` is None where there is no git repository.
    """
    header = folder / HEADER
    starts = json.loads(header.read_text(encoding="utf-8"))["starts"] if header.exists() else []
    config = redact_text(resolved_config_yaml)
    name = CONFIG
    if starts and (folder / starts[-1]["config"]).read_text(encoding="utf-8") == config:
        name = starts[-1]["config"]
    elif starts:
        name = f"config.start{len(starts) + 1}.yaml"
    _write(folder / name, config)
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
        "config": name,
        "versions": dict(versions),
        **({} if lost is None else {"restarted_after": lost}),
    }
    _write(header, json.dumps({"starts": [*starts, start]}, indent=2, allow_nan=False) + "\n")


def restarts(folder: Path) -> int:
    """How often the run has started again by itself, over all commands that have continued it."""
    starts = json.loads((folder / HEADER).read_text(encoding="utf-8"))["starts"]
    return sum("restarted_after" in start for start in starts)


def last_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of the run's last start, as it was written (secrets taken out)."""
    name = json.loads((folder / HEADER).read_text(encoding="utf-8"))["starts"][-1]["config"]
    return yaml.safe_load((folder / name).read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    # Renamed into place, so that a crash never leaves half a header that would stop the resume.
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _holds_something(path: Path) -> bool:
    # A start that failed before its first step (a wrong data file) leaves an empty folder of checkpoints behind.
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _lock(folder: Path) -> IO[str]:
    # "a+": opening must not empty the file, it says who holds the lock.
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "an unknown process"
        file.close()
        raise ConfigError(
            f"output folder {folder} is in use by {holder}; wait for that run, or choose another output_dir or name"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
