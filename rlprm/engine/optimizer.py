"""How a model learns: settings, AdamW, and what DeepSpeed is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from rlprm.core.packing import Layout
from rlprm.engine import distributed
from rlprm.engine import model as models
from rlprm.engine.schedule import ScheduleKind, check
from rlprm.errors import ConfigError

# ZeRO-3 keeps parameters of fewer elements whole on every rank (norms, biases): gathering costs more than it saves.
PERSISTENT_ELEMENTS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """How a model learns. bf16 keeps float32 master weights at every stage.

    With bf16, stages 1 to 3 also accumulate gradients in float32; stage 0 accumulates in bf16, so there the number
    of micro-batches shows in the last digits: prefer stage 1 or higher.

    Raises:
        ConfigError: values that cannot be run together.
    """

    lr: float  # peak
    betas: tuple[float, float]
    eps: float
    weight_decay: float  # on matrices only; biases and norms are not decayed
    schedule: ScheduleKind
    warmup: int  # optimizer steps
    total_steps: int | None  # optimizer steps of the whole run, at which a decaying schedule reaches 0
    max_grad_norm: float
    zero_stage: int
    offload: Literal["none", "cpu"]  # cpu: optimizer states, and at stage 3 parameters, live in host memory
    token_budget: int  # tokens per forward pass when scoring
    layout: Layout
    dtype: models.DType
    device: distributed.Device

    def __post_init__(self) -> None:
        check(kind=self.schedule, warmup=self.warmup, total=self.total_steps)
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"zero_stage is {self.zero_stage}; expected 0, 1, 2 or 3")
        if self.offload == "cpu" and self.device == "cpu":
            raise ConfigError("offload=cpu with device=cpu: everything is in host memory already; use offload=none")
        if self.offload == "cpu" and self.zero_stage == 0:
            raise ConfigError("offload=cpu with zero_stage=0: DeepSpeed offloads from stage 1 on; raise zero_stage")
        for name in ("lr", "eps", "max_grad_norm", "token_budget"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected more than 0")


def adamw(module: nn.Module, settings: LearnerSettings) -> torch.optim.Optimizer:
    """torch's fused AdamW, on CPU and GPU alike: DeepSpeed's own ones are compiled at first use (81 s on CPU)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": 0.0}]
    if settings.weight_decay > 0:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def deepspeed_config(settings: LearnerSettings) -> dict[str, Any]:
    """DeepSpeed's configuration; accumulation boundaries are set by hand, so its own batch arithmetic is 1."""
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "overlap_comm": settings.device == "cuda",
        "contiguous_gradients": True,
    }
    if settings.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if settings.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT_ELEMENTS
        if settings.offload == "cpu":
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if settings.dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        if settings.zero_stage > 0:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
            config["communication_data_type"] = "fp32"
    return config
