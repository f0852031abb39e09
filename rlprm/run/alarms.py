"""Alarms of a run: what is watched, said, braked and stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlprm.config import Alarms as Section
from rlprm.config import TrainConfig
from rlprm.core.alarms import Alarm, AlarmState, Rule, braked, told, watch
from rlprm.errors import AlarmRaised, ConfigError


class Alarms:
    """Looks at each step's metrics when they are recorded.

    A raised alarm is said once, when its patience is over, and ``alarm/{name}`` is 1 until the measure is back inside.
    ``brake`` receives the factor for the process streams' weights in the next step. An alarm that stops lets the step
    end first: its metrics are written and its state is saved, then :meth:`stop` raises.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        *,
        decay: float,
        warmup: int,
        brake_factor: float,
        brake_recovery: float,
        canary_every: int,
        canaries: Callable[[], Sequence[str]],
        brake: Callable[[float], None],
        say: Callable[[str], None],
    ) -> None:
        self._rules = tuple(rules)
        self._decay = decay
        self._warmup = warmup
        self._factor = brake_factor
        self._recovery = brake_recovery
        self._every = canary_every
        self._canaries = canaries
        self._brake = brake
        self._say = say
        self._state = AlarmState.start()
        self._stopping: tuple[Alarm, ...] = ()

    def check(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """What this step adds to its metrics: canaries when they are due, ``alarm/*``, and the brake."""
        if not self._rules:
            return {}
        tried: dict[str, float] = {}
        if self._every and step % self._every == 0:
            failed = self._canaries()
            tried["verifier/canaries_failed"] = float(len(failed))
            for words in failed[:1]:
                self._say(f"step {step}: {words}")
        everything = {**metrics, **tried}
        state, raised = watch(self._state, self._rules, everything, step=step, decay=self._decay, warmup=self._warmup)
        self._state = braked(state, raised, factor=self._factor, recovery=self._recovery)
        self._brake(self._state.brake)
        for alarm in raised:
            if alarm.new:
                self._say(f"{alarm.message}{self._consequence(alarm)}")
        self._stopping = tuple(alarm for alarm in raised if alarm.rule.action == "stop")
        return {**tried, **told(self._rules, everything, raised), "alarm/brake": self._state.brake}

    def _consequence(self, alarm: Alarm) -> str:
        if alarm.rule.action == "brake":
            return f" Process rewards now count {self._state.brake:.3g} times their weight."
        return ""

    @property
    def stopping(self) -> bool:
        """The run ends with this step, so its state must be saved whether that is due or not."""
        return bool(self._stopping)

    def stop(self) -> None:
        """End the run if an alarm asked for it.

        Raises:
            AlarmRaised: what was seen, since when, and how to go on.
        """
        if self._stopping:
            names = ", ".join(dict.fromkeys(alarm.rule.name for alarm in self._stopping))
            first = self._stopping[0].rule.name
            raise AlarmRaised(
                f"{' '.join(alarm.message for alarm in self._stopping)} The run is saved and has ended. To go on with the "
                f"same data: resume=auto with another setting, or without these alarms ({names}): "
                f"alarms.rules.{first}.action=log"
            )

    def state(self) -> dict[str, Any]:
        """What goes into the checkpoint."""
        return self._state.to_dict()

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue where :meth:`state` was saved; rules that are new begin anew."""
        known = {rule.name for rule in self._rules}
        state = AlarmState.from_dict(saved)
        watched = {key: each for key, each in state.watched.items() if key.partition(":")[0] in known}
        self._state = AlarmState(watched=watched, brake=state.brake if self._rules else 1.0)
        self._brake(self._state.brake)


def rules(section: Section) -> list[Rule]:
    """The rules of a configuration.

    Raises:
        ConfigError: a rule that cannot hold; see :class:`rlprm.core.alarms.Rule`.
    """
    return [
        Rule(
            name=name,
            metric=rule.metric,
            low=rule.band[0],
            high=rule.band[1],
            fall=rule.change[0],
            rise=rule.change[1],
            patience=rule.patience,
            action=rule.action,
            advice=rule.advice,
        )
        for name, rule in (section.rules or {}).items()
    ]


def check_reach(config: TrainConfig) -> None:
    """The brake acts on the weights of process streams; a stream without one of its own is out of its reach.

    Raises:
        ConfigError: an alarm brakes, and a process stream is merged into another one.
    """
    braking = [rule.name for rule in rules(config.alarms) if rule.action == "brake"]
    merged = [name for name, stream in config.streams.items() if stream.source is not None and stream.weight is None]
    if braking and merged:
        raise ConfigError(
            f"alarms.rules.{braking[0]}.action is brake, and the stream {merged[0]!r} has no weight of its own that could be "
            "lowered, because a merge takes it into another stream; use alarms=log, or actions log and stop"
        )


def alarms(section: Section, *, judges: Any, sources: Any, say: Callable[[str], None]) -> Alarms:
    """The alarms of a run, with their hands on its verifier (canaries) and its process streams (brake)."""

    def brake(factor: float) -> None:
        sources.brake = factor

    brake(1.0)  # the sources may be those of the run before
    return Alarms(
        rules(section),
        decay=section.decay,
        warmup=section.warmup,
        brake_factor=section.brake_factor,
        brake_recovery=section.brake_recovery,
        canary_every=section.canary_every,
        canaries=judges.canaries,
        brake=brake,
        say=say,
    )
