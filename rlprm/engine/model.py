"""Hugging Face causal language and value models: loading, forward passes in both layouts, log-probs in chunks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from rlprm.core.alignment import predictors
from rlprm.errors import AlignmentError, ConfigError
from rlprm.records import MicroBatch

DType = Literal["float32", "bfloat16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]

# Logits alive at once in the log-prob head: 2**26 entries are 256 MB in float32, whatever the vocabulary.
LOGITS_PER_CHUNK = 1 << 26

# Models that change the logits after their output layer would get wrong log-probs from the chunked head.
_LOGIT_CHANGERS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def load_causal(path: str, dtype: DType, *, attention: Attention, gradient_checkpointing: bool) -> nn.Module:
    """A causal language model from a local folder or a hub name, ready to train: no dropout, no remote code.

    A hub name is looked up in the local cache; it is downloaded only where HF_HUB_OFFLINE=0 is set.

    Raises:
        ConfigError: no such folder, not a model folder, weights missing from it, or an architecture whose logits are
            changed after the output layer.
    """
    from transformers import AutoModelForCausalLM

    model = _load(AutoModelForCausalLM, path, dtype, attention, gradient_checkpointing, allow_missing=())
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"model {path} has the output layer {type(head).__name__}; expected a linear one")
    for name in _LOGIT_CHANGERS:
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"model {path} sets {name}={getattr(model.config, name)}, which changes logits after the output layer; "
                "that is not supported, use another model"
            )
    head.__class__ = TokenHead  # same parameters and names; adds log-probs in chunks
    return model


def load_value(path: str, dtype: DType, *, attention: Attention, gradient_checkpointing: bool) -> nn.Module:
    """The backbone of ``path`` with a scalar head per token; the head starts at 0 unless the folder holds one.

    A zero head makes the first values 0, so the first advantages are the plain returns. A folder written by
    ``Learner.export`` of a value model brings its own head.

    Raises:
        ConfigError: as :func:`load_causal`.
    """
    from transformers import AutoModelForTokenClassification

    model = _load(
        AutoModelForTokenClassification,
        path,
        dtype,
        attention,
        gradient_checkpointing,
        allow_missing=("score.weight", "score.bias"),
        num_labels=1,
    )
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ConfigError(f"model {path} ({type(model).__name__}) has no linear value head; use a decoder-only model")
    return model


def load_decoder(path: str, dtype: DType, *, attention: Attention) -> nn.Module:
    """The decoder of ``path`` without its head, by the ``model_type`` of its configuration; for frozen scoring.

    Raises:
        ConfigError: as :func:`load_causal`.
    """
    from transformers import AutoModel

    return _load(AutoModel, path, dtype, attention, False, allow_missing=())


def is_value_model(model: nn.Module) -> bool:
    """Does ``model`` come from :func:`load_value`?"""
    return not isinstance(getattr(model, "lm_head", None), TokenHead) and hasattr(model, "score")


def forward(model: nn.Module, micro: MicroBatch) -> Float[Tensor, "b t V"]:
    """Logits of every position, all at once: for parity checks and tiny models (memory ``b * t * V``)."""
    return model.get_output_embeddings()(hidden_states(model, micro))


def hidden_states(model: nn.Module, micro: MicroBatch) -> Float[Tensor, "b t H"]:
    """Last hidden states; in a packed row no token sees another sequence.

    Padded: the attention mask hides padding. Packed: no mask is given and positions restart at 0, from which
    transformers builds the block-diagonal mask (sdpa, eager) or the varlen call (flash attention).

    Raises:
        AlignmentError: a packed micro-batch of several rows.
    """
    if micro.packed and micro.tokens.shape[0] != 1:
        raise AlignmentError(f"a packed micro-batch has {micro.tokens.shape[0]} rows; expected one row")
    return model.base_model(
        input_ids=micro.tokens,
        attention_mask=None if micro.packed else (micro.sequence >= 0).long(),
        position_ids=micro.positions,
        use_cache=False,
    ).last_hidden_state


def response_logprobs(
    model: nn.Module, micro: MicroBatch, temperature: float, *, entropy: bool
) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"] | None]:
    """``log softmax(logits / temperature)[token]`` on response tokens, 0 elsewhere; nats, float32; and the entropy.

    The output layer runs on the predictors of response tokens only, in chunks that are recomputed in the backward
    pass, so ``[tokens, V]`` never exists.
    """
    hidden = hidden_states(model, micro)
    rows = micro.response_mask.flatten().nonzero().squeeze(1)
    tokens = micro.tokens.flatten()[rows]
    picked = hidden.flatten(0, 1)[predictors(micro.response_mask, micro.sequence)]
    logprobs, entropies = model.get_output_embeddings()(picked, tokens, temperature)
    return _scatter(logprobs, rows, micro), (_scatter(entropies, rows, micro) if entropy else None)


def response_values(model: nn.Module, micro: MicroBatch) -> Float[Tensor, "b t"]:
    """Value of the state *before* each response token (what precedes it decides it), 0 elsewhere; float32."""
    hidden = hidden_states(model, micro)
    rows = micro.response_mask.flatten().nonzero().squeeze(1)
    picked = hidden.flatten(0, 1)[predictors(micro.response_mask, micro.sequence)]
    return _scatter(model.score(picked).squeeze(-1).float(), rows, micro)


def _scatter(flat: Float[Tensor, " n"], rows: Int[Tensor, " n"], micro: MicroBatch) -> Float[Tensor, "b t"]:
    out = flat.new_zeros(micro.tokens.numel()).index_put((rows,), flat)
    return out.view(micro.tokens.shape)


class TokenHead(nn.Linear):
    """The output layer; given tokens it returns their log-probs and the entropy instead of logits.

    One call per forward pass whatever the number of chunks: under ZeRO-3 each call is a collective, and ranks have
    different numbers of tokens.
    """

    def forward(
        self, hidden: Tensor, tokens: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        if tokens is None:
            return functional.linear(hidden, self.weight, self.bias)
        return ChunkedLogProbs.apply(hidden, self.weight, self.bias, tokens, temperature)


class ChunkedLogProbs(torch.autograd.Function):
    """``lp = l[y] - logsumexp(l)`` and ``H = logsumexp(l) - sum p l`` with ``l = (W h + b) / temperature``, by chunks.

    Backward, with ``p = softmax(l)``: ``dl = g_lp (1[y] - p) - g_H p (log p + H)``. Sums over chunks are kept in
    float32, so bf16 weights get the same gradient whatever the number of chunks.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, tokens)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(len(tokens), dtype=wide, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        for rows in _chunks(len(tokens), weight.shape[0]):
            logits = functional.linear(hidden[rows], weight, bias).to(wide) / temperature
            total = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(1, tokens[rows, None]).squeeze(1) - total
            entropies[rows] = total - (torch.softmax(logits, -1) * logits).sum(-1)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens = ctx.saved_tensors
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=wide, device=bias.device)
        zero = torch.zeros(len(tokens), dtype=wide, device=hidden.device)
        gain_logprob = zero if grad_logprobs is None else grad_logprobs
        gain_entropy = zero if grad_entropies is None else grad_entropies
        # Rows that nothing depends on are skipped: masked tokens cost nothing, and their NaN cannot leak (0 * NaN).
        needed = ((gain_logprob != 0) | (gain_entropy != 0)).nonzero().squeeze(1)
        for part in _chunks(len(needed), weight.shape[0]):
            rows = needed[part]
            log_p = (functional.linear(hidden[rows], weight, bias).to(wide) / ctx.temperature).log_softmax(-1)
            p = log_p.exp()
            grad = -gain_logprob[rows, None] * p
            grad.scatter_add_(1, tokens[rows, None], gain_logprob[rows, None])
            if grad_entropies is not None:
                grad -= gain_entropy[rows, None] * p * (log_p - (p * log_p).sum(-1, keepdim=True))
            narrow = (grad / ctx.temperature).to(hidden.dtype)
            grad_hidden[rows] = narrow @ weight
            grad_weight += (narrow.T @ hidden[rows]).to(wide)
            if grad_bias is not None:
                grad_bias += narrow.sum(0, dtype=wide)
        return (
            grad_hidden,
            grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, LOGITS_PER_CHUNK // vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _load(
    kind: Any,
    path: str,
    dtype: DType,
    attention: Attention,
    gradient_checkpointing: bool,
    *,
    allow_missing: tuple[str, ...],
    **overrides: Any,
) -> nn.Module:
    from transformers import AutoConfig
    from transformers.utils import logging

    local_only = _local_only(path)
    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights: checked below, as an error
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=local_only, trust_remote_code=False, **overrides)
        _no_dropout(config)
        model, info = kind.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            local_files_only=local_only,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"model {path!r} cannot be loaded as {kind.__name__} with attention={attention}: {error}"
        ) from error
    finally:
        logging.set_verbosity(loud)
    missing = sorted(set(info["missing_keys"]) - set(allow_missing))
    mismatched = sorted(str(key) for key in info["mismatched_keys"])
    if missing or mismatched:  # transformers would only warn and train random weights
        raise ConfigError(
            f"model {path!r} lacks {len(missing)} weights ({', '.join(missing[:3])}) and has {len(mismatched)} of "
            f"another shape ({', '.join(mismatched[:3])}); the folder does not hold this architecture"
        )
    with torch.no_grad():
        for name in sorted(set(info["missing_keys"]) & set(allow_missing)):
            model.get_parameter(name).zero_()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _local_only(path: str) -> bool:
    """True where nothing may be fetched for ``path``; raises where that cannot work."""
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ConfigError(f"model folder {path} has no config.json; expected a Hugging Face model folder")
        return True
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise ConfigError(f"model folder {path} does not exist; give an existing folder or a hub name like org/name")
    if os.environ.get("HF_HUB_OFFLINE") == "0":
        return False
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(path, "config.json"), str):
        raise ConfigError(
            f"model {path} is neither a folder nor a hub model in the local cache, and downloads are off; "
            "correct model.path, or set HF_HUB_OFFLINE=0 to allow the download"
        )
    return True


def _no_dropout(config: Any) -> None:
    # With dropout the first on-policy ratio would not be 1, and old log-probs could not be repeated.
    for name, value in list(vars(config).items()):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, (int, float)):
            setattr(config, name, 0.0)
    if getattr(config, "classifier_dropout", None) is None:
        config.classifier_dropout = 0.0  # transformers' default of value heads is 0.1, not 0
