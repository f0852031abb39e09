"""The loop.

    prompts --sample--> rollouts --judge--> groups --keep--> batch
    batch --old, reference--> log-probs --score--> streams --credit--> advantages --learn--> weights --publish--> engines

Everything between `collect` and `wait` only names work: the calls return references at once, and the ranks start as
soon as what they need exists. So the reference runs beside the old log-probs, and the PRM learns while the policy does.
The driver waits in `collect` (for verdicts), in `score` (its row table decides trust), in `wait` and in `publish`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from rlprm.batch import Batch
from rlprm.errors import NoLearningSignal


@runtime_checkable
class Clock(Protocol):
    """Names where the time of a step goes."""

    def stage(self, name: str) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The parts of a run; :mod:`rlprm.run.build` makes them from a configuration."""

    first_step: int
    last_step: int
    prompts_per_step: int
    max_rounds: int
    min_prompts: int
    prompts: Any
    rollouts: Any
    judges: Any
    policy: Any
    reference: Any
    sources: Any
    select: Any
    transfer: Any
    evaluator: Any
    recorder: Any
    checkpoints: Any
    clock: Clock


def train(run: Run) -> None:
    """Reinforcement learning from outcomes and process rewards, from the first step to the last."""
    publish(run)
    if run.first_step == 1:
        evaluate(run, 0)
    for step in range(run.first_step, run.last_step + 1):
        with run.clock.stage("step"):
            batch = collect(run, step)
            old_logprobs = run.policy.logprobs(batch)
            ref_logprobs = run.reference.logprobs(batch)
            scored = score(run, batch, old_logprobs, ref_logprobs)
            kept = select(run, batch, scored)
            credit = run.policy.credit(kept, scored, old_logprobs, ref_logprobs)
            prm_learned = run.sources.learn(batch, old_logprobs, ref_logprobs)
            policy_learned = run.policy.learn(kept, old_logprobs, ref_logprobs, credit)
            learned = wait(run, prm_learned, policy_learned)
            publish(run)
        run.recorder.record(step, kept, scored, credit, learned)
        evaluate(run, step)
        save(run, step)


def collect(run: Run, step: int) -> Batch:
    """Sample and judge until enough prompts count; bounded, and an error instead of a hang.

    Raises:
        NoLearningSignal: after ``max_rounds`` rounds fewer than ``min_prompts`` prompts were kept.
    """
    rounds: list[Any] = []
    with run.clock.stage("collect"):
        while len(rounds) < run.max_rounds and (missing := run.prompts_per_step - num_kept(rounds)) > 0:
            prompts = run.prompts.take(refill(missing, rounds, run.prompts_per_step))
            requests = run.rollouts.requests(prompts, step, len(rounds))
            rounds.append(run.judges.judge(run.rollouts.sample(requests)))
        if num_kept(rounds) < run.min_prompts:
            sampled = sum(len(groups) for groups in rounds)
            raise NoLearningSignal(
                f"kept {num_kept(rounds)} of {sampled} prompts after {len(rounds)} rounds, expected at least "
                f"{run.min_prompts}; widen the keep rule, use prompts of another difficulty, or raise keep.max_rounds"
            )
        return run.judges.batch(step, rounds, wanted=run.prompts_per_step)


def num_kept(rounds: list[Any]) -> int:
    return sum(group.keep for groups in rounds for group in groups)


def refill(missing: int, rounds: list[Any], prompts_per_step: int) -> int:
    """How many prompts to sample next: what is missing, over the share that has been kept so far."""
    sampled = sum(len(groups) for groups in rounds)
    share = max(num_kept(rounds), 1) / sampled if sampled else 1.0
    return min(math.ceil(missing / share), prompts_per_step)


def score(run: Run, batch: Batch, old_logprobs: Any, ref_logprobs: Any) -> Any:
    """Streams of every process source, and what was measured before any update."""
    with run.clock.stage("score"):
        return run.sources.score(batch, old_logprobs, ref_logprobs)


def select(run: Run, batch: Batch, scored: Any) -> Batch:
    """The batch with the rows marked that train the policy; what the PRM learns from stays the whole batch."""
    return replace(batch, selected=tuple(run.select(batch.rows, scored.rows)))


def wait(run: Run, *learned: Any) -> list[Any]:
    """Both learners' answers; they work at the same time when they sit on different devices."""
    with run.clock.stage("learn"):
        return [pending.result() for pending in learned]


def publish(run: Run) -> None:
    """Hand the policy's weights and version to every engine; each proves what it received."""
    with run.clock.stage("weight_sync"):
        run.transfer.publish(run.policy, run.rollouts)


def evaluate(run: Run, step: int) -> None:
    """Held-out accuracy, when it is due."""
    with run.clock.stage("testing"):
        run.evaluator.evaluate(step, last=step == run.last_step)


def save(run: Run, step: int) -> None:
    """Everything the next step depends on, all or nothing, when it is due."""
    with run.clock.stage("save_checkpoint"):
        run.checkpoints.save(step)
