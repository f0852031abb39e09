"""Checkpoints that are there completely or not at all.

A save goes into ``step_000010.tmp``; when every file is written, hashed and on disk, one rename makes it
``step_000010``. What is loaded is verified first: the manifest, and the size and SHA-256 of each file it lists.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlprm.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
_NAME = re.compile(r"step_(\d{6,})")
VISIBLE_S = 120.0  # twice what NFS may keep an old listing of a folder
POLL_S = 0.5


class Checkpointer:
    """The checkpoints of one run, of which the newest ``keep_last`` complete ones stay.

    One process at a time may own the folder (:class:`rlprm.run.folder.RunFolder` sees to that): left-overs of an
    interrupted save are removed on sight. ``skipped`` says in words what ``latest_valid`` had to pass over.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; expected at least 1, or nothing is left to resume from")
        self.folder = folder
        self.keep_last = keep_last
        self.skipped: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob("step_*.tmp"):
                shutil.rmtree(stale)
        except OSError as error:
            raise CheckpointError(f"cannot prepare the checkpoint folder {folder}: {error}") from error

    def begin(self, step: int) -> Path:
        """An empty folder to write the files of ``step`` into; any rank may write there until ``commit``.

        Raises:
            CheckpointError: the disk is full or read-only, or a complete checkpoint of this step is there already.
        """
        final = self._final(step)
        if final.exists() and damage(final) is None:
            raise CheckpointError(
                f"{final} is complete already; a step is saved once. To run it again, resume from an older checkpoint "
                "in a new output folder"
            )
        partial = self._partial(step)
        try:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
        except OSError as error:
            raise CheckpointError(
                f"cannot begin the checkpoint {partial}: {error}; free space or mend the disk"
            ) from error
        return partial

    def commit(self, step: int, state: Mapping[str, Any], files: Mapping[str, int] | None = None) -> Path:
        """Make what was written since ``begin(step)`` the newest checkpoint, with ``state`` (strict JSON) beside it.

        ``files``: what the ranks say they have written, with sizes. Another node's files may take a while to be seen here.

        Older checkpoints are removed only after this one is on disk. When it fails, those stay, and the run must end:
        going on would mean to lose everything since then.

        Raises:
            CheckpointError: the disk is full or read-only, a rank's files do not reach this node, or ``begin`` was not
                called.
            ValueError, TypeError: ``state`` is not JSON.
        """
        partial, final = self._partial(step), self._final(step)
        if not partial.is_dir():
            raise CheckpointError(f"{partial} is missing; call begin({step}) and write the files before commit({step})")
        text = json.dumps(dict(state), allow_nan=False, sort_keys=True, indent=1)
        _await(partial, files or {})
        try:
            (partial / STATE).write_text(text, encoding="utf-8")
            _write_manifest(partial, step)
            for directory in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
                _sync(directory)
            if final.exists():
                # `begin` has found it damaged: the resume passed over it and has now run that step again.
                shutil.rmtree(final)
            os.replace(partial, final)
            _sync(self.folder)
        except OSError as error:
            raise CheckpointError(
                f"saving {final} failed: {error}; older checkpoints are untouched. Mend the disk, then resume"
            ) from error
        try:
            self._prune(step)
        except OSError as error:
            raise CheckpointError(
                f"{final} is saved, but older ones could not be removed: {error}; mend the disk"
            ) from error
        return final

    def latest_valid(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that passes verification, with its state; None when there has never been one.

        Each damaged one that is newer is logged as a warning and listed in ``skipped``.

        Raises:
            CheckpointError: there are checkpoints and all are damaged. A run never starts over without being told to.
        """
        self.skipped = []
        for _, path in reversed(self._complete()):
            reason = damage(path)
            if reason is None:
                return path, load_state(path)
            self.skipped.append(f"{path}: {reason}")
            logger.warning("checkpoint skipped: %s: %s", path, reason)
        if self.skipped:
            raise CheckpointError(
                f"no checkpoint under {self.folder} is intact: {'; '.join(self.skipped)}. Restore one from a copy, or "
                "start anew in another output folder"
            )
        return None

    def _complete(self) -> list[tuple[int, Path]]:
        return complete(self.folder)

    def _prune(self, newest: int) -> None:
        older = [path for step, path in self._complete() if step < newest]
        # A damaged one must not take the place of a good one.
        intact = [path for path in older if damage(path, contents=False) is None]
        kept = intact[max(0, len(intact) - (self.keep_last - 1)) :]
        for path in older:
            if path in kept:
                continue
            # Renamed first: a removal that is interrupted must not leave half a checkpoint under a complete one's name.
            doomed = path.with_name(path.name + ".tmp")
            os.replace(path, doomed)
            shutil.rmtree(doomed)

    def _final(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def _partial(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.tmp"


def complete(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints in ``folder``, oldest first; they are not verified."""
    found = [(match, path) for path in folder.glob("step_*") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match.group(1)), path) for match, path in found)


def _await(folder: Path, files: Mapping[str, int]) -> None:
    """Return when every file is seen here at its full size."""
    deadline = time.monotonic() + VISIBLE_S
    while True:
        os.listdir(folder)  # asks a file server again
        missing = [name for name, size in files.items() if _size(Path(name)) != size]
        if not missing:
            return
        if time.monotonic() >= deadline:
            raise CheckpointError(
                f"{missing[0]} ({len(missing)} of {len(files)} files) was written by a rank and is not seen here after "
                f"{VISIBLE_S:.0f} s (size {_size(Path(missing[0]))}, expected {files[missing[0]]}); the run folder must be on "
                "storage that all nodes share"
            )
        time.sleep(POLL_S)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def load_state(path: Path) -> dict[str, Any]:
    """The state that was committed with the checkpoint at ``path``, after verifying all of it.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
    """
    reason = damage(path)
    if reason is not None:
        raise CheckpointError(
            f"checkpoint {path} cannot be used: {reason}; choose another one, or restore it from a copy"
        )
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return state


def damage(path: Path, *, contents: bool = True) -> str | None:
    """What is wrong with the checkpoint at ``path``, in words; None: it is exactly what was committed.

    ``contents=False`` compares names and sizes only, which needs no reading of the files.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        listed: dict[str, dict[str, Any]] = manifest["files"]
        if manifest["digest"] != _digest(manifest):
            return f"{MANIFEST} was changed after it was written"
        present = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()} - {MANIFEST}
        if missing := sorted(set(listed) - present):
            return f"missing: {', '.join(missing)}"
        if unknown := sorted(present - set(listed)):
            return f"not in {MANIFEST}: {', '.join(unknown)}"
        for name, entry in listed.items():
            size = (path / name).stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes, expected {entry['size']}"
            if contents and _sha256(path / name) != entry["sha256"]:
                return f"{name} has other contents than were saved"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Whatever a damaged manifest looks like, it is damage and not a crash.
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return None


def _write_manifest(folder: Path, step: int) -> None:
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(file)
        files[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    manifest: dict[str, Any] = {"step": step, "files": files}
    manifest["digest"] = _digest(manifest)
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(path)


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
