"""The only shift by one: from logits, which predict the next token, to entries that describe their own token."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlprm.errors import AlignmentError, ConfigError

CHUNK = 4096  # rows of [V] that are held in float32 at once; at V = 150k this is 2.5 GB less than the whole batch


def predicted(sequence: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """True where ``tokens[b, t]`` was predicted by the logits at ``t - 1`` of its own sequence.

    The first token of each sequence and padding (-1) have no prediction, so a packed row never mixes two sequences.

    >>> predicted(torch.tensor([[0, 0, 1, 1, -1]])).tolist()
    [[False, True, False, True, False]]
    """
    known = torch.zeros_like(sequence, dtype=torch.bool)
    known[:, 1:] = (sequence[:, 1:] == sequence[:, :-1]) & (sequence[:, 1:] >= 0)
    return known


def predictors(mask: Bool[Tensor, "b t"], sequence: Int[Tensor, "b t"]) -> Int[Tensor, " n"]:
    """Flat positions (row-major over ``[b, t]``) whose logits predict the tokens that ``mask`` marks, in their order.

    For heads that run on the needed positions only.

    >>> predictors(torch.tensor([[False, True, False, True]]), torch.tensor([[0, 0, 1, 1]])).tolist()
    [0, 2]

    Raises:
        AlignmentError: a marked token that nothing predicts: padding, or the first token of its sequence.
    """
    orphans = int((mask & ~predicted(sequence)).sum())
    if orphans:
        raise AlignmentError(
            f"{orphans} of {int(mask.sum())} marked tokens have no token before them in their sequence; "
            "every response needs at least one prompt token"
        )
    return mask.reshape(-1).nonzero().squeeze(1) - 1


def token_logprobs(
    logits: Float[Tensor, "b t V"], tokens: Int[Tensor, "b t"], sequence: Int[Tensor, "b t"], temperature: float
) -> Float[Tensor, "b t"]:
    """``log softmax(logits[b, t - 1] / temperature)[tokens[b, t]]``: entry t describes ``tokens[b, t]``.

    Nats, float32 (float64 for float64 logits), differentiable in ``logits``; 0 for the first token of a sequence and
    for padding. Rows are worked off in chunks, and only ``logits`` itself is kept for the backward pass, so no second
    ``[b, t, V]`` tensor is ever alive in the forward pass. Logits that predict nothing are not read.

    >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 9.0], [5.0, 0.0]]])
    >>> token_logprobs(logits, torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 0]]), 1.0).round(decimals=4).tolist()
    [[0.0, -0.6930999755859375, -9.999999747378752e-05]]

    Raises:
        ConfigError: a temperature that is not positive.
    """
    _check(temperature)
    known = predicted(sequence)
    where = known.reshape(-1).nonzero().squeeze(1)
    return _per_token(_Logprobs.apply(logits, where - 1, tokens.reshape(-1)[where], temperature), where, known)


def token_entropy(
    logits: Float[Tensor, "b t V"], sequence: Int[Tensor, "b t"], temperature: float
) -> Float[Tensor, "b t"]:
    """``H(softmax(logits[b, t - 1] / temperature))``: the entropy of the choice that produced ``tokens[b, t]``.

    Nats, differentiable, 0 where :func:`predicted` is False.

    >>> token_entropy(torch.zeros(1, 2, 4), torch.tensor([[0, 0]]), 1.0).round(decimals=3).tolist()
    [[0.0, 1.3860000371932983]]

    Raises:
        ConfigError: a temperature that is not positive.
    """
    _check(temperature)
    known = predicted(sequence)
    where = known.reshape(-1).nonzero().squeeze(1)
    return _per_token(_Entropy.apply(logits, where - 1, temperature), where, known)


def token_values(outputs: Float[Tensor, "b t"], sequence: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """``V[b, t] = outputs[b, t - 1]``: the value of the state in which ``tokens[b, t]`` was chosen, else 0.

    ``outputs[b, t]`` is what a value head says after reading ``tokens[b, t]``.

    >>> token_values(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0, 0, 1]])).tolist()
    [[0.0, 1.0, 0.0]]
    """
    known = predicted(sequence)
    return torch.where(known, outputs.roll(1, dims=1), torch.zeros_like(outputs))


def _check(temperature: float) -> None:
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; log-probs need one above 0 (greedy decoding has none)")


def _per_token(values: Tensor, where: Tensor, known: Tensor) -> Tensor:
    flat = values.new_zeros(known.numel()).index_put((where,), values)
    return flat.reshape(known.shape)


def _rows(logits: Tensor, index: Tensor, temperature: float) -> Tensor:
    """The chosen rows, scaled, in float32 or better: bf16 log-probs are off by up to 1e-2 nats."""
    rows = logits.reshape(-1, logits.shape[-1])[index]
    return rows.to(_wide(logits)) / temperature


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _scatter_gradient(logits: Tensor, index: Tensor, upstream: Tensor, rule: Any) -> Tensor:
    """``d logits`` chunk by chunk; rows without upstream gradient are skipped (prompts, and masked NaN stay out)."""
    gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    flat = gradient.view(-1, logits.shape[-1])
    for part in upstream.nonzero().squeeze(1).split(CHUNK):
        flat[index[part]] = rule(part).to(logits.dtype)
    return gradient


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, targets: Tensor, temperature: float) -> Tensor:
        values = torch.empty(len(index), dtype=_wide(logits), device=logits.device)
        normalizers = torch.empty_like(values)
        for part in torch.arange(len(index), device=index.device).split(CHUNK):
            rows = _rows(logits, index[part], temperature)
            normalizers[part] = rows.logsumexp(-1)
            values[part] = rows.gather(-1, targets[part, None]).squeeze(-1) - normalizers[part]
        ctx.save_for_backward(logits, index, targets, normalizers)
        ctx.temperature = temperature
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, index, targets, normalizers = ctx.saved_tensors

        def rule(part: Tensor) -> Tensor:
            rows = _rows(logits, index[part], ctx.temperature)
            step = -torch.exp(rows - normalizers[part, None])
            step.scatter_add_(-1, targets[part, None], torch.ones_like(step[:, :1]))
            return step * (upstream[part, None] / ctx.temperature)

        return _scatter_gradient(logits, index, upstream, rule), None, None, None


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, temperature: float) -> Tensor:
        values = torch.empty(len(index), dtype=_wide(logits), device=logits.device)
        for part in torch.arange(len(index), device=index.device).split(CHUNK):
            logprobs = _rows(logits, index[part], temperature).log_softmax(-1)
            # -inf (a forbidden token) times its probability 0 is 0; a NaN logit stays NaN and is found upstream.
            values[part] = -(logprobs.exp() * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum(-1)
        ctx.save_for_backward(logits, index, values)
        ctx.temperature = temperature
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, index, values = ctx.saved_tensors

        def rule(part: Tensor) -> Tensor:
            # dH/dz = -p (log p + H); a token of probability 0 (masked logit of -inf) moves nothing.
            logprobs = _rows(logits, index[part], ctx.temperature).log_softmax(-1)
            step = -logprobs.exp() * (logprobs + values[part, None])
            step = torch.where(logprobs == -torch.inf, torch.zeros_like(step), step)
            return step * (upstream[part, None] / ctx.temperature)

        return _scatter_gradient(logits, index, upstream, rule), None, None
