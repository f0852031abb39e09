"""Progress of a prover, by Monte-Carlo continuation of the response's own prefixes (Rewarding Progress, 2410.08146)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlprm.core.implicit import Granularity
from rlprm.core.metrics import Max, Mean, Sum
from rlprm.core.progress import progress, success_of_best, tried_steps
from rlprm.core.steps import place_at_step_ends
from rlprm.engine.combine import Measured
from rlprm.errors import ConfigError
from rlprm.records import JaggedShard, Stream
from rlprm.roles import Prompt, Request, Rollout
from rlprm.sources.base import OWN, ProcessSource, Scorable, Scores, SourceContext

AT_START = -1  # the prefix that ends before the first step: the prompt alone


@dataclass(frozen=True, slots=True)
class Prefix:
    """The beginning of row ``row`` that ends with step ``step``: what the prover continues."""

    row: int  # of this rank's shard
    number: int  # of the row in the batch: the same on any number of ranks
    step: int
    prompt: Prompt
    tokens: tuple[int, ...]  # of the response
    logprobs: tuple[float, ...]


class Prover(ProcessSource):
    """``A_h = Q_h - Q_{h-1}`` at the last token of step h, absent where either Q is.

    ``Q_h`` for h < H: ``samples`` continuations of the prefix that ends with step h, sampled at the run's temperature up
    to its length limit, are graded together with the prefix by the run's verifier;
    :func:`rlprm.core.progress.success_of_best` of their outcomes. ``Q_H`` is the response's own outcome: nothing is left
    to sample. Continuations without a verdict are absent, never failures. Rewards of a response sum to its outcome
    minus ``Q_0``.

    The prover is ``model`` on an engine of its own, or the policy where ``model`` is null. The policy's own success
    (``best_of`` 1) adds nothing to the outcome's gradient, so the policy must be a best-of-K one, K >= 2; the paper
    finds K = 4 good. A prover that is far too strong finds every prefix hopeful and pays nothing.

    ``start``: ``sampled``: Q_0 from continuations of the bare prompt, once per group; ``group``: from the outcomes of
    the responses in the group, the row's own one among them (so it depends on the row a little), at no cost, and only
    where the policy is the prover. The paper trains a verifier on such estimates; here they are used as they are.

    Costs ``samples`` responses per tried step; they are counted in ``prover/rollouts`` and, as they are rollouts too, in
    ``training/rollouts_total``.
    """

    reads_text = True  # for the prompts that the verifier wants
    engine = "rollout"
    pays_steps = True

    def __init__(
        self,
        context: SourceContext,
        *,
        samples: int,
        best_of: int,
        start: Literal["sampled", "group"],
        at_most: int | None,
    ) -> None:
        assert context.engines is not None
        assert context.grader is not None
        self.name = context.name
        self._engines, self._grader = context.engines, context.grader
        self._seed, self._temperature, self._limit = context.seed, context.temperature, context.max_response_tokens
        self._samples, self._best_of = samples, best_of
        self._start = start
        self._at_most = at_most

    @classmethod
    def check(cls, *, model: str | None, learner: bool, **settings: Any) -> None:
        """Refuse a prover that could pay nothing, or nothing unbiased.

        Raises:
            ConfigError: the policy as prover with ``best_of`` 1; fewer samples than ``best_of``; a start from the group
                with another prover than the policy; a learner; a number below 1.
        """
        samples, best_of, start = settings["samples"], settings["best_of"], settings["start"]
        if learner:
            raise ConfigError("a prover does not learn; set learner to null")
        if best_of < 1 or samples < best_of:
            raise ConfigError(
                f"samples is {samples} and best_of {best_of}; expected 1 <= best_of <= samples, because the chance that "
                "the best of K succeeds has no unbiased estimate from fewer than K samples"
            )
        if model is None and best_of == 1:
            raise ConfigError(
                "the prover is the policy itself with best_of 1, which adds nothing: the gradient is that of the outcome "
                "alone; set best_of to 2 or more (the paper: 4), or model to another model's folder"
            )
        if model is not None and start == "group":
            raise ConfigError(
                "start is 'group', the success of the policy's own responses, but model names another prover, whose "
                "success at the prompt they do not tell; set start to 'sampled'"
            )
        tried_steps(1, settings["at_most"])

    @classmethod
    def granularity(cls, **settings: Any) -> Granularity:
        return "step"

    def score(self, given: Scorable) -> Scores:
        """Progress of every row that trains; its quality is not measured, because its sum is the outcome by definition.

        Raises:
            ConfigError: ``start`` is ``group`` and a group is smaller than ``best_of``.
        """
        began = time.monotonic()
        prefixes = self._prefixes(given)
        continued = self._engines.sample([self._request(given.step, prefix) for prefix in prefixes]) if prefixes else []
        finished = [
            [whole(prefix, rollout) for rollout in rollouts]
            for prefix, rollouts in zip(prefixes, continued, strict=True)
        ]
        outcomes = self._grader.outcomes(finished) if finished else []
        success = {
            (prefix.row, prefix.step): success_of_best([each for each in graded if each is not None], self._best_of)
            for prefix, graded in zip(prefixes, outcomes, strict=True)
        }
        verdicts = torch.tensor([each is None for graded in outcomes for each in graded], dtype=torch.float64)
        metrics = Measured(
            partial={
                "prover/rollouts": Sum(float(len(verdicts))),
                "prover/tokens": Sum(float(sum(len(each.tokens) for rollouts in continued for each in rollouts))),
                "prover/frac_absent": Mean.of(verdicts),
                "prover/seconds": Max(time.monotonic() - began),
            },
            agreed={},
        )
        return Scores(streams={OWN: self._stream(given, success)}, measurement=None, metrics=metrics)

    def _prefixes(self, given: Scorable) -> list[Prefix]:
        assert given.texts is not None
        shard = given.shard
        first = first_of_groups(shard) if self._start == "sampled" else set()
        found = []
        for row, (begin, size) in enumerate(spans(shard)):
            if not bool(shard.train[row]):
                continue
            steps = shard.step_index[begin : begin + size]
            tried = tried_steps(int(steps.max()) + 1 if size else 0, self._at_most)
            for step in [AT_START] * (row in first) + tried[:-1]:
                end = begin + int((steps <= step).sum())  # steps never decrease within a response
                found.append(
                    Prefix(
                        row,
                        int(shard.row[row]),
                        step,
                        given.texts[row].prompt,
                        tuple(shard.tokens[begin:end].tolist()),
                        tuple(shard.rollout_logprobs[begin:end].tolist()),
                    )
                )
        return found

    def _request(self, step: int, prefix: Prefix) -> Request:
        prompt = replace(
            prefix.prompt,
            id=f"{prefix.prompt.id}+{prefix.number}.{prefix.step}",
            tokens=(*prefix.prompt.tokens, *prefix.tokens),
        )
        return Request(
            prompt=prompt,
            seeds=tuple(
                continuation_seed(self._seed, self.name, step, prefix.prompt.id, prefix.number, prefix.step, sample)
                for sample in range(self._samples)
            ),
            temperature=self._temperature,
            max_tokens=self._limit - len(prefix.tokens),
        )

    def _stream(self, given: Scorable, success: dict[tuple[int, int], float | None]) -> Stream:
        shard, padded = given.shard, given.padded
        most = int(shard.step_index.max()) + 1 if len(shard.step_index) else 0
        values = torch.zeros(len(shard), most, dtype=torch.float64)
        there = torch.zeros(len(shard), most, dtype=torch.bool)
        starts = self._starts(shard, success)
        for row, (begin, size) in enumerate(spans(shard)):
            if not bool(shard.train[row]) or not size:
                continue
            tried = tried_steps(int(shard.step_index[begin : begin + size].max()) + 1, self._at_most)
            own = float(shard.outcome[row]) if bool(shard.outcome_present[row]) else None
            for step, gain in zip(
                tried, progress([starts[row], *(success[row, step] for step in tried[:-1]), own]), strict=True
            ):
                if gain is not None:
                    values[row, step] = gain
                    there[row, step] = True
        rewards, present = place_at_step_ends(values, there, padded.step_index)
        return Stream(rewards=rewards.float(), present=present)

    def _starts(self, shard: JaggedShard, success: dict[tuple[int, int], float | None]) -> list[float | None]:
        """``Q_0`` of each row."""
        groups = shard.group.tolist()
        if self._start == "sampled":
            by_group = {groups[row]: value for (row, step), value in success.items() if step == AT_START}
            return [by_group.get(group) for group in groups]
        smallest = min((groups.count(group) for group in groups), default=self._best_of)
        if smallest < self._best_of:
            raise ConfigError(
                f"start is 'group' and a prompt has {smallest} responses, fewer than best_of {self._best_of}; raise "
                "responses_per_prompt, or set start to 'sampled'"
            )
        return [success_of_best(known_outcomes(shard, group), self._best_of) for group in groups]


def continuation_seed(seed: int, *parts: object) -> int:
    """A 48-bit seed that depends on every part; other parts than those of training rollouts, so they never meet.

    >>> continuation_seed(0, "process", 1, "a/0", 0, 2, 0) != continuation_seed(0, "process", 1, "a/0", 0, 2, 1)
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(("prover", seed, *parts)).encode(), digest_size=6).digest(), "big")


def whole(prefix: Prefix, continuation: Rollout) -> Rollout:
    """The response that the verifier judges: prefix and continuation to the row's own prompt."""
    return replace(
        continuation,
        prompt=prefix.prompt,
        tokens=(*prefix.tokens, *continuation.tokens),
        logprobs=(*prefix.logprobs, *continuation.logprobs),
    )


def spans(shard: JaggedShard) -> list[tuple[int, int]]:
    """Of each row: where its response begins on the flat tokens, and how long it is."""
    begins = shard.lengths.cumsum(0) - shard.lengths + shard.prompt_lengths
    return list(zip(begins.tolist(), (shard.lengths - shard.prompt_lengths).tolist(), strict=True))


def first_of_groups(shard: JaggedShard) -> set[int]:
    """The first row of each group."""
    first: dict[int, int] = {}
    for row, group in enumerate(shard.group.tolist()):
        first.setdefault(group, row)
    return set(first.values())


def known_outcomes(shard: JaggedShard, group: int) -> Sequence[float]:
    """The outcomes of a group's responses that have one."""
    chosen: Tensor = (shard.group == group) & shard.outcome_present
    return shard.outcome[chosen].tolist()
