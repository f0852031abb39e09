"""Tiny Qwen2 models made on the spot, and their log-probs in plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 100
STOP = 7


def config(tied: bool, heads: int = 2) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,  # of 32: the smallest head vLLM has a CPU kernel for
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        # seeds and temperatures differ clearly; at 0.2 float32 itself is 1.3e-5 nats off float64 at T = 0.6
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=STOP,
        pad_token_id=0,
    )


def model(seed: int, tied: bool, heads: int = 2) -> Any:
    from transformers import Qwen2ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config(tied, heads)).eval()


def folder(where: Path, seed: int, tied: bool) -> str:
    path = where / f"model-{seed}-{'tied' if tied else 'untied'}"
    model(seed, tied).save_pretrained(path)
    return str(path)


@torch.no_grad()
def logprobs(reference: Any, tokens: list[int], temperature: float) -> torch.Tensor:
    """log softmax(logits / T) of each token after its prefix; one entry fewer than tokens."""
    ids = torch.tensor([tokens])
    logits = reference(input_ids=ids).logits[0, :-1].float() / temperature
    return torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None]).squeeze(-1)
