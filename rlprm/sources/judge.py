"""The generative judge: a language model reads a response, criticises it, and its verdicts become rewards."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlprm.core.implicit import Granularity
from rlprm.core.metrics import Max, Mean, Sum
from rlprm.core.steps import num_steps, place_at_step_ends, spread_over_step, step_ends
from rlprm.engine.combine import Measured
from rlprm.errors import AlignmentError, ConfigError, VerifierError
from rlprm.parts import made
from rlprm.records import Shard, Stream
from rlprm.roles import RowText
from rlprm.sources.base import OWN, ProcessSource, Scorable, Scores, SourceContext
from rlprm.sources.judge_clients import Asked
from rlprm.sources.judge_endpoint import Endpoint
from rlprm.sources.judge_engines import OwnEngines
from rlprm.sources.judge_prompts import JudgePrompt, Reply
from rlprm.sources.judge_votes import COUNTING, Rule, Vote, disagreement, merged

SEED_BYTES = 6

Pays = Literal["step", "verdict", "fraction"]
Where = Literal["step_end", "step_tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What all votes together say of one response, each value in [0, 1]; None: nobody said."""

    steps: tuple[float | None, ...]
    verdict: float | None
    spread: tuple[float, ...]  # disagreement of each entry with two votes or more

    @property
    def fraction(self) -> float | None:
        """Mean over the steps; None unless all of them were judged (k/n, where verdicts are right or wrong)."""
        known = [step for step in self.steps if step is not None]
        return sum(known) / len(known) if known and len(known) == len(self.steps) else None

    @property
    def absent(self) -> bool:
        """Not one vote was left."""
        return self.verdict is None and all(step is None for step in self.steps)


class GenerativeJudge(ProcessSource):
    """``votes`` independent readings of each response, each a ``judgement`` of one kind, made one by ``rule``.

    A judged value ``p`` in [0, 1] (a verdict, ``s / s_max``, a probability) of a step is worth
    ``wrong + (right - wrong) p``, at the step's last token or on each of its tokens (``where``). Its own stream is what
    it ``pays``: step (those rewards), verdict (p of the whole response) or fraction (mean p of its steps), the last two
    at the response's last token; both are outputs beside it, too.

    A reply that cannot be read, speaks of another number of steps, was cut or never came is no vote; where no vote is
    left there is no reward: absent, never 0, and counted. Only responses that train are judged. Its quality is not
    measured by the ``prm/`` family, so it earns no trust; where the verifier labels steps, ``judge/*/label_agreement``
    says how often the judge is right.
    """

    reads_text = True
    engine = "own"
    own_tokens = True
    outputs = ("verdict", "fraction")

    def __init__(
        self,
        context: SourceContext,
        *,
        judgement: JudgePrompt,
        client: Endpoint | OwnEngines,
        votes: int,
        rule: Rule,
        pays: Pays,
        where: Where,
        right: float,
        wrong: float,
        temperature: float,
        max_tokens: int,
        max_absent: float,
    ) -> None:
        self.name = context.name
        self._seed = context.seed
        self._reduce = context.reduce
        self._prompt = judgement
        self._client = client.connect(context)
        self._votes = votes
        self._rule = rule
        self._pays = pays
        self._where = where
        self._right, self._wrong = right, wrong
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._max_absent = max_absent

    @classmethod
    def check(cls, *, model: str | None, learner: bool, **settings: Any) -> None:
        """Refuse a judge that nobody is, and settings that contradict each other.

        Raises:
            ConfigError: with the setting and what to change.
        """
        prompt, rule, votes = made(settings["judgement"]), settings["rule"], settings["votes"]
        if learner:
            raise ConfigError("a generative judge does not learn; set learner to null")
        made(settings["client"]).check(model)
        if votes < 1 or (rule == "single") != (votes == 1):
            raise ConfigError(
                f"votes is {votes} with rule {rule}; expected rule single with one vote, another rule with more"
            )
        if votes > 1 and settings["temperature"] == 0:
            raise ConfigError(
                f"{votes} votes at temperature 0 are {votes} times the same; raise temperature, or set votes to 1"
            )
        if rule in COUNTING and not prompt.yes_or_no:
            raise ConfigError(
                f"rule {rule} counts verdicts right or wrong, and {type(prompt).__name__} gives numbers; set rule to average, or "
                "to single with one vote"
            )
        if settings["pays"] != "verdict" and prompt.judges == "response":
            raise ConfigError(
                f"pays is {settings['pays']}, and {type(prompt).__name__} speaks of the whole response only; set pays to verdict"
            )
        if not 0 <= settings["max_absent"] <= 1 or settings["temperature"] < 0 or settings["max_tokens"] < 1:
            raise ConfigError(
                f"max_absent {settings['max_absent']}, temperature {settings['temperature']}, max_tokens "
                f"{settings['max_tokens']}; expected a fraction from 0 to 1, 0 or more, and 1 or more"
            )

    @classmethod
    def granularity(cls, **settings: Any) -> Granularity:
        if settings["pays"] != "step":
            return "whole"
        return "step" if settings["where"] == "step_end" else "token"

    @classmethod
    def engine_tokens(cls, *, prompt: int, response: int, **settings: Any) -> int:
        # one more, because scored tokens must be fewer than an engine's most
        return settings["client"]["max_prompt_tokens"] + settings["max_tokens"] + 1

    def score(self, given: Scorable) -> Scores:
        """Verdicts on every row that trains.

        Raises:
            VerifierError: more rows are without any vote, over all ranks, than ``max_absent`` allows.
        """
        began = time.monotonic()
        assert given.texts is not None, "a judge reads texts"
        shard = given.padded
        rows = [row for row in shard.train.nonzero().flatten().tolist() if given.texts[row].steps]
        _check_steps(shard, given.texts, rows)
        votes, counts = self._ask(given.texts, rows, [int(shard.row[row]) for row in rows], given.step)
        judged = {row: _together(given.texts[row], votes[row], self._rule) for row in rows}
        self._require_votes(judged)
        measured = {
            **counts,
            f"judge/{self.name}/frac_absent": Mean(
                float(sum(each.absent for each in judged.values())), float(len(judged))
            ),
            f"judge/{self.name}/disagreement": _mean([value for each in judged.values() for value in each.spread]),
            f"judge/{self.name}/label_agreement": _mean(list(_agreements(judged, shard))),
            f"judge/{self.name}/seconds": Max(time.monotonic() - began),
        }
        return Scores(
            streams=self._streams(judged, shard),
            measurement=None,
            metrics=Measured(partial=measured, agreed={}),
        )

    def close(self) -> None:
        self._client.close()

    def _ask(
        self, texts: Sequence[RowText], rows: Sequence[int], numbers: Sequence[int], step: int
    ) -> tuple[dict[int, list[Vote]], dict[str, Sum | Mean]]:
        """The votes on each row, and how many replies came and could be read."""
        questions = {row: self._prompt.questions(texts[row], self._seed) for row in rows}
        asked = [
            Asked(
                question=question,
                seeds=tuple(_seed(self._seed, step, number, part, vote) for vote in range(self._votes)),
                temperature=self._temperature,
                max_tokens=self._max_tokens,
            )
            for row, number in zip(rows, numbers, strict=True)
            for part, question in enumerate(questions[row])
        ]
        replies = iter(self._client.replies(asked))
        votes: dict[int, list[Vote]] = {}
        calls = received = read = 0
        for row in rows:
            each: list[list[Reply | None]] = [next(replies) for _ in questions[row]]
            votes[row] = []
            for vote in range(self._votes):
                said = [replies_to_one[vote] for replies_to_one in each]
                found = self._prompt.vote(texts[row], questions[row], said)
                votes[row] += [] if found is None else [found]
                calls += len(said)
                received += sum(reply is not None for reply in said)
                read += _read(found, len(said))
        return votes, {
            f"judge/{self.name}/calls": Sum(float(calls)),
            f"judge/{self.name}/frac_failed": Mean(float(calls - received), float(calls)),
            f"judge/{self.name}/frac_unparsed": Mean(float(received - read), float(received)),
        }

    def _require_votes(self, judged: Mapping[int, Judged]) -> None:
        counted = torch.tensor([sum(each.absent for each in judged.values()), len(judged)], dtype=torch.float64)
        absent, rows = self._reduce.sum(counted).tolist()
        if absent > self._max_absent * rows:
            raise VerifierError(
                f"the judge of stream {self.name!r} gave no vote on {absent:.0f} of {rows:.0f} responses; at most a fraction "
                f"{self._max_absent} may be without (max_absent). See judge/{self.name}/frac_failed and frac_unparsed: is it "
                "running, and does it end its replies as the prompt asks?"
            )

    def _streams(self, judged: Mapping[int, Judged], shard: Shard) -> dict[str, Stream]:
        size = len(shard)
        outputs = {
            "verdict": _at_end({row: each.verdict for row, each in judged.items()}, shard),
            "fraction": _at_end({row: each.fraction for row, each in judged.items()}, shard),
        }
        if self._pays != "step":
            return {OWN: outputs[self._pays], **outputs}
        values = torch.zeros(size, num_steps(shard.step_index))
        present = torch.zeros(values.shape, dtype=torch.bool)
        for row, each in judged.items():
            for step, value in enumerate(each.steps):
                if value is not None:
                    values[row, step] = self._wrong + (self._right - self._wrong) * value
                    present[row, step] = True
        place = place_at_step_ends if self._where == "step_end" else _on_step_tokens
        rewards, there = place(values, present, shard.step_index)
        return {OWN: Stream(rewards=rewards, present=there), **outputs}


def _together(row: RowText, votes: Sequence[Vote], rule: Rule) -> Judged:
    """What the votes on one response say together, entry by entry."""
    steps = [
        [vote.steps[step] for vote in votes if vote.steps and vote.steps[step] is not None]
        for step in range(len(row.steps))
    ]
    verdicts = [vote.verdict for vote in votes if vote.verdict is not None]
    spread = [disagreement(each) for each in (*steps, verdicts)]
    return Judged(
        steps=tuple(merged(each, rule) for each in steps),
        verdict=merged(verdicts, rule),
        spread=tuple(each for each in spread if each is not None),
    )


def _on_step_tokens(
    values: Float[Tensor, "B S"], present: Bool[Tensor, "B S"], step_index: Tensor
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Step h's value on every token of step h."""
    there = (spread_over_step(present.double(), step_index) > 0) & (step_index >= 0)
    rewards = spread_over_step(values, step_index)
    return torch.where(there, rewards, torch.zeros_like(rewards)), there


def _at_end(values: Mapping[int, float | None], shard: Shard) -> Stream:
    """One value a response at its last token, which is the last token of its last step."""
    spans = torch.where(shard.response_mask, 0, -1)
    column = torch.zeros(len(shard), 1)
    present = torch.zeros(len(shard), 1, dtype=torch.bool)
    for row, value in values.items():
        if value is not None:
            column[row, 0], present[row, 0] = value, True
    there = step_ends(spans) & present
    return Stream(rewards=torch.where(there, column, torch.zeros(spans.shape)), present=there)


def _agreements(judged: Mapping[int, Judged], shard: Shard) -> Iterator[float]:
    """1 where a step that has an exact label was judged as the label says, else 0."""
    ends = step_ends(shard.step_index)
    for row, each in judged.items():
        labels = shard.step_label[row, ends[row]].tolist()
        for value, label in zip(each.steps, labels, strict=True):
            if value is not None and label >= 0:
                yield float((value >= 0.5) == (label == 1))


def _check_steps(shard: Shard, texts: Sequence[RowText], rows: Sequence[int]) -> None:
    for row in rows:
        counted = int(shard.step_index[row].max()) + 1
        if counted != len(texts[row].steps):
            raise AlignmentError(
                f"row {row} has {counted} steps by its tokens and {len(texts[row].steps)} by its texts; both must be equal"
            )


def _read(vote: Vote | None, replies: int) -> int:
    """How many of the replies behind a vote could be read: one a step, or all of them at once."""
    if vote is None:
        return 0
    return replies if replies == 1 else sum(step is not None for step in vote.steps)


def _mean(values: Sequence[float]) -> Mean:
    return Mean(float(sum(values)), float(len(values)))


def _seed(*parts: int) -> int:
    """A 48-bit seed: another for every run, step, row, part of a question and vote."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=SEED_BYTES).digest(), "big")
