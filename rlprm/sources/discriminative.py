"""A discriminative PRM as a process source: one number for each step, from one pass over the whole solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlprm.batch import unflatten
from rlprm.core.implicit import Granularity
from rlprm.core.metrics import Mean
from rlprm.core.steps import num_steps, place_at_step_ends, step_counts
from rlprm.engine.combine import Measured
from rlprm.engine.prm_head import load_prm
from rlprm.errors import AlignmentError, ConfigError
from rlprm.records import Shard, Stream
from rlprm.roles import RowText
from rlprm.sources.base import OWN, ProcessSource, Scorable, Scores, SourceContext
from rlprm.sources.measure import measure
from rlprm.sources.prm_formats import Format, Reading

Range = Literal["probability", "plus_minus"]


class DiscriminativePrm(ProcessSource):
    """``r_h = p(step h is right | question, steps 1..h)`` at step h's last token; or ``2 p - 1`` for range plus_minus.

    ``2 p - 1`` is PURE's ``softmax[1] - softmax[0]`` (arXiv:2504.15275). The PRM reads text with its own tokenizer in its
    own format, all steps of a response in one pass; it is causal (checked once at the start), so a number never knows the
    steps behind it. Differs from the released RL code of ReasonFlux-PRM and Fin-PRM, which feed a whole response as one
    step and pay one number at the last token.

    Not present, and counted: steps behind the PRM's length limit, and responses that hold control tokens of the PRM,
    which could write verdicts of their own. Its quality is measured on present steps alone; a response's number is their
    mean, because a sum would pay for length. The PRM never learns here.
    """

    reads_text = True
    reads_reference = True  # surprisal, which a PRM's quality is shown beside
    pays_steps = True
    measures = True
    own_tokens = True

    def __init__(
        self,
        context: SourceContext,
        *,
        format: Callable[[Any], Format],
        range: Range,
        max_tokens: int | None,
    ) -> None:
        assert context.model is not None
        self.name = context.name
        self._format = format(context.tokenizer)
        self._range = range
        self._prm = load_prm(
            context.model,
            context.dtype,
            attention=context.attention,
            head=self._format.head,
            candidates=self._format.candidates,
            token_budget=context.token_budget,
            layout=context.layout,
            device=context.device,
        )
        self._max_tokens = _limit(self._prm.max_tokens, max_tokens, context.model)
        self._check_causal(context.model)

    @classmethod
    def check(cls, *, model: str | None, learner: bool, **settings: Any) -> None:
        """Raises:
        ConfigError: no model, a learner (a frozen PRM has none), or a limit that holds no step.
        """
        if model is None:
            raise ConfigError("a discriminative PRM needs a model; give the folder of one (`rlprm prm` trains one)")
        if learner:
            raise ConfigError("a discriminative PRM does not learn during training; set learner to null")
        limit = settings["max_tokens"]
        if limit is not None and limit < 2:
            raise ConfigError(f"max_tokens is {limit}; expected at least 2, a prompt and a step, or null")

    @classmethod
    def granularity(cls, **settings: Any) -> Granularity:
        return "step"

    def score(self, given: Scorable) -> Scores:
        """The number of every step that the PRM could read, and how good the numbers are.

        Raises:
            AlignmentError: no texts, no reference, or texts of another number of steps than the tokens have.
        """
        padded = given.padded
        texts = _required(given.texts, "the texts of responses")
        readings = [self._format.read(text.prompt.question, text.steps) for text in texts]
        _check_steps(padded, texts)
        numbers, present = self._numbers(readings, num_steps(padded.step_index))
        rewards, there = place_at_step_ends(numbers, present, padded.step_index)
        ref = unflatten(_required(given.ref, "log-probs of the reference"), given.shard.lengths)
        steps = sum(len(reading.positions) for reading in readings)
        cut = sum(self._cut(reading) for reading in readings if not reading.forged)
        return Scores(
            streams={OWN: Stream(rewards=rewards, present=there)},
            measurement=measure(given.shard, rewards, there, ref, pooling="mean", scale=self._range),
            metrics=Measured(
                partial={
                    "prm/frac_steps_cut": Mean(float(cut), float(steps)),
                    "prm/frac_forged": Mean(float(sum(r.forged for r in readings)), float(len(readings))),
                },
                agreed={},
            ),
        )

    def _numbers(self, readings: Sequence[Reading], width: int) -> tuple[Tensor, Tensor]:
        """``[B, S]``: the number of each step, and where there is one."""
        wanted = [() if reading.forged else self._readable(reading) for reading in readings]
        sequences = [
            reading.tokens[: places[-1] + 1] if places else reading.tokens[:1]
            for reading, places in zip(readings, wanted, strict=True)
        ]
        numbers = torch.zeros(len(readings), width)
        present = torch.zeros(len(readings), width, dtype=torch.bool)
        for row, found in enumerate(self._prm.probabilities(sequences, wanted)):
            numbers[row, : len(found)] = found if self._range == "probability" else 2 * found - 1
            present[row, : len(found)] = True
        return numbers, present

    def _readable(self, reading: Reading) -> tuple[int, ...]:
        limit = self._max_tokens
        return reading.positions if limit is None else tuple(place for place in reading.positions if place < limit)

    def _cut(self, reading: Reading) -> int:
        return len(reading.positions) - len(self._readable(reading))

    def _check_causal(self, path: str) -> None:
        """A step's number must not change with the step behind it: neither by the format nor by the model."""
        short, long = (self._format.read("1 + 1", steps) for steps in (("2",), ("2", "3")))
        if short.tokens[: short.positions[0] + 1] != long.tokens[: long.positions[0] + 1]:
            raise ConfigError(
                f"the PRM {path!r} reads the first step differently when a second one follows, in this format; choose the "
                "format that the model was trained with (prm_format@...=...)"
            )
        first, both = self._prm.probabilities([short.tokens, long.tokens], [short.positions[:1], long.positions[:1]])
        if not torch.allclose(first, both, atol=1e-2):  # bf16 and other kernels move the last digits, sight moves more
            raise ConfigError(
                f"the PRM {path!r} is not causal: the first step's number is {float(first):.3f} alone and {float(both):.3f} "
                "before a second step; use a decoder"
            )


def _limit(own: int | None, given: int | None, path: str) -> int | None:
    if given is not None and own is not None and given > own:
        raise ConfigError(
            f"max_tokens is {given} and the PRM {path!r} reads at most {own} tokens; lower it, or set null"
        )
    return own if given is None else given


def _required(value: Any, what: str) -> Any:
    if value is None:
        raise AlignmentError(f"the discriminative PRM needs {what} and got none")
    return value


def _check_steps(shard: Shard, texts: Sequence[RowText]) -> None:
    for row, (count, text) in enumerate(zip(step_counts(shard.step_index).tolist(), texts, strict=True)):
        if count != len(text.steps):
            raise AlignmentError(
                f"row {row} ({text.prompt.id}) has {count} steps by its tokens and {len(text.steps)} by its text; both "
                "come from the splitter and must be equal"
            )
