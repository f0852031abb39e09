"""What a step leaves behind: metrics, readable rollouts, and a line on the screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil

from rlprm.batch import Batch, Row


class Recorder:
    """Gathers the step's numbers from where they were made and hands them to the trackers.

    Evaluations belong to the step after which they were made, so a step's metrics are held back until it is over.
    """

    def __init__(
        self,
        *,
        trackers: Any,
        clock: Any,
        transfer: Any,
        prompts: Any,
        rollouts: Any,
        alarms: Any,
        rollouts_total: float,
        tokens_total: float,
        version: float,
        restarts: float,
        progress: Callable[[str], None],
    ) -> None:
        self._trackers = trackers
        self._clock = clock
        self._transfer = transfer
        self._prompts = prompts
        self._rollouts = rollouts
        self._alarms = alarms
        self.rollouts_total = rollouts_total
        self.tokens_total = tokens_total
        self.version = version  # of the policy that sampled the next batch
        self._restarts = restarts
        self._progress = progress
        self._held: tuple[int, dict[str, float]] | None = None

    def record(self, step: int, kept: Batch, scored: Any, credit: Any, learned: Sequence[Mapping[str, float]]) -> None:
        """The metrics of one training step."""
        timing = self._clock.collect()
        self._write()
        credited, readable = credit.result()
        self.tokens_total += sum(row.response_length for row in kept.rows)
        self.rollouts_total += kept.counts["keep/rollouts_sampled"] + continuations(scored.metrics)
        metrics = {
            **lengths(kept.rows),
            **texts(kept.rows),
            **staleness(kept.rows, self.version),
            **kept.counts,
            **self._rollouts.take_metrics(),
            **selected(kept),
            **scored.metrics,
            **credited,
            **{name: value for one in learned for name, value in one.items()},
            **self._transfer.metrics,
            **self._prompts.metrics(),
            "run/restarts": self._restarts,
            "training/global_step": float(step),
            "training/rollouts_total": self.rollouts_total,
            "training/tokens_total": self.tokens_total,
            **timing,
            **performance(kept.rows, timing["timing_s/step"]),
        }
        self.version = self._transfer.metrics["weights/version"]
        self._held = (step, {**metrics, **self._alarms.check(step, metrics)})
        self._trackers.rollouts(step, readable)
        self._progress(_line(metrics))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out accuracy after ``step`` (0: before training)."""
        if self._held is not None and self._held[0] == step:
            self._held = (step, {**self._held[1], **metrics})
            return
        self.flush()
        self._held = (step, dict(metrics))

    def flush(self) -> None:
        """Write what was held back, with the time that was spent since (evaluation)."""
        if self._held is not None:
            step, metrics = self._held
            self._held = (step, {**metrics, **self._clock.collect()})
            self._write()

    def _write(self) -> None:
        if self._held is not None:
            self._trackers.log(*self._held)
            self._held = None

    def close(self) -> None:
        self.flush()
        self._trackers.close()


def continuations(metrics: Mapping[str, float]) -> float:
    """What all provers of the step have sampled; with several sources each has a name of its own.

    >>> continuations({"prover/a/rollouts": 6.0, "prover/b/rollouts": 2.0, "prover/a/tokens": 90.0})
    8.0
    """
    return sum(
        (value for name, value in metrics.items() if name.startswith("prover/") and name.endswith("/rollouts")),
        start=0.0,
    )


def lengths(rows: Sequence[Row]) -> dict[str, float]:
    """Lengths in tokens; the clip ratio is the share of responses cut by the limit."""
    responses = [row.response_length for row in rows]
    prompts = [row.prompt_length for row in rows]
    steps = [row.num_steps for row in rows]
    right = [row for row in rows if is_right(row)]
    return {
        "response_length/mean": sum(responses) / len(rows),
        "response_length/max": float(max(responses)),
        "response_length/min": float(min(responses)),
        "response_length/clip_ratio": sum(row.finish == "length" for row in rows) / len(rows),
        **mean_of("response_length/clip_ratio_right", [float(row.finish == "length") for row in right]),
        "process_steps/mean": sum(steps) / len(rows),
        "process_steps/max": float(max(steps)),
        "process_steps/frac_single": sum(step == 1 for step in steps) / len(rows),
        **({"process_steps/tokens": sum(responses) / sum(steps)} if any(steps) else {}),
        "prompt_length/mean": sum(prompts) / len(rows),
        "prompt_length/max": float(max(prompts)),
        "prompt_length/min": float(min(prompts)),
    }


def texts(rows: Sequence[Row]) -> dict[str, float]:
    """What repeats within a response, and which responses of a group are copies: signs of a reward that is gamed."""
    return {
        "response_text/repetition_mean": sum(row.repetition for row in rows) / len(rows),
        "response_text/repetition_max": max(row.repetition for row in rows),
        **mean_of("response_text/repetition_right", [row.repetition for row in rows if is_right(row)]),
        "response_text/copies": sum(row.copy for row in rows) / len(rows),
    }


def mean_of(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean under its name; of nothing there is none."""
    return {name: sum(values) / len(values)} if values else {}


def is_right(row: Row) -> bool:
    """The verifier gave a verdict, and it is above one half."""
    return row.outcome is not None and row.outcome > 0.5


def staleness(rows: Sequence[Row], version: float) -> dict[str, float]:
    """Optimizer steps between the weights that sampled and those that were trained (``version`` before the update)."""
    gaps = [version - row.version for row in rows]
    return {"staleness/mean": sum(gaps) / len(gaps), "staleness/max": max(gaps)}


def selected(kept: Batch) -> dict[str, float]:
    """Rollouts that were accepted, and those of them that train the policy; the fresh ones' accuracy."""
    accepted = sum(row.train for row in kept.rows)
    chosen = sum(kept.selected)
    fresh = [row.outcome for row in kept.rows if row.fresh and row.outcome is not None]
    return {
        "select/rows_in": float(accepted),
        "select/rows_out": float(chosen),
        "select/frac_kept": chosen / accepted,
        "keep/outcome_mean_fresh": sum(fresh) / len(fresh) if fresh else float("nan"),
    }


def performance(rows: Sequence[Row], seconds: float) -> dict[str, float]:
    """Tokens of prompts and responses per second of the step, and memory of this process tree."""
    tokens = sum(row.prompt_length + row.response_length for row in rows)
    own = psutil.Process()
    resident = own.memory_info().rss + sum(_rss(child) for child in own.children(recursive=True))
    return {
        "perf/total_num_tokens": float(tokens),
        "perf/time_per_step": seconds,
        "perf/throughput": tokens / seconds,
        "perf/cpu_memory_used_gb": resident / 1e9,
    }


def _rss(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def _line(metrics: Mapping[str, float]) -> str:
    words = [f"sampled accuracy {metrics['keep/outcome_mean_fresh']:.2f}"]
    if "prm/auc_fresh" in metrics:
        words.append(f"PRM AUC {metrics['prm/auc_fresh']:.2f} (surprisal {metrics['prm/auc_surprisal']:.2f})")
    if metrics["rollout/engines_lost"] or metrics["rollout/engines_joined"]:
        words.append(
            f"{metrics['rollout/engines']:.0f} rollout engines ({metrics['rollout/engines_lost']:.0f} lost, "
            f"{metrics['rollout/engines_joined']:.0f} joined)"
        )
    return ", ".join(words)
