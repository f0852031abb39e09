"""What the planner says a forward pass keeps is, to the byte, what autograd saves of transformers' models."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from rlprm.engine import model as models
from rlprm.planning.activations import Micro, kept
from rlprm.planning.shapes import from_config
from rlprm.records import MicroBatch

ROWS, LONGEST, PROMPT = 3, 16, 4
SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


def micro_batch(layout: str) -> MicroBatch:
    """Sequences of the longest length; padded ones with a padding token more in the last row, so that masks are made."""
    shape = (1, ROWS * LONGEST) if layout == "packed" else (ROWS, LONGEST)
    place = torch.arange(ROWS * LONGEST)
    sequence, positions = (place // LONGEST).view(shape), (place % LONGEST).view(shape)
    if layout == "padded":
        sequence = sequence.clone()
        sequence[-1, -1] = -1
    mask = (positions >= PROMPT) & (sequence >= 0)
    return MicroBatch(
        tokens=(place % 50 + 1).view(shape), positions=positions, sequence=sequence, response_mask=mask,
        packed=layout == "packed", num_sequences=ROWS, token_fields={}, sequence_fields={},
    )  # fmt: skip


def saved(family: str, dtype: torch.dtype, attention: str, layout: str) -> tuple[int, MicroBatch]:
    """Bytes of all storages that the backward pass will read, without parameters."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

    config = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[family](**SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.lm_head.__class__ = models.TokenHead
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # a freed one's address could be given out again
        return tensor

    micro = micro_batch(layout)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        models.response_logprobs(model, micro, 1.0, entropy=True)
    return sum(storages.values()), micro


@pytest.mark.parametrize(
    ("family", "dtype", "attention", "layout"),
    [
        *itertools.product(("qwen2",), ("float32", "bfloat16"), ("sdpa", "eager"), ("padded", "packed")),
        *itertools.product(("qwen3", "llama"), ("float32", "bfloat16"), ("sdpa",), ("padded", "packed")),
    ],
)
def test_every_byte_that_a_forward_pass_keeps(family: str, dtype: str, attention: Any, layout: Any) -> None:
    found, micro = saved(family, getattr(torch, dtype), attention, layout)
    shape = from_config("tiny", {"model_type": family, **SIZES})
    responses = int(micro.response_mask.sum())
    planned = Micro(rows=ROWS, longest=LONGEST, responses=responses, layout=layout)
    assert kept(shape, planned, dtype=dtype, attention=attention, checkpointing=False) == found


def test_checkpointing_keeps_one_layer_and_the_inputs_of_all() -> None:
    shape = from_config("tiny", {"model_type": "llama", **SIZES, "num_hidden_layers": 30})
    micro = Micro.largest(64, 4, 12, "padded")
    whole = kept(shape, micro, dtype="float32", attention="sdpa", checkpointing=False)
    less = kept(shape, micro, dtype="float32", attention="sdpa", checkpointing=True)
    inputs = 30 * micro.tokens * 24 * 4
    assert inputs < less < inputs + whole / 25


def test_flash_attention_keeps_no_mask_of_the_packed_row() -> None:
    shape = from_config("tiny", {"model_type": "llama", **SIZES})
    micro = Micro.largest(4096, 4, 12, "packed")
    sizes = {each: kept(shape, micro, dtype="bfloat16", attention=each, checkpointing=False)
             for each in ("sdpa", "flash_attention_2")}  # fmt: skip
    assert sizes["sdpa"] - sizes["flash_attention_2"] >= 2 * 4096 * 4096 * 2  # layers x tokens^2 x bytes
