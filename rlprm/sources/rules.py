"""Rules as process rewards: a check of each response, or of each step, by a verifier function in killable processes.

No model and no judge: form, code that compiles or runs, whatever a plain function can tell from the text. The functions
are verifiers (:mod:`rlprm.verify`); those for steps are given the steps' texts as a JSON list and label each of them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlprm.core.implicit import Granularity
from rlprm.core.metrics import Max, Mean
from rlprm.core.steps import num_steps, place_at_step_ends, step_ends
from rlprm.engine.combine import Measured
from rlprm.errors import AlignmentError, ConfigError
from rlprm.records import Stream
from rlprm.roles import RowText, Verdict
from rlprm.sources.base import OWN, ProcessSource, Scorable, Scores, SourceContext
from rlprm.verify.pool import VerifierPool, check_canaries


class Rule(ProcessSource):
    """What rule sources share: verifier processes of their own, with limits.

    A text on which the function fails or runs out of time earns no reward: it is absent, and counted. So a regular
    expression that backtracks for ever costs ``timeout_s`` seconds and nothing else.
    """

    reads_text = True

    def __init__(
        self,
        context: SourceContext,
        *,
        rule: Callable[..., Any],
        right: float,
        wrong: float,
        workers: int,
        timeout_s: float,
        memory_mb: int,
    ) -> None:
        self.name = context.name
        self._right, self._wrong = right, wrong
        self._pool = VerifierPool(rule, workers=workers, timeout_s=timeout_s, memory_mb=memory_mb)
        check_canaries(self._pool)

    @classmethod
    def check(cls, *, model: str | None, learner: bool, **settings: Any) -> None:
        """Refuse a model, limits that are not positive, and a pattern that does not compile.

        Raises:
            ConfigError: with the setting and what was found.
        """
        super().check(model=model, learner=learner)
        for name in ("workers", "timeout_s", "memory_mb"):
            if not settings[name] > 0:
                raise ConfigError(f"{name} is {settings[name]}; expected more than 0")
        pattern = settings["rule"].get("pattern")
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ConfigError(f"rule.pattern {pattern!r} is no regular expression: {error}; correct it") from error

    def _judged(
        self, given: Scorable, texts: Sequence[tuple[RowText, str]], began: float
    ) -> tuple[list[Verdict], Measured]:
        """A verdict per text, and what they cost."""
        verdicts = self._pool.judge_many((row.prompt.gold, text, row.prompt.text) for row, text in texts)
        absent = torch.tensor([verdict.outcome is None for verdict in verdicts], dtype=torch.float64)
        held = torch.tensor([v.outcome for v in verdicts if v.outcome is not None], dtype=torch.float64)
        return verdicts, Measured(
            partial={
                f"rule/{self.name}/frac_absent": Mean.of(absent),
                f"rule/{self.name}/frac_held": Mean.of(held),
                f"rule/{self.name}/seconds": Max(time.monotonic() - began),
            },
            agreed={},
        )

    def close(self) -> None:
        """End the verifier processes."""
        self._pool.close()


class ResponseRule(Rule):
    """``wrong + (right - wrong) * outcome`` of the rule at the response's last token; absent where it gave no outcome.

    With ``rlprm.verify.single_answer.verify`` this is SPARK's condition of exactly one answer and nothing after it.
    """

    @classmethod
    def granularity(cls, **settings: Any) -> Granularity:
        return "whole"

    def score(self, given: Scorable) -> Scores:
        """One reward a response."""
        assert given.texts is not None
        began = time.monotonic()
        verdicts, measured = self._judged(given, [(row, row.response) for row in given.texts], began)
        padded = given.padded
        outcomes = torch.tensor([0.0 if each.outcome is None else each.outcome for each in verdicts]).reshape(-1, 1)
        there = torch.tensor([each.outcome is not None for each in verdicts], dtype=torch.bool).reshape(-1, 1)
        rewards, present = place_at_step_ends(
            self._wrong + (self._right - self._wrong) * outcomes, there, torch.where(padded.response_mask, 0, -1)
        )
        return Scores(streams={OWN: Stream(rewards=rewards, present=present)}, measurement=None, metrics=measured)


class StepRule(Rule):
    """``right`` or ``wrong`` at the last token of each step that the rule labels 1 or 0; absent where it labels -1.

    A rule that cannot say anything of a step (no code in it) says -1, which is no reward, not a reward of 0.
    """

    pays_steps = True

    @classmethod
    def granularity(cls, **settings: Any) -> Granularity:
        return "step"

    def score(self, given: Scorable) -> Scores:
        """One reward a labelled step."""
        began = time.monotonic()
        labels, measured = self._labels(given, began)
        rewards, present = place_at_step_ends(self._paid(labels), labels >= 0, given.padded.step_index)
        return Scores(streams={OWN: Stream(rewards=rewards, present=present)}, measurement=None, metrics=measured)

    def _paid(self, labels: Int[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        return torch.where(labels == 1, self._right, self._wrong)

    def _labels(self, given: Scorable, began: float) -> tuple[Int[Tensor, "B S"], Measured]:
        """The rule's label of each step; -1 where it has none, or where there is no such step."""
        assert given.texts is not None
        verdicts, measured = self._judged(given, [(row, json.dumps(row.steps)) for row in given.texts], began)
        index = given.padded.step_index
        labels = torch.full((len(verdicts), num_steps(index)), -1, dtype=torch.int64)
        for row, (verdict, text) in enumerate(zip(verdicts, given.texts, strict=True)):
            if verdict.outcome is None:
                continue
            if verdict.steps is None or len(verdict.steps) != len(text.steps):
                raise ConfigError(
                    f"the rule {self._pool.verifier} gave {None if verdict.steps is None else len(verdict.steps)} labels "
                    f"for {len(text.steps)} steps; expected a rule that labels each step, such as "
                    "rlprm.verify.step_form.verify"
                )
            if len(verdict.steps) != int(index[row].max()) + 1:
                raise AlignmentError(
                    f"row {row} has {int(index[row].max()) + 1} steps and {len(text.steps)} step texts"
                )
            labels[row, : len(verdict.steps)] = torch.tensor(verdict.steps, dtype=torch.int64)
        return labels, measured


class TurnReward(StepRule):
    """Step-GRPO's reward of a turn: ``bad`` where its form is bad, else what the turn's own check says.

    The paper (arXiv:2509.22644) adds the scores that two visual judges give a web page. Where no page is rendered, the
    verifier's exact step labels stand for them here: ``right``, ``wrong``, and absent where a label is unknown. Form
    comes first: a badly formed turn is ``bad`` whatever its label.
    """

    def __init__(
        self,
        context: SourceContext,
        *,
        rule: Callable[..., Any],
        bad: float,
        right: float,
        wrong: float,
        workers: int,
        timeout_s: float,
        memory_mb: int,
    ) -> None:
        super().__init__(
            context, rule=rule, right=right, wrong=wrong, workers=workers, timeout_s=timeout_s, memory_mb=memory_mb
        )
        self._bad = bad
        self._reduce = context.reduce

    def score(self, given: Scorable) -> Scores:
        """One reward a turn.

        Raises:
            ConfigError: the run's verifier labels no step at all.
        """
        began = time.monotonic()
        padded = given.padded
        exact = _by_step(padded.step_label, padded.step_index)
        if not bool(self._reduce.max((exact >= 0).any().double())):
            raise ConfigError(
                f"stream {self.name!r} pays turns by exact step labels and the verifier gave none; use a task whose "
                "verifier checks each step (chain_arithmetic), or a step rule alone (source step_form)"
            )
        form, measured = self._labels(given, began)
        rewards = torch.where(form == 0, self._bad, self._paid(exact))
        there: Bool[Tensor, "B S"] = (form == 0) | ((form == 1) & (exact >= 0))
        placed, present = place_at_step_ends(rewards, there, padded.step_index)
        return Scores(streams={OWN: Stream(rewards=placed, present=present)}, measurement=None, metrics=measured)


def _by_step(label: Int[Tensor, "B T"], index: Int[Tensor, "B T"]) -> Int[Tensor, "B S"]:
    """The label of each step; all its tokens carry the same one. -1 where there is no such step."""
    found = torch.full((len(index), num_steps(index)), -1, dtype=torch.int64)
    rows, places = step_ends(index).nonzero(as_tuple=True)
    found[rows, index[rows, places]] = label[rows, places]
    return found
