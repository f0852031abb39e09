"""What every test starts from: one thread, no network, no accelerator unless it asks for one."""

from __future__ import annotations

import os

# Before torch is imported anywhere: two cores are shared by policy ranks, PRM, engine and verifiers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# A key on the developer's machine must not turn a test's offline run into an online one.
os.environ.pop("WANDB_API_KEY", None)
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# No deadline: the first call of an example pays for imports and kernels, and the machine is shared.
settings.register_profile("rlprm", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("rlprm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason printed, where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and there is none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
