"""Evaluation by itself: engines and judge, no learner."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from rlprm.actors.judge import Group
from rlprm.checks_models import check_model_folder
from rlprm.config import EvaluateConfig
from rlprm.data.keep import everything
from rlprm.data.tokenizer import load_tokenizer
from rlprm.errors import VerifierError
from rlprm.evaluation.evaluator import Evaluator, greedy, left_out, sampled
from rlprm.run import build
from rlprm.run.progress import Progress
from rlprm.run.scratch import scratch_logs
from rlprm.run.several_nodes import Shared


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One evaluation set at one temperature; ``metrics`` under the names that training logs."""

    source: str
    temperature: float
    samples: int
    metrics: dict[str, float]


def evaluate(config: EvaluateConfig, progress: Progress) -> list[Measured]:
    """Accuracy of ``config.model`` on every evaluation set at every temperature, sets first.

    Seeds depend on the set, the temperature, the prompt and the sample alone, as they do in training, so two
    evaluations of the same weights agree.

    Raises:
        ConfigError: the model folder or its tokenizer is missing, or the machine is too small for it.
        DataError: an evaluation set cannot be used.
        VerifierError: more verdicts are absent than ``verifier.max_error_fraction`` allows.
    """
    check_model_folder("model.path", config.model.path)
    tokenizer = load_tokenizer(config.model.path)
    sets = build.evaluation_sets(config.data, tokenizer, limit=config.limit, seed=config.seed)
    with ExitStack() as stack:
        logs = stack.enter_context(scratch_logs("evaluate"))
        with progress.stage("start Ray"):
            shared = Shared(folder=None, models={"engines": {"model.path": config.model.path}})
            seating = stack.enter_context(
                build.ray_cluster(config.placement, learners=False, own_engines=0, shared=shared, say=progress.say)
            )
        started = build.sampling(
            model=config.model,
            data=config.data,
            verifier=config.verifier,
            splitter=config.splitter,
            keep=everything,
            rollout=config.rollout,
            placement=config.placement,
            seed=config.seed,
            temperature=1.0,  # of training requests, of which there are none here
            max_tokens=config.max_response_tokens,
            samples=config.samples,
            greedy=False,
            needs_steps=False,
            logs=logs,
            own={},
            seating=seating,
        )
        stack.callback(lambda: build.stop(started, ()))
        build.ready(started, config.placement, progress, logs)
        evaluator = Evaluator(
            sets={name: held.prompts for name, held in sets.items()},
            rollouts=started.rollouts,
            judges=started.judges,
            every=0,
            samples=config.samples,
            temperature=1.0,
            max_tokens=config.max_response_tokens,
            seed=config.seed,
            log=lambda step, metrics: None,
            notify=lambda words, total: progress.stage(words, total, "prompts"),
            left_out=left_out(sets),
        )
        found = []
        for name, held in sets.items():
            for temperature in config.temperatures:
                samples = 1 if temperature == 0 else config.samples
                groups = evaluator.judged(name, held.prompts, temperature=temperature, samples=samples)
                _refuse_failed_verdicts(groups, config.verifier.max_error_fraction)
                found.append(
                    Measured(
                        source=name,
                        temperature=temperature,
                        samples=samples,
                        metrics={
                            **(greedy(groups, name) if temperature == 0 else sampled(groups, name)),
                            **described(groups, name),
                        },
                    )
                )
        return found


def described(groups: Sequence[Group], name: str) -> dict[str, float]:
    """Beside the accuracy: prompts, absent verdicts, lengths in tokens, and reasoning steps."""
    rows = [row for group in groups for row in group.rows]
    return {
        f"val-aux/{name}/num_prompts": float(len(groups)),
        f"val-aux/{name}/frac_absent": sum(row.outcome is None for row in rows) / len(rows),
        f"val-aux/{name}/response_length/mean": sum(row.response_length for row in rows) / len(rows),
        f"val-aux/{name}/response_length/clip_ratio": sum(row.finish == "length" for row in rows) / len(rows),
        "process_steps/mean": sum(row.num_steps for row in rows) / len(rows),
    }


def _refuse_failed_verdicts(groups: Sequence[Group], allowed: float) -> None:
    rows = [row for group in groups for row in group.rows]
    absent = [row for row in rows if row.outcome is None]
    if len(absent) > allowed * len(rows):
        raise VerifierError(
            f"{len(absent)} of {len(rows)} responses got no verdict (first reason: {absent[0].reason}); at most a "
            f"fraction {allowed} may (verifier.max_error_fraction)"
        )
