"""Process reward models of any Hugging Face family without code from their folders: a decoder, and the head beside it.

A PRM that ships remote code (Qwen2.5-Math-PRM, Skywork-o1-Open-PRM) is an ordinary decoder under its ``model_type`` and a
small head. The decoder is loaded by its type, the head by the names of its weights in the safetensors files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlprm.core import packing
from rlprm.engine import distributed, scoring
from rlprm.engine import model as models
from rlprm.errors import ConfigError

# Where checkpoints keep their heads. `score`: transformers' decoders, Qwen's and Fin-PRM's PRMs; `classifier`: others of
# transformers; `v_head`: Skywork's and TRL's value heads.
CLASSIFIERS = ("score", "classifier")
VALUE_HEAD = "v_head.summary"


class StepPrm:
    """Chance that a step is right, at given positions of given token sequences. Frozen; every rank holds all of it.

    ``p = sigmoid(l)`` for a head of one label and ``p = softmax(l)[1]`` for one of two (bad, good).
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        *,
        token_budget: int,
        layout: packing.Layout,
        device: distributed.Device,
    ) -> None:
        self._model = model.to(device).eval().requires_grad_(False)
        self._head = head.to(device).eval().requires_grad_(False)
        self._token_budget, self._layout, self._device = token_budget, layout, device

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that the model can read; None where its configuration does not say."""
        return getattr(self._model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def probabilities(
        self, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> list[Float[Tensor, " s"]]:
        """For each sequence one number in [0, 1] per position, in the order of ``positions``; float32, on the host."""
        lengths = torch.tensor([len(each) for each in sequences], dtype=torch.int64)
        if not len(lengths):
            return []
        starts = (lengths.cumsum(0) - lengths).tolist()
        tokens = torch.tensor([token for each in sequences for token in each], dtype=torch.int64)
        read = torch.zeros(len(tokens), dtype=torch.bool)
        for start, wanted in zip(starts, positions, strict=True):
            read[[start + place for place in wanted]] = True
        found = torch.full((len(tokens),), torch.nan)
        place = {"place": torch.arange(len(tokens))}
        for members in packing.micro_batches(lengths.tolist(), self._token_budget, len(lengths), self._layout):
            if not any(positions[member] for member in members):
                continue
            micro = packing.build_micro(members, lengths, tokens, read, place, {}, self._layout)
            moved = scoring.on_device(micro, self._device)
            hidden = models.hidden_states(self._model, moved)
            found[micro.token_fields["place"][micro.response_mask]] = self._chance(hidden[moved.response_mask]).cpu()
        return [found[[start + place for place in wanted]] for start, wanted in zip(starts, positions, strict=True)]

    def _chance(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, " n"]:
        logits = self._head(hidden).float()
        return logits.squeeze(-1).sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1)[:, 1]


def load_prm(
    path: str,
    dtype: models.DType,
    *,
    attention: models.Attention,
    head: Literal["classifier", "value", "vocabulary"],
    candidates: tuple[int, int] | None,
    token_budget: int,
    layout: packing.Layout,
    device: distributed.Device,
) -> StepPrm:
    """The PRM of a folder. ``candidates``: ids of the bad and the good token, for the vocabulary head.

    Raises:
        ConfigError: no such folder, weights missing, a head of another kind than the format reads, or weights that are
            not in safetensors files.
    """
    if head == "vocabulary":
        assert candidates is not None
        causal = models.load_causal(path, dtype, attention=attention, gradient_checkpointing=False)
        top = _rows(causal.get_output_embeddings(), candidates)
        return StepPrm(causal, top, token_budget=token_budget, layout=layout, device=device)
    weights = head_weights(path, VALUE_HEAD if head == "value" else None)  # first: refuses what is not safetensors
    decoder = models.load_decoder(path, dtype, attention=attention)
    top = made_head(weights, path).to(getattr(torch, dtype))
    return StepPrm(decoder, top, token_budget=token_budget, layout=layout, device=device)


def head_weights(path: str, prefix: str | None) -> dict[str, Tensor]:
    """The head's tensors by the names behind ``prefix`` (null: any classifier's), from the folder's safetensors files.

    Raises:
        ConfigError: no safetensors files, or none of those names in them.
    """
    from safetensors import safe_open

    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"the PRM {path!r} has no safetensors files; its head is not read from other formats, which may run code: save "
            "the model as safetensors first"
        )
    prefixes = CLASSIFIERS if prefix is None else (prefix,)
    found: dict[str, Tensor] = {}
    names: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names += list(opened.keys())
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                for each in prefixes:
                    if name.startswith(f"{each}."):
                        found[name.removeprefix(f"{each}.")] = opened.get_tensor(name)
    if not found:
        others = sorted({name.split(".")[0] for name in names})
        raise ConfigError(
            f"the PRM {path!r} has no weights {' or '.join(f'{each}.*' for each in prefixes)} (there are: "
            f"{', '.join(others)}.*), where its format's head should be; choose the format that the model was trained with "
            "(prm_format@...=...)"
        )
    return found


def made_head(weights: Mapping[str, Tensor], path: str) -> nn.Module:
    """A linear head (``weight``, ``bias``), or the MLP ``0``, ReLU, ``2`` of Qwen2.5-Math-PRM, of one or two labels.

    >>> made_head({"weight": torch.zeros(1, 4)}, "prm")
    Linear(in_features=4, out_features=1, bias=False)

    Raises:
        ConfigError: other names, or other numbers of labels.
    """
    head: nn.Module
    if "weight" in weights and set(weights) <= {"weight", "bias"}:
        head = _linear(weights["weight"], weights.get("bias"))
    elif set(weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}:
        first, last = (_linear(weights[f"{layer}.weight"], weights[f"{layer}.bias"]) for layer in (0, 2))
        head = nn.Sequential(first, nn.ReLU(), last)
    else:
        raise ConfigError(
            f"the head of the PRM {path!r} has the weights {', '.join(sorted(weights))}; expected weight and bias of one "
            "linear layer, or 0.* and 2.* of two with a ReLU between them"
        )
    labels = (head if isinstance(head, nn.Linear) else head[-1]).out_features
    if labels not in (1, 2):
        raise ConfigError(f"the head of the PRM {path!r} has {labels} labels; expected 1 (a score) or 2 (bad, good)")
    return head


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _rows(output: Any, candidates: tuple[int, int]) -> nn.Linear:
    """The output layer's rows of the two tokens: no other logit is ever computed."""
    rows = torch.tensor(candidates)
    layer = _linear(output.weight.detach()[rows], None if output.bias is None else output.bias.detach()[rows])
    return layer.to(output.weight.dtype)
