"""A flow-matching network on hidden states of a frozen language model, and the states that it reads (RLFR, 2510.10201)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from rlprm.core.alignment import predictors
from rlprm.engine import model as models
from rlprm.errors import ConfigError
from rlprm.records import MicroBatch

Condition = Literal["next", "previous"]
WAVES = 64  # sinusoidal features of a noise level or a depth


class FlowNetwork(nn.Module):
    """``v(x, tau, condition, layer)``: an MLP of residual blocks whose scale, shift and gate depend on all but x.

    ``x`` and ``condition`` are hidden states, ``tau`` the share of the state in x (the rest is noise), ``layer`` the depth
    it was taken at, from 0 to 1. The output layer and the gates start at 0, so a new network predicts no velocity at all.
    """

    def __init__(self, hidden: int, *, width: int, depth: int) -> None:
        super().__init__()
        self.state = nn.Linear(hidden, width)
        self.condition = nn.Linear(hidden, width)
        self.moment = nn.Sequential(nn.Linear(2 * WAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth)
        )
        self.modulation = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.output = nn.Linear(width, hidden)
        for layer in (*self.modulation, self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        state: Float[Tensor, "n h"],
        tau: Float[Tensor, " n"],
        condition: Float[Tensor, "n h"],
        layer: Float[Tensor, " n"],
    ) -> Float[Tensor, "n h"]:
        x = self.state(state)
        when = self.moment(torch.cat([waves(tau), waves(layer)], 1))
        given = functional.silu(self.condition(condition) + when)
        for block, modulation in zip(self.blocks, self.modulation, strict=True):
            shift, scale, gate = modulation(given).chunk(3, dim=1)
            normal = functional.rms_norm(x, x.shape[1:])
            x = x + gate * block(normal * (1 + scale) + shift)
        return self.output(functional.rms_norm(x, x.shape[1:]))

    def errors(
        self,
        target: Float[Tensor, "n h"],
        condition: Float[Tensor, "n h"],
        noise: Float[Tensor, "n h"],
        tau: Float[Tensor, " n"],
        layer: float,
    ) -> Float[Tensor, " n"]:
        """``mean over dimensions of (v(tau z + (1 - tau) e) - (z - e))^2`` for states z and noise e; differentiable."""
        mixed = tau[:, None] * target + (1 - tau)[:, None] * noise
        velocity = self(mixed, tau, condition, torch.full_like(tau, layer))
        return (velocity - (target - noise)).square().mean(1)


def waves(moment: Float[Tensor, " n"]) -> Float[Tensor, "n w"]:
    """Sines and cosines of a number from 0 to 1, at frequencies from 1 to 1000 radians."""
    frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), WAVES // 2, device=moment.device))
    angles = moment[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


class LayerStates:
    """Hidden states of a frozen causal model after some of its layers, without gradient.

    ``percentiles`` of the depth: layer ``round(p * layers)``, the last one for p = 1. Each layer once: in a model of few
    layers several percentiles may name the same.

    Raises:
        ConfigError: a percentile outside [0, 1], none at all, or a model whose layers cannot be found.
    """

    def __init__(
        self, path: str, dtype: models.DType, device: str, percentiles: Sequence[float], *, attention: models.Attention
    ) -> None:
        loaded = models.load_causal(path, dtype, attention=attention, gradient_checkpointing=False)
        self._model = loaded.to(device).eval().requires_grad_(False)
        layers = _layers(self._model, path)
        if not percentiles or not all(0.0 <= each <= 1.0 for each in percentiles):
            raise ConfigError(f"percentiles are {list(percentiles)}; expected one or more depths from 0 to 1")
        chosen = sorted({min(round(each * len(layers)), len(layers) - 1) for each in percentiles})
        self._layers = [layers[index] for index in chosen]
        self.depths = tuple(index / len(layers) for index in chosen)
        self.hidden = int(self._model.config.hidden_size)

    @torch.no_grad()
    def __call__(self, micro: MicroBatch) -> list[Float[Tensor, "n h"]]:
        """One tensor a layer, flat over the micro-batch's positions, in float32."""
        with _caught(self._layers) as states:
            models.hidden_states(self._model, micro)
        return [states[layer].flatten(0, 1).float() for layer in self._layers]


def pairs(micro: MicroBatch, condition: Condition) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Flat positions of the states that are judged, and of the states that they are judged by, in the same order.

    ``previous``: every response token by the one before it. ``next``: every response token but the last by the one after
    it, so the last has no deviation. The prompt is never judged.
    """
    before = predictors(micro.response_mask, micro.sequence)
    rows = micro.response_mask.flatten().nonzero().squeeze(1)
    if condition == "previous":
        return rows, before
    inside: Bool[Tensor, " n"] = micro.response_mask.flatten()[before]
    return before[inside], rows[inside]


@contextmanager
def _caught(layers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """What each layer puts out while the block runs."""
    found: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, _inputs: Any, output: Any) -> None:
        found[layer] = output[0] if isinstance(output, tuple) else output

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module, path: str) -> Sequence[nn.Module]:
    for name in ("layers", "h"):
        found = getattr(model.base_model, name, None)
        if isinstance(found, nn.ModuleList):
            return list(found)
    raise ConfigError(f"the layers of model {path} ({type(model).__name__}) cannot be found; use a decoder-only model")
