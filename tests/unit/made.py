"""Hand-made rollouts, shards and a learner that computes from a table: for arithmetic that needs no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlprm.batch import flat_response_mask, jagged
from rlprm.core.metrics import merged
from rlprm.core.reduce import Identity
from rlprm.engine.learner import Learner, Outputs
from rlprm.records import JaggedShard, MicroBatch
from rlprm.roles import Finish, Prompt, Rollout, RowText, Verdict, Verified
from rlprm.sources.base import Scorable, SourceContext


def prompt(number: int = 0, tokens: Sequence[int] = (0,)) -> Prompt:
    text = f"question {number}"
    return Prompt(id=f"a/{number}", text=text, question=text, tokens=tuple(tokens), gold="7", source="a")


def rollout(tokens: Sequence[int], *, of: Prompt | None = None, sample: int = 0, finish: Finish = "stop") -> Rollout:
    return Rollout(
        prompt=of or prompt(),
        sample=sample,
        tokens=tuple(tokens),
        logprobs=tuple(-0.5 for _ in tokens),
        finish=finish,
        version=3,
        seed=sample,
    )


def verified(
    tokens: Sequence[int],
    outcome: float | None,
    *,
    of: Prompt | None = None,
    sample: int = 0,
    finish: Finish = "stop",
    labels: tuple[int, ...] | None = None,
    reason: str = "",
) -> Verified:
    verdict = Verdict(outcome=outcome, reason=reason, seconds=0.1, steps=labels)
    return Verified(rollout=rollout(tokens, of=of, sample=sample, finish=finish), text="", verdict=verdict)


def shard(
    lengths: Sequence[int],
    outcomes: Sequence[float | None],
    *,
    groups: Sequence[int] | None = None,
    steps: Sequence[Sequence[int]] | None = None,
    labels: Sequence[tuple[int, ...] | None] | None = None,
    fresh: Sequence[bool] | None = None,
    train: Sequence[bool] | None = None,
) -> JaggedShard:
    """Responses of these lengths after prompts of one token; every response token has an id of its own, from 1 on."""
    size, following = len(lengths), 1
    items = []
    for row, length in enumerate(lengths):
        tokens = range(following, following + length)
        following += length
        items.append(verified(tuple(tokens), outcomes[row], sample=row, labels=labels[row] if labels else None))
    return jagged(
        items,
        steps or [range(length) for length in lengths],
        groups=groups or [0] * size,
        rows=range(size),
        fresh=fresh or [True] * size,
        train=train or [True] * size,
    )


class TableLearner(Learner):
    """Log-prob, entropy and value of a token are what the tables say of its id; an update moves the log-probs."""

    def __init__(self, logprobs: Sequence[float], *, entropy: Sequence[float] = (), shift: float = 0.0) -> None:
        self.table = torch.tensor([0.0, *logprobs])  # the prompt's token has id 0
        self.entropies = torch.tensor([0.0, *(entropy or [0.0] * len(logprobs))])
        self.steps = 0
        self.calls: list[str] = []
        self.losses: list[float] = []
        self.gradients: list[Tensor] = []
        self.rows: list[int] = []  # sequences of each update
        self._shift = shift

    def logprobs(self, shard: JaggedShard, temperature: float) -> Tensor:
        self.calls.append("logprobs")
        return torch.where(flat_response_mask(shard), self.table[shard.tokens], 0.0)

    def values(self, shard: JaggedShard) -> Tensor:
        self.calls.append("values")
        return torch.where(flat_response_mask(shard), self.table[shard.tokens], 0.0)

    def update(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: Callable[..., Any],
        *,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> dict[str, Any]:
        self.calls.append("update")
        table = self.table.clone().requires_grad_(True)
        total, found = torch.zeros(()), []
        for micro in micro_batches:
            looked_up = torch.where(micro.response_mask, table[micro.tokens], torch.zeros(()))
            outputs = Outputs(
                logprobs=looked_up,
                entropy=torch.where(micro.response_mask, self.entropies[micro.tokens], 0.0) if entropy else None,
                values=looked_up,
            )
            value, metrics = loss(micro, outputs)
            total = total + value
            found.append(metrics)
        if total.requires_grad:
            total.backward()
        self.losses.append(float(total.detach()))
        self.gradients.append(torch.zeros_like(table) if table.grad is None else table.grad)
        self.rows.append(sum(micro.num_sequences for micro in micro_batches))
        self.table = self.table + self._shift
        self.steps += 1
        return {**merged(found), "grad_norm": 1.0, "lr": 0.1}


def context(name: str = "process", **changes: Any) -> SourceContext:
    """Where a source lives that asks for nothing but what ``changes`` say."""
    given: dict[str, Any] = {
        "name": name,
        "model": None,
        "learner": None,
        "passes": None,
        "tokenizer": None,
        "policy_tokenizer": None,
        "temperature": 1.0,
        "reduce": Identity(),
        "device": "cpu",
        "dtype": "float32",
        "attention": "sdpa",
        "token_budget": 64,
        "layout": "padded",
        "seed": 0,
        "max_response_tokens": 16,
    }
    return SourceContext(**{**given, **changes})


def scorable(
    given: JaggedShard,
    *,
    old: Tensor | None = None,
    ref: Tensor | None = None,
    texts: tuple[RowText, ...] | None = None,
    step: int = 1,
) -> Scorable:
    """What a source is given of ``given``; log pi_old is 0 unless said otherwise."""
    return Scorable(
        shard=given, old=torch.zeros(len(given.tokens)) if old is None else old, ref=ref, texts=texts, step=step
    )
