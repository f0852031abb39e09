"""A tokenizer made on the spot: one token per byte and a few special ones, so every expected id can be worked out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2, 3

CHAT = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{% if think %}<think>{% endif %}"
)


def byte_tokenizer(
    *, template: str | None, adds_specials: bool, has_bos: bool = True, unk: str | None = None
) -> PreTrainedTokenizerFast:
    """One token per byte; ``adds_specials`` puts <s> in front and </s> behind what it is given, as some do."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if adds_specials:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if has_bos else None,
        eos_token="</s>",
        unk_token=unk,
        additional_special_tokens=SPECIAL[2:],
        chat_template=template,
        model_max_length=64,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Has a chat template with one BOS, and would add <s> and </s> by itself."""
    return byte_tokenizer(template=CHAT, adds_specials=True)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return byte_tokenizer
