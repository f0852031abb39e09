"""A PRM that can be worked out by hand: one attention layer that averages what it has read, and a byte tokenizer.

Every token's embedding is (1, 1, 1, 1), that of ``!`` is (1, 1, 1, -1); both have root mean square 1, so norms leave them as
they are. Queries and keys are 0, values and outputs the identity, the MLP is 0: at a token that is no ``!`` the hidden
state before the last norm is ``(2, 2, 2, 2 - 2 f)`` with f the share of ``!`` among all tokens so far. The last norm divides
by ``rms(f) = sqrt((12 + (2 - 2 f)^2) / 4)``. A head with weights ``(-c, 0, 0, c)`` gives the logit ``-2 c f / rms(f)``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SPECIAL = ["<pad>", "<eos>", "<bos>", "<extra_0>", "<turn>", "<end>"]
CHAT = (
    "{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
C = 10.0


def chance(bad: int, tokens: int) -> float:
    """The number at a token with ``bad`` exclamation marks among the ``tokens`` read so far (itself counted)."""
    f = bad / tokens
    return 1 / (1 + math.exp(2 * C * f / math.sqrt((12 + (2 - 2 * f) ** 2) / 4)))


def tokenizer(*, special: list[str] = SPECIAL, chat: str | None = CHAT) -> Any:
    """One token per byte, the special tokens, and Math-Shepherd's marker as an ordinary word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens=special[3:],
        chat_template=chat,
        clean_up_tokenization_spaces=False,
        name_or_path="tiny",
    )
    fast.add_tokens(["ки"])
    return fast


@torch.no_grad()
def backbone(tokens: Any, *, context: int = 512) -> Any:
    """The decoder of the module's docstring, with an output layer of its own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        rms_norm_eps=1e-12,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "norm" in name else 0.0)
    layer = model.model.layers[0].self_attn
    layer.v_proj.weight.copy_(torch.eye(4))
    layer.o_proj.weight.copy_(torch.eye(4))
    model.model.embed_tokens.weight.fill_(1.0)
    model.model.embed_tokens.weight[tokens.convert_tokens_to_ids("!"), 3] = -1.0
    plus = torch.tensor([-C, 0.0, 0.0, C])
    model.lm_head.weight[tokens.convert_tokens_to_ids("+")] = plus / 2
    model.lm_head.weight[tokens.convert_tokens_to_ids("-")] = -plus / 2
    return model


SCORE = torch.tensor([[-C, 0.0, 0.0, C]])
PAIR = torch.cat([-SCORE / 2, SCORE / 2])  # bad, good: softmax[1] = sigmoid(good - bad)


def heads() -> dict[str, dict[str, torch.Tensor]]:
    """One and the same number, as each family keeps its head."""
    zero = torch.zeros(1)
    return {
        "one": {"score.weight": SCORE, "score.bias": zero},
        "two": {"score.weight": PAIR},
        # relu(x) - relu(-x) = x, so two layers make the same logits
        "mlp": {
            "score.0.weight": torch.cat([SCORE, -SCORE, torch.zeros(2, 4)]),
            "score.0.bias": torch.zeros(4),
            "score.2.weight": torch.tensor([[-0.5, 0.5, 0.0, 0.0], [0.5, -0.5, 0.0, 0.0]]),
            "score.2.bias": torch.zeros(2),
        },
        "value": {"v_head.summary.weight": SCORE, "v_head.summary.bias": zero},
        "none": {},
    }


def folder(where: Path, head: str, *, tokens: Any | None = None, remote: bool = False, context: int = 512) -> str:
    """A model folder whose weights are the decoder's and this head's; ``remote``: it also names code of its own."""
    path, tokens = where / f"prm-{head}", tokens or tokenizer()
    backbone(tokens, context=context).save_pretrained(path)
    tokens.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    if head != "none":
        del weights["lm_head.weight"]
    save_file({**weights, **heads()[head]}, path / "model.safetensors", metadata={"format": "pt"})
    if remote:
        config = json.loads((path / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
        config["architectures"] = ["Qwen2ForProcessRewardModel"]
        (path / "config.json").write_text(json.dumps(config))
        (path / "evil.py").write_text("raise SystemExit('code of a model folder was run')\n")
    return str(path)
