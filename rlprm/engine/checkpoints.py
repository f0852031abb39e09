"""A learner's state on disk: DeepSpeed's shards, the random state and what they belong to; nothing executable."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlprm.engine import distributed
from rlprm.errors import CheckpointError

TAG = "state"
_RANK = re.compile(r"(?:zero_pp_rank_|random_)(\d+)")  # in names of files that each rank has of its own


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Say what the state belongs to; written by rank 0 after everything else."""
    (folder / "learner.json").write_text(json.dumps(card, indent=1) + "\n")


def read_card(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """The card of ``folder``, which must agree with ``expected``.

    Raises:
        CheckpointError: no card, or the state was written with another stage or precision.
    """
    path = folder / "learner.json"
    try:
        card: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no learner state in {folder} ({error}); expected a folder written by save()") from error
    for name, value in expected.items():
        if card.get(name) != value:
            raise CheckpointError(
                f"{folder} was written with {name}={card.get(name)} and this run has {name}={value}; resume with "
                f"{name}={card.get(name)}, or export the model there and start a new run from it"
            )
    return card


def written(folder: Path) -> dict[str, int]:
    """What this rank has written under ``folder``, now on disk: sizes by path. Files without a rank are those of rank 0.

    On a file system that nodes share, what one of them has written reaches the others for certain only when it is synced.
    """
    sizes = {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        of = _RANK.search(path.name)
        if int(of.group(1) if of else 0) == distributed.rank():
            sync(path)
            sizes[str(path)] = path.stat().st_size
    for directory in [folder, *(each for each in folder.rglob("*") if each.is_dir())]:
        sync(directory)
    return sizes


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_random_state(folder: Path) -> None:
    """Each rank's torch generators."""
    torch.save(random_state(), _random_path(folder))


def load_random_state(folder: Path, ranks: int) -> None:
    """The inverse of :func:`save_random_state`, where ``ranks`` ranks had called it; a further one keeps its own."""
    if distributed.rank() < ranks:
        restore_random_state(safe_load(_random_path(folder)))


def random_state() -> dict[str, torch.Tensor]:
    """The states of this process's torch generators."""
    cpu = {"cpu": torch.get_rng_state()}
    return {**cpu, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else cpu


def restore_random_state(states: Mapping[str, torch.Tensor]) -> None:
    """The inverse of :func:`random_state`."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _random_path(folder: Path) -> Path:
    return folder / f"random_{distributed.rank()}.pt"


def safe_load(path: Path | str, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """``torch.load`` that refuses to run code, apart from the few plain classes DeepSpeed writes into its state.

    ``mmap``: tensors stay on disk until they are used.

    Raises:
        CheckpointError: damaged, missing, or holding anything else.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    plain = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, set]
    try:
        with torch.serialization.safe_globals(plain):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({error}); it is missing, damaged or not one of ours: "
            "resume from an older one"
        ) from error


def make_loading_safe(engine: Any) -> None:
    """Let a DeepSpeed engine read its checkpoints by :func:`safe_load`; its own reader unpickles arbitrary code."""
    engine.checkpoint_engine.load = safe_load
