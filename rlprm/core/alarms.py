"""Alarms: measures of a run that leave their band, and what is to happen then.

A process reward that can be gamed will be. What that looked like where it has been seen (PURE, arXiv:2504.15275: thinking
without ever solving, one giant step, empty content that a PRM likes, long repetitions that the verifier marks right)
shows in a few plain numbers before accuracy falls. A rule watches one of them; the state is part of the checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from rlprm.core.metrics import check_name
from rlprm.errors import CheckpointError, ConfigError

Action = Literal["log", "brake", "stop"]
NGRAM = 8  # tokens: shorter ones repeat in any honest text, above all where a token is a character
NOT_PROCESS = ("outcome", "kl")  # a pattern `reward/{stream}/...` means the process streams
BRAKE = "brake"  # alarm/brake is the weight that is left, so no rule may be called that


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One measure and where it may be: between ``low`` and ``high``, or between ``fall`` and ``rise`` times its baseline.

    Where both limits of a side are given, a value must be beyond both: a share that doubles from 0.001 is no alarm, and
    one that has always been high is none either. The baseline is a moving mean of the values inside; while a value is
    outside it is held, or the hack would become what is usual. ``metric`` may hold ``{stream}``: then each process stream
    is watched by itself. A metric that a step did not measure leaves everything as it was.

    >>> Rule(name="repetition", metric="response_text/repetition_right", low=None, high=0.2, fall=None, rise=None,
    ...      patience=3, action="log", advice="look at rollouts.jsonl").action
    'log'

    Raises:
        ConfigError: no limit at all, limits that cannot hold together, an unknown action, a name that is taken, or a
            metric that is not in the table.
    """

    name: str
    metric: str
    low: float | None
    high: float | None
    fall: float | None  # times the baseline; below it is outside
    rise: float | None  # times the baseline; above it is outside
    patience: int  # measured steps in a row outside before the alarm is raised
    action: Action
    advice: str  # what it usually means, and what to do

    def __post_init__(self) -> None:
        where = f"alarm {self.name!r}"
        if self.name == BRAKE:
            raise ConfigError(f"{where}: the metric alarm/{BRAKE} is the brake itself; choose another name")
        check_name(self.metric.replace("{stream}", "process"))
        if (self.low, self.high, self.fall, self.rise) == (None,) * 4:
            raise ConfigError(
                f"{where} has no limit; give a band [low, high] or a change [fall, rise], or leave it out"
            )
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ConfigError(f"{where} has the band [{self.low:g}, {self.high:g}]; expected low below high")
        if self.fall is not None and not 0 < self.fall < 1:
            raise ConfigError(
                f"{where} has the fall {self.fall:g}; expected a factor between 0 and 1, e.g. 0.5: halved"
            )
        if self.rise is not None and not self.rise > 1:
            raise ConfigError(f"{where} has the rise {self.rise:g}; expected a factor above 1, e.g. 2: doubled")
        if self.patience < 1:
            raise ConfigError(f"{where} has the patience {self.patience}; expected at least 1 step")
        if self.action not in get_args(Action):
            raise ConfigError(f"{where} has the action {self.action!r}; expected one of {', '.join(get_args(Action))}")

    def crossed(self, value: float, baseline: float | None) -> str | None:
        """The limit that ``value`` is beyond, in words; None inside.

        >>> rule = Rule(name="length", metric="response_length/mean", low=None, high=None, fall=0.5, rise=2.0,
        ...             patience=1, action="log", advice="")
        >>> rule.crossed(50.0, 20.0), rule.crossed(50.0, None), rule.crossed(30.0, 20.0)
        ('more than 2 times its usual 20', None, None)
        """
        # a factor of nothing, or of a debt, is no limit
        usual = baseline if baseline is not None and baseline > 0 else None
        return _beyond(value, usual, "below", self.low, "less", self.fall) or _beyond(
            value, usual, "above", self.high, "more", self.rise
        )


def _beyond(
    value: float, usual: float | None, side: str, limit: float | None, change: str, factor: float | None
) -> str | None:
    """Both limits of one side in words, if ``value`` is beyond those that are given."""
    if limit is None and factor is None:
        return None
    sign = 1.0 if side == "above" else -1.0
    words = []
    if limit is not None:
        if sign * (value - limit) <= 0:
            return None
        words.append(f"{side} {limit:g}")
    if factor is not None:
        if usual is None or sign * (value - factor * usual) <= 0:
            return None
        words.append(f"{change} than {factor:g} times its usual {usual:.4g}")
    return " and ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What is remembered of one metric under one rule."""

    baseline: float | None  # moving mean of values inside
    seen: int  # values in it
    outside: int  # measured steps in a row outside
    since: int | None  # the first of them


FRESH = Watched(baseline=None, seen=0, outside=0, since=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmState:
    """What is remembered, by rule and metric, and the brake: a factor in [0, 1] on the weights of all process streams."""

    watched: Mapping[str, Watched]
    brake: float

    @classmethod
    def start(cls) -> AlarmState:
        """Nothing seen yet, brake off."""
        return cls(watched={}, brake=1.0)

    def to_dict(self) -> dict[str, Any]:
        return {"watched": {key: asdict(each) for key, each in self.watched.items()}, "brake": self.brake}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> AlarmState:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: other keys than were saved.
        """
        try:
            watched = {key: Watched(**each) for key, each in saved["watched"].items()}
            return cls(watched=watched, brake=float(saved["brake"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the saved alarms have the keys {sorted(saved)} ({error}); expected watched and brake: resume from "
                "another checkpoint"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A rule whose patience is over."""

    rule: Rule
    metric: str
    value: float
    new: bool  # the step before it was not raised
    message: str


def watch(
    state: AlarmState,
    rules: Sequence[Rule],
    metrics: Mapping[str, float],
    *,
    step: int,
    decay: float,
    warmup: int,
) -> tuple[AlarmState, tuple[Alarm, ...]]:
    """The state after this step's ``metrics``, and the alarms that are raised now.

    ``baseline <- baseline + max(1 - decay, 1 / n) (value - baseline)`` over the n values inside so far (the plain mean at
    first, then a moving one). A factor of the baseline is a limit only after ``warmup`` of them.

    >>> rule = Rule(name="clip", metric="response_length/clip_ratio", low=None, high=0.5, fall=None, rise=None,
    ...             patience=2, action="stop", advice="Raise max_response_tokens.")
    >>> state, raised = watch(AlarmState.start(), [rule], {rule.metric: 0.9}, step=1, decay=0.9, warmup=3)
    >>> raised
    ()
    >>> watch(state, [rule], {rule.metric: 0.8}, step=2, decay=0.9, warmup=3)[1][0].message
    'alarm clip: response_length/clip_ratio is 0.8 at step 2, above 0.5, since step 1. Raise max_response_tokens.'
    """
    watched = dict(state.watched)
    raised = []
    for rule in rules:
        for metric in matching(rule.metric, metrics):
            value = metrics[metric]
            if not math.isfinite(value):
                continue
            key = f"{rule.name}:{metric}"
            before = watched.get(key, FRESH)
            usual = before.baseline if before.seen >= warmup else None
            limit = rule.crossed(value, usual)
            watched[key] = _after(before, value, decay) if limit is None else _outside(before, step)
            if limit is not None and watched[key].outside >= rule.patience:
                raised.append(
                    Alarm(
                        rule=rule,
                        metric=metric,
                        value=value,
                        new=before.outside < rule.patience,
                        message=f"alarm {rule.name}: {metric} is {value:.4g} at step {step}, {limit}, since step "
                        f"{watched[key].since}. {rule.advice}",
                    )
                )
    return replace(state, watched=watched), tuple(raised)


def _after(before: Watched, value: float, decay: float) -> Watched:
    mean = value if before.baseline is None else before.baseline
    share = max(1 - decay, 1 / (before.seen + 1))
    return Watched(baseline=mean + share * (value - mean), seen=before.seen + 1, outside=0, since=None)


def _outside(before: Watched, step: int) -> Watched:
    return replace(before, outside=before.outside + 1, since=step if before.since is None else before.since)


def matching(pattern: str, metrics: Mapping[str, float]) -> list[str]:
    """The names in ``metrics`` that ``pattern`` means; ``{stream}`` stands for any process stream.

    >>> matching("reward/{stream}/mean", {"reward/outcome/mean": 0.5, "reward/process/mean": 0.1, "prm/loss": 1.0})
    ['reward/process/mean']

    A run with several process sources logs ``prm/{stream}/x`` for each of them in place of ``prm/x``, and so for ``prover/x``;
    a rule means all.

    >>> matching("prm/pair_acc_fresh", {"prm/process/pair_acc_fresh": 0.3})
    ['prm/process/pair_acc_fresh']
    >>> matching("prover/frac_absent", {"prover/process/frac_absent": 0.3})
    ['prover/process/frac_absent']
    """
    if "{stream}" not in pattern:
        if pattern in metrics:
            return [pattern]
        family, _, name = pattern.partition("/")
        return matching(f"{family}/{{stream}}/{name}", metrics) if family in ("prm", "prover") else []
    form = re.compile(re.escape(pattern).replace(re.escape("{stream}"), r"([A-Za-z0-9_.\-]+)"))
    found = [(name, form.fullmatch(name)) for name in metrics]
    return sorted(name for name, match in found if match and match[1] not in NOT_PROCESS)


def told(rules: Sequence[Rule], metrics: Mapping[str, float], raised: Sequence[Alarm]) -> dict[str, float]:
    """``alarm/{name}``: 1 where the rule is raised, 0 where it is not; rules whose metric was not measured say nothing."""
    ringing = {alarm.rule.name for alarm in raised}
    return {f"alarm/{rule.name}": float(rule.name in ringing) for rule in rules if matching(rule.metric, metrics)}


def braked(state: AlarmState, raised: Sequence[Alarm], *, factor: float, recovery: float) -> AlarmState:
    """``brake <- brake * factor ** n`` with n braking alarms raised, and ``min(1, brake + recovery)`` with none.

    >>> braked(AlarmState(watched={}, brake=0.25), [], factor=0.5, recovery=0.5).brake
    0.75
    """
    count = sum(alarm.rule.action == "brake" for alarm in raised)
    brake = state.brake * factor**count if count else min(1.0, state.brake + recovery)
    return replace(state, brake=brake)


def repetition(tokens: Sequence[int], ngram: int = NGRAM) -> float:
    """``1 - distinct / all`` n-grams of a response: 0 where nothing repeats, near 1 in a loop.

    A response shorter than one n-gram repeats nothing. Not given by the source: PURE watches a repetition score above
    0.2 and does not say how it is computed.

    >>> repetition([1, 2, 3, 4], ngram=2), repetition([1, 2, 1, 2, 1], ngram=2)
    (0.0, 0.5)
    """
    grams = [tuple(tokens[start : start + ngram]) for start in range(len(tokens) - ngram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def copies(responses: Sequence[Sequence[int]]) -> list[bool]:
    """Which responses of a group are, token by token, one that came before in it.

    >>> copies([(1, 2), (3,), (1, 2)])
    [False, False, True]
    """
    seen: set[tuple[int, ...]] = set()
    found = []
    for response in responses:
        found.append(tuple(response) in seen)
        seen.add(tuple(response))
    return found
