"""A learner's state on disk: DeepSpeed's shards, the random state and what they belong to; nothing executable."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlprm.engine import distributed
from rlprm.errors import CheckpointError

TAG = "state"


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Say what the state belongs to; written by rank 0 after everything else."""
    (folder / "learner.json").write_text(json.dumps(card, indent=1) + "\n")


def read_card(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """The card of ``folder``, which must agree with ``expected``.

    Raises:
        CheckpointError: no card, or the state was written with another number of ranks, stage or precision.
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


def save_random_state(folder: Path) -> None:
    """Each rank's torch generators."""
    torch.save(random_state(), _random_path(folder))


def load_random_state(folder: Path) -> None:
    """The inverse of :func:`save_random_state`."""
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


def safe_load(path: Path | str, map_location: Any = "cpu") -> Any:
    """``torch.load`` that refuses to run code, apart from the few plain classes DeepSpeed writes into its state.

    Raises:
        CheckpointError: damaged, missing, or holding anything else.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    plain = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, set]
    try:
        with torch.serialization.safe_globals(plain):
            return torch.load(path, map_location=map_location, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({error}); it is missing, damaged or not one of ours: "
            "resume from an older one"
        ) from error


def make_loading_safe(engine: Any) -> None:
    """Let a DeepSpeed engine read its checkpoints by :func:`safe_load`; its own reader unpickles arbitrary code."""
    engine.checkpoint_engine.load = safe_load
