"""What one micro-batch keeps for its backward pass, tensor by tensor as transformers' decoders make it.

The numbers are those of Qwen2, Qwen3 and Llama in transformers: a test counts what autograd really saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlprm.planning.shapes import Shape

ITEM = {"float32": 4, "bfloat16": 2}
LOGITS_PER_CHUNK = 1 << 26  # of rlprm.engine.model: the output layer works on so many logits at a time

Layout = Literal["padded", "packed"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Micro:
    """The largest micro-batch that a token budget allows: sequences of the longest length."""

    rows: int
    longest: int  # tokens of a sequence
    responses: int  # of all its tokens those of responses
    layout: Layout

    @property
    def tokens(self) -> int:
        return self.rows * self.longest

    @classmethod
    def largest(cls, token_budget: int, prompt: int, response: int, layout: Layout) -> Micro:
        """As rlprm.core.packing fills it; a sequence that is longer than the budget goes alone.

        >>> Micro.largest(8192, 1024, 3072, "padded")
        Micro(rows=2, longest=4096, responses=6144, layout='padded')
        """
        rows = max(1, token_budget // (prompt + response))
        return cls(rows=rows, longest=prompt + response, responses=rows * response, layout=layout)


def kept_by_layer(shape: Shape, micro: Micro, *, dtype: str, attention: Attention) -> int:
    """Bytes that one layer keeps without gradient checkpointing."""
    item = ITEM[dtype]
    masked = attention != "flash_attention_2" and (micro.layout == "packed" or micro.rows > 1)
    # norms work in float32: they keep their input so, what they have normed, and the factor per token
    normed = 8 if item == 4 else 6
    per_token = 2 * (normed * shape.hidden + 4) + 2 * item * shape.hidden
    if shape.qk_norm:
        per_token += normed * (shape.query + shape.key) + 4 * (shape.heads + shape.kv_heads)
    repeated = attention == "eager" or (attention == "sdpa" and masked)  # keys and values, once for each query head
    per_token += item * (2 * shape.query + 2 * (shape.query if repeated else shape.key))
    per_token += 4 * item * shape.intermediate
    span = micro.tokens if micro.layout == "packed" else micro.longest  # keys that a token could look at
    mask = 0
    if attention == "eager":
        per_token += shape.heads * span * (4 if item == 4 else 6)
    else:
        per_token += 4 * shape.heads  # log-sums of the scores
        mask = item * micro.tokens * span if masked else 0
    return per_token * micro.tokens + mask


def kept(shape: Shape, micro: Micro, *, dtype: str, attention: Attention, checkpointing: bool) -> int:
    """Bytes that a forward pass of the decoder keeps until its backward pass, at their highest."""
    item = ITEM[dtype]
    layer = kept_by_layer(shape, micro, dtype=dtype, attention=attention)
    final = (8 if item == 4 else 6) * shape.hidden + 4 + 8 + 2 * item * shape.head_dim
    rest = micro.tokens * final + micro.responses * (item * shape.hidden + 24)
    if checkpointing:  # inputs of all layers, and one layer that is computed again
        return layer + shape.layers * micro.tokens * item * shape.hidden + rest
    return shape.layers * layer + rest


def head_peak(shape: Shape, micro: Micro, *, dtype: str, entropy: bool) -> int:
    """Bytes of the chunked output layer in its backward pass: logits, and the gradient of its weight in float32."""
    item = ITEM[dtype]
    chunk = min(micro.responses, max(1, LOGITS_PER_CHUNK // shape.vocabulary)) * shape.vocabulary
    logits = chunk * 4 * (6 if entropy else 5)
    weight = shape.embedding * 4
    products = chunk * (12 + item) + weight + shape.embedding * (4 if item == 4 else 6)
    return max(logits + weight, products)


def scoring_peak(shape: Shape, micro: Micro, *, dtype: str) -> int:
    """Bytes of a forward pass that keeps nothing: one layer under way, and a chunk of logits."""
    item = ITEM[dtype]
    layer = micro.tokens * (item * (3 * shape.intermediate + 4 * shape.hidden + 2 * shape.query) + 8 * shape.hidden)
    chunk = min(micro.responses, max(1, LOGITS_PER_CHUNK // shape.vocabulary)) * shape.vocabulary
    return max(layer, chunk * 4 * 4)
