"""An untrained model for any text: one token per byte, and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Any:
    """Byte-level BPE without merges: every text has tokens, and a turn ends with its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([PAD, START, END, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=PAD, eos_token=END, additional_special_tokens=[START], chat_template=CHAT,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def byte_model(folder: Path) -> str:
    """A Qwen2 of 0.1 M random parameters, with that tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    text = tokenizer()
    config = Qwen2Config(
        vocab_size=len(text), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id, dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    text.save_pretrained(folder)
    return str(folder)
