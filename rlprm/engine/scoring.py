"""Log-probs, entropies and values of whole shards without gradient, and models that are never trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlprm.core import packing
from rlprm.engine import distributed
from rlprm.engine import model as models
from rlprm.errors import ConfigError
from rlprm.records import MicroBatch


@runtime_checkable
class Sequences(Protocol):
    """Flat tokens of several sequences; a :class:`rlprm.records.JaggedShard` is one."""

    tokens: Int[Tensor, " N"]
    lengths: Int[Tensor, " B"]
    prompt_lengths: Int[Tensor, " B"]


class Head(nn.Module):
    """Micro-batch in, per-token outputs out: the one module whose forward DeepSpeed sees."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.is_value = models.is_value_model(model)

    def forward(self, micro: MicroBatch, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
        if self.is_value:
            return models.response_values(self.model, micro), None
        return models.response_logprobs(self.model, micro, temperature, entropy=entropy)


class Frozen:
    """A model that only scores: a reference or a frozen PRM. Needs neither DeepSpeed nor a process group.

    Each process holds all of it; ranks may call it as often as they like, nothing is collective.
    """

    def __init__(
        self, model: nn.Module, *, token_budget: int, layout: packing.Layout, device: distributed.Device
    ) -> None:
        self._head = Head(model).to(device).eval().requires_grad_(False)
        self._token_budget, self._layout, self._device = token_budget, layout, device

    @property
    def model(self) -> nn.Module:
        """The wrapped Hugging Face model."""
        return self._head.model

    def logprobs(self, sequences: Sequences, temperature: float) -> Float[Tensor, " N"]:
        """As :meth:`rlprm.engine.learner.Learner.logprobs`."""
        return self._score(sequences, temperature, False)[0]

    def logprobs_and_entropy(
        self, sequences: Sequences, temperature: float
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """As :meth:`rlprm.engine.learner.Learner.logprobs_and_entropy`."""
        return self._score(sequences, temperature, True)

    def values(self, sequences: Sequences) -> Float[Tensor, " N"]:
        """As :meth:`rlprm.engine.learner.Learner.values`."""
        require_value_model(self._head)
        return self._score(sequences, 1.0, False)[0]

    def _score(self, sequences: Sequences, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        return score(
            self._head,
            sequences,
            temperature,
            entropy=entropy,
            token_budget=self._token_budget,
            layout=self._layout,
            device=self._device,
            in_step=False,
        )


def score(
    forward: Callable[[MicroBatch, float, bool], tuple[Tensor, Tensor | None]],
    sequences: Sequences,
    temperature: float,
    *,
    entropy: bool,
    token_budget: int,
    layout: packing.Layout,
    device: distributed.Device,
    in_step: bool,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """``forward`` over micro-batches of ``token_budget`` tokens, laid back onto the flat tokens; 0 on prompt tokens.

    ``in_step`` (ZeRO-3, whose forward pass is collective): ranks with fewer micro-batches run empty ones, so that
    no rank waits for another for ever.
    """
    flat = torch.zeros(2, len(sequences.tokens), dtype=torch.float32)
    micros = flat_micro_batches(sequences, token_budget, layout)
    rounds = largest(len(micros)) if in_step else len(micros)
    with torch.no_grad():
        for index in range(rounds):
            micro = micros[index] if index < len(micros) else nothing()
            outputs = forward(on_device(micro, device), temperature, entropy)
            if index < len(micros):
                where = micro.token_fields["place"][micro.response_mask]
                for row, output in zip(flat, outputs, strict=True):
                    if output is not None:
                        row[where] = output.float().cpu()[micro.response_mask]
    return flat[0], flat[1]


def require_value_model(head: Head) -> None:
    """Raise where values are asked of a model that has none."""
    if not head.is_value:
        raise ConfigError("values() of a causal language model; load the critic with load_value")


def on_device(micro: MicroBatch, device: distributed.Device) -> MicroBatch:
    """The micro-batch with all tensors on ``device``."""
    if device == "cpu":
        return micro

    def move(fields: Any) -> dict[str, Tensor]:
        return {name: tensor.to(device, non_blocking=True) for name, tensor in fields.items()}

    return replace(
        micro,
        tokens=micro.tokens.to(device),
        positions=micro.positions.to(device),
        sequence=micro.sequence.to(device),
        response_mask=micro.response_mask.to(device),
        token_fields=move(micro.token_fields),
        sequence_fields=move(micro.sequence_fields),
    )


def nothing() -> MicroBatch:
    """A sequence of two tokens, run with weight 0 by a rank that has nothing left while others still work."""
    return MicroBatch(
        tokens=torch.zeros(1, 2, dtype=torch.int64),
        positions=torch.arange(2)[None],
        sequence=torch.zeros(1, 2, dtype=torch.int64),
        response_mask=torch.tensor([[False, True]]),
        packed=False,
        num_sequences=1,
        token_fields={},
        sequence_fields={},
    )


def largest(count: int) -> int:
    """The largest ``count`` of all ranks."""
    return int(distributed.GroupReduce().max(torch.tensor(count, dtype=torch.int64)))


def flat_micro_batches(sequences: Sequences, token_budget: int, layout: packing.Layout) -> list[MicroBatch]:
    """All sequences under the token budget; the field ``place`` says where on the flat tokens each entry lies."""
    lengths = sequences.lengths
    size = len(sequences.tokens)
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    position = torch.arange(size) - (lengths.cumsum(0) - lengths)[row]
    response = position >= sequences.prompt_lengths[row]
    plan = packing.micro_batches(lengths.tolist(), token_budget, max(1, len(lengths)), layout)
    place = {"place": torch.arange(size)}
    return [packing.build_micro(m, lengths, sequences.tokens, response, place, {}, layout) for m in plan]
