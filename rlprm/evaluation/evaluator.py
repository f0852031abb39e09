"""Held-out evaluation sets through the same engines and the same verifier as training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlprm.actors.judge import Group
from rlprm.actors.rollout import seed_of
from rlprm.core.quality import pass_at_k
from rlprm.roles import Prompt, Request


class Evaluator:
    """Greedy and sampled accuracy of every evaluation set.

    Seeds depend on the set, the prompt and the sample, not on the training step, so two evaluations of the same weights
    agree, and differences between steps are the weights'.
    """

    def __init__(
        self,
        *,
        sets: Mapping[str, Sequence[Prompt]],
        rollouts: Any,
        judges: Any,
        every: int,
        samples: int,
        temperature: float,
        max_tokens: int,
        seed: int,
        log: Callable[[int, Mapping[str, float]], None],
        notify: Callable[[str, int], Any],
        left_out: Mapping[str, float],
    ) -> None:
        self._sets = dict(sets)
        self._rollouts = rollouts
        self._judges = judges
        self._every = every
        self._samples = samples
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._seed = seed
        self._log = log
        self._notify = notify
        self._left_out = dict(left_out)

    def evaluate(self, step: int, *, last: bool) -> None:
        """Evaluate when it is due: before the first step, every ``every`` steps and after the last."""
        if self._every == 0 or not self._sets or not (last or step % self._every == 0):
            return
        self._log(step, self.measure())

    def measure(self) -> dict[str, float]:
        """All sets, greedy and sampled."""
        metrics: dict[str, float] = {}
        for name, prompts in self._sets.items():
            first = self.judged(name, prompts, temperature=0.0, samples=1)
            metrics |= greedy(first, name)
            if self._samples > 0:
                second = self.judged(name, prompts, temperature=self._temperature, samples=self._samples)
                metrics |= sampled(second, name)
                both = [row.outcome for group in (*first, *second) for row in group.rows]
                metrics[f"val-aux/{name}/frac_absent"] = _absent(both) / len(both)
        return {**metrics, **self._left_out}

    def judged(self, name: str, prompts: Sequence[Prompt], *, temperature: float, samples: int) -> tuple[Group, ...]:
        """``samples`` responses to every prompt with their verdicts, in prompt order."""
        requests = [
            Request(
                prompt=prompt,
                seeds=tuple(
                    seed_of(self._seed, "evaluation", name, temperature, index, sample) for sample in range(samples)
                ),
                temperature=temperature,
                max_tokens=self._max_tokens,
            )
            for index, prompt in enumerate(prompts)
        ]
        words = "greedy" if temperature == 0 else f"{samples} samples at temperature {temperature:g}"
        with self._notify(f"evaluate {name}, {words}", len(requests)) as stage:
            return self._judges.judge(self._rollouts.sample(requests), stage.advance)


def greedy(groups: Sequence[Group], name: str) -> dict[str, float]:
    """Accuracy of greedy responses; a response without verdict is left out and counted."""
    rows = [row for group in groups for row in group.rows]
    outcomes = [row.outcome for row in rows]
    return {
        f"val-core/{name}/accuracy/greedy": _mean(outcomes),
        f"val-aux/{name}/num_prompts": float(len(groups)),
        f"val-aux/{name}/response_length/mean": sum(row.response_length for row in rows) / len(rows),
        f"val-aux/{name}/response_length/clip_ratio": sum(row.finish == "length" for row in rows) / len(rows),
        f"val-aux/{name}/frac_absent": _absent(outcomes) / len(outcomes),
    }


def sampled(groups: Sequence[Group], name: str) -> dict[str, float]:
    """Mean accuracy over N samples per prompt, and pass@N (unbiased, from N samples).

    A response without verdict is no failure: it is left out of the mean, and its prompt out of pass@N.
    """
    size = len(groups[0].rows)
    metrics = {f"val-core/{name}/accuracy/mean@{size}": _mean([row.outcome for g in groups for row in g.rows])}
    judged = [group for group in groups if all(row.outcome is not None for row in group.rows)]
    if size > 1 and judged:
        solved = [pass_at_k(size, sum(row.outcome == 1 for row in group.rows), size) for group in judged]
        metrics[f"val-core/{name}/accuracy/pass@{size}"] = sum(solved) / len(solved)
    return metrics


def left_out(sets: Mapping[str, Any]) -> dict[str, float]:
    """Rows of each held-out set that are not evaluated, and why."""
    too_long = {f"val-aux/{name}/num_too_long": float(held.num_too_long) for name, held in sets.items()}
    return too_long | {f"val-aux/{name}/num_without_gold": float(held.num_without_gold) for name, held in sets.items()}


def _mean(outcomes: Sequence[float | None]) -> float:
    known = [outcome for outcome in outcomes if outcome is not None]
    return sum(known) / len(known) if known else float("nan")


def _absent(outcomes: Sequence[float | None]) -> float:
    return float(sum(outcome is None for outcome in outcomes))
