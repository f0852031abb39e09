"""The judge: decodes rollouts, asks the verifier, splits steps, and lays accepted groups out in shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rlprm.actors.engines import gone
from rlprm.actors.group import answer, settle
from rlprm.batch import Batch, Row, balance, jagged
from rlprm.core.alarms import copies, repetition
from rlprm.core.steps import step_indices
from rlprm.errors import ConfigError, VerifierError
from rlprm.records import JaggedShard
from rlprm.roles import Prompt, Rollout, RowText, Verdict, Verified

PROBES = 4  # prompts of the last groups on which answers that say nothing are tried


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedGroup:
    """All responses to one prompt with their verdicts, and the step of each response token."""

    verified: tuple[Verified, ...]
    steps: tuple[tuple[int, ...], ...]
    texts: tuple[RowText, ...]
    greedy: Verified | None = None  # the greedy response to the same prompt, where one was sampled as a baseline


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What the driver keeps of a judged group: a row per response, and where the tokens are."""

    index: int  # position of its prompt among the prompts that were asked
    keep: bool
    rows: tuple[Row, ...]
    reference: Any
    greedy: tuple[Verdict, ...] = ()  # of the greedy response, if there is one: counted, and in no batch


class Judge:
    """The work of one judge process; no Ray, so it can be used and tested alone."""

    def __init__(self, *, tokenizer: Any, pool: Any, splitter: Callable[[Sequence[str]], list[int]], keep: Any) -> None:
        self._tokenizer = tokenizer
        self._pool = pool
        self._splitter = splitter
        self._keep = keep
        self._asked: deque[Prompt] = deque(maxlen=PROBES)

    def judge(self, rollouts: Sequence[Rollout]) -> JudgedGroup:
        """Verdicts of one group; verifier processes work on its responses at the same time."""
        everything = self._verified(rollouts)
        verified = tuple(item for item in everything if not item.rollout.greedy)
        steps = tuple(tuple(step_indices(self._pieces(item.rollout.tokens), self._splitter)) for item in verified)
        read = tuple(
            RowText(
                prompt=item.rollout.prompt, response=item.text, steps=self._step_texts(item.rollout.tokens, indices)
            )
            for item, indices in zip(verified, steps, strict=True)
        )
        greedy = next((item for item in everything if item.rollout.greedy), None)
        return JudgedGroup(verified=verified, steps=steps, texts=read, greedy=greedy)

    def _verified(self, rollouts: Sequence[Rollout]) -> tuple[Verified, ...]:
        texts = [self._tokenizer.decode(list(rollout.tokens), skip_special_tokens=True) for rollout in rollouts]
        self._asked += dict.fromkeys(rollout.prompt for rollout in rollouts)
        futures = [
            self._pool.submit(rollout.prompt.gold, text, rollout.prompt.text)
            for rollout, text in zip(rollouts, texts, strict=True)
        ]
        return tuple(
            Verified(rollout=rollout, text=text, verdict=future.result())
            for rollout, text, future in zip(rollouts, texts, futures, strict=True)
        )

    def outcomes(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Verdicts alone, for whoever tries continuations."""
        return [item.verdict.outcome for item in self.judge(rollouts).verified]

    def canaries(self) -> list[str]:
        """What the verifier gets wrong now, in words: its own canaries, and answers that say nothing paid on real prompts.

        An empty answer and the prompt itself must not be right, whatever the gold answer is: rewards that were gamed
        have paid for both.
        """
        from rlprm.verify.pool import failed_canaries

        tries = [(prompt, what, text) for prompt in self._asked for what, text in empty_answers(prompt)]
        verdicts = self._pool.judge_many([(prompt.gold, text, prompt.text) for prompt, _, text in tries])
        paid = [
            f"the verifier paid {verdict.outcome:g} for {what} to {prompt.id} ({verdict.reason})"
            for (prompt, what, _), verdict in zip(tries, verdicts, strict=True)
            if verdict.outcome is not None and verdict.outcome > 0.5
        ]
        return [*paid, *failed_canaries(self._pool)]

    def keeps(self, group: JudgedGroup) -> bool:
        return bool(self._keep(group.verified))

    def _step_texts(self, tokens: Sequence[int], indices: Sequence[int]) -> tuple[str, ...]:
        members: list[list[int]] = [[] for _ in range(1 + max(indices, default=-1))]
        for token, index in zip(tokens, indices, strict=True):
            if index >= 0:
                members[index].append(token)
        return tuple(self._tokenizer.decode(each, skip_special_tokens=True) for each in members)

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        return [self._tokenizer.decode([token], skip_special_tokens=True) for token in tokens]

    def close(self) -> None:
        self._pool.close()


class JudgeActor:
    """A process of the role `judge`."""

    def __init__(self, factory: Callable[[], Judge], log_file: str) -> None:
        settle(log_file)
        self._judge = factory()

    def ready(self) -> bool:
        return True

    def judge(
        self, index: int, rollouts: list[Rollout]
    ) -> tuple[JudgedGroup, tuple[int, bool, tuple[Row, ...], tuple[Verdict, ...]]]:
        group = self._judge.judge(rollouts)
        baseline = () if group.greedy is None else (group.greedy.verdict,)
        return group, (index, self._judge.keeps(group), rows_of(group), baseline)

    def outcomes(self, rollouts: list[Rollout]) -> list[float | None]:
        return self._judge.outcomes(rollouts)

    def canaries(self) -> list[str]:
        return self._judge.canaries()

    def collate(
        self, references: list[Any], plan: list[tuple[int, bool, bool, tuple[int, ...]]]
    ) -> tuple[JaggedShard, tuple[RowText, ...]]:
        groups = ray.get(references)
        return lay_out(groups, plan), tuple(text for group in groups for text in group.texts)

    def close(self) -> None:
        self._judge.close()


def empty_answers(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """Answers that say nothing, with their names."""
    return ("an empty answer", ""), ("its own prompt as the answer", prompt.text)


def rows_of(group: JudgedGroup) -> tuple[Row, ...]:
    """The driver's row for each response; group number and flags are set when the group is accepted."""
    return tuple(
        Row(
            group=0,
            prompt_id=item.rollout.prompt.id,
            source=item.rollout.prompt.source,
            sample=item.rollout.sample,
            outcome=item.verdict.outcome,
            reason=item.verdict.reason,
            finish=item.rollout.finish,
            prompt_length=len(item.rollout.prompt.tokens),
            response_length=len(item.rollout.tokens),
            num_steps=1 + max(steps, default=-1),
            version=item.rollout.version,
            repetition=repetition(item.rollout.tokens),
            copy=copy,
            fresh=False,
            train=False,
        )
        for item, steps, copy in zip(
            group.verified, group.steps, copies([item.rollout.tokens for item in group.verified]), strict=True
        )
    )


def lay_out(groups: Sequence[JudgedGroup], plan: Sequence[tuple[int, bool, bool, tuple[int, ...]]]) -> JaggedShard:
    """One shard from whole groups; ``plan`` gives group number, fresh, train and row numbers of each."""
    items = [item for group in groups for item in group.verified]
    repeated = [(number, fresh, train) for number, fresh, train, rows in plan for _ in rows]
    return jagged(
        items,
        [steps for group in groups for steps in group.steps],
        groups=[number for number, _, _ in repeated],
        rows=[row for _, _, _, rows in plan for row in rows],
        fresh=[fresh for _, fresh, _ in repeated],
        train=[train for _, _, train in repeated],
        greedy=[
            None if group.greedy is None else group.greedy.verdict.outcome for group in groups for _ in group.steps
        ],
    )


class Judges:
    """Driver's side of the judge: verdicts in prompt order, and batches."""

    def __init__(
        self,
        actors: Sequence[Any],
        *,
        num_shards: int,
        max_error_fraction: float,
        timeout_s: float,
        needs_steps: bool,
    ) -> None:
        self._actors = tuple(actors)
        self._num_shards = num_shards
        self._max_error_fraction = max_error_fraction
        self._timeout_s = timeout_s
        self._needs_steps = needs_steps  # the method pays or compares steps

    def judge(self, finished: Any, told: Callable[[], Any] | None = None) -> tuple[Group, ...]:
        """Judge groups while others are still being sampled; the answer is in prompt order, not in finish order.

        ``finished``: an iterator as :class:`rlprm.actors.sampled.Sampled`. Rollouts that were lost with their engine
        before a judge could fetch them are asked for again there. ``told`` is called as each group comes.
        """
        groups: list[Group] = []
        lost: list[int] | None = None
        while lost != []:
            pending = {}
            for count, (index, rollouts) in enumerate(finished):
                if told is not None and lost is None:
                    told()
                actor = self._actors[count % len(self._actors)]
                pending[index] = actor.judge.options(num_returns=2).remote(index, rollouts)
            judged = {index: self._judged(*references) for index, references in pending.items()}
            groups += [group for group in judged.values() if group is not None]
            lost = [index for index, group in judged.items() if group is None]
            if lost:
                finished.again(lost)
        self._absent([row for group in groups for row in (*group.rows, *group.greedy)])
        return tuple(sorted(groups, key=lambda group: group.index))

    def _judged(self, reference: Any, summary: Any) -> Group | None:
        """The judged group; None: its rollouts were lost on the way."""
        if _lost_on_the_way(summary, self._timeout_s):
            _lost_on_the_way(reference, 0.0)  # or Ray would tell the user of an error that nobody has looked at
            return None
        index, keep, rows, greedy = answer(summary, what="judge", timeout_s=self._timeout_s)
        return Group(index=index, keep=keep, rows=rows, greedy=greedy, reference=reference)

    def canaries(self) -> list[str]:
        """What the verifiers get wrong now; see :meth:`Judge.canaries`."""
        asked = [actor.canaries.remote() for actor in self._actors]
        return [words for found in answer(asked, what="canaries", timeout_s=self._timeout_s) for words in found]

    def _absent(self, rows: Sequence[Row | Verdict]) -> list[Row | Verdict]:
        """Responses without a verdict, if they are few enough to go on."""
        absent = [row for row in rows if row.outcome is None]
        if len(absent) > self._max_error_fraction * len(rows):
            raise VerifierError(
                f"{len(absent)} of {len(rows)} responses got no verdict (first reason: {absent[0].reason}); "
                f"at most a fraction {self._max_error_fraction} may (verifier.max_error_fraction)"
            )
        return absent

    def batch(self, step: int, rounds: Sequence[Sequence[Group]], *, wanted: int) -> Batch:
        """The step's batch: accepted groups in prompt order, and the first round's others for measuring the PRM.

        Raises:
            VerifierError: more verdicts are absent than ``max_error_fraction`` allows.
            ConfigError: the step splitter found no step in any response.
        """
        everything = [group for groups in rounds for group in groups]
        accepted = [group for group in everything if group.keep][:wanted]
        first = {id(group) for group in rounds[0]}
        used = accepted + [group for group in rounds[0] if not any(group is other for other in accepted)]
        rows: list[Row] = []
        plans = []
        for number, group in enumerate(used):
            fresh, train = id(group) in first, number < len(accepted)
            numbers = tuple(range(len(rows), len(rows) + len(group.rows)))
            rows += [replace(row, group=number, fresh=fresh, train=train) for row in group.rows]
            plans.append((number, fresh, train, numbers))
        counts = self._counts(everything, accepted, len(rounds))
        sizes = [sum(row.prompt_length + row.response_length for row in group.rows) for group in used]
        shards = balance(sizes, self._num_shards)
        references = [
            self._actors[index % len(self._actors)]
            .collate.options(num_returns=2)
            .remote([used[group].reference for group in shard], [plans[group] for group in shard])
            for index, shard in enumerate(shards)
        ]
        return Batch(
            step=step,
            rows=tuple(rows),
            shards=tuple(shard for shard, _ in references),
            texts=tuple(texts for _, texts in references),
            members=tuple(tuple(row for group in shard for row in plans[group][3]) for shard in shards),
            selected=tuple(row.train for row in rows),
            counts=counts,
        )

    def _counts(self, everything: Sequence[Group], accepted: Sequence[Group], rounds: int) -> dict[str, float]:
        rows = [row for group in everything for row in group.rows]
        judged = [*rows, *(row for group in everything for row in group.greedy)]
        absent = self._absent(judged)
        if rows and all(row.num_steps == 0 for row in rows):
            raise ConfigError("every response is empty: the policy stops at once; check the template and the model")
        if self._needs_steps and len(rows) > 1 and all(row.num_steps == 1 for row in rows):
            raise ConfigError(
                f"the step splitter found no second step in any of {len(rows)} responses, and the method works with "
                "steps; choose a splitter that fits the responses (splitter=newline, blank_line, numbered, fixed)"
            )
        kept = sum(group.keep for group in everything)
        return {
            "keep/rounds": float(rounds),
            "keep/prompts_sampled": float(len(everything)),
            "keep/prompts_kept": float(len(accepted)),
            "keep/prompts_surplus": float(kept - len(accepted)),
            "keep/frac_kept": kept / len(everything),
            "keep/rollouts_sampled": float(len(judged)),
            **dropped([group.rows for group in everything if not group.keep]),
            "verifier/frac_absent": len(absent) / len(judged),
            "verifier/failures": float(sum("timeout" not in row.reason for row in absent)),
            "verifier/timeouts": float(sum("timeout" in row.reason for row in absent)),
        }


def _lost_on_the_way(reference: Any, timeout_s: float) -> bool:
    """Has a judge that lives not got its argument? One that died itself raises no RayTaskError."""
    ray.wait([reference], timeout=timeout_s)
    try:
        ray.get(reference, timeout=0.0)
    except RayTaskError as error:
        return gone(error)
    except RayError:
        return False  # said in words by whoever waits for the answer
    return False


def dropped(groups: Sequence[Sequence[Row]]) -> dict[str, float]:
    """Why prompts were not kept: their responses were mostly wrong, mostly right, or got no verdict at all."""
    judged = [[row.outcome for row in rows if row.outcome is not None] for rows in groups]
    means = [sum(outcomes) / len(outcomes) for outcomes in judged if outcomes]
    return {
        "keep/dropped_low": float(sum(mean < 0.5 for mean in means)),
        "keep/dropped_high": float(sum(mean >= 0.5 for mean in means)),
        "keep/dropped_unjudged": float(len(groups) - len(means)),
    }
