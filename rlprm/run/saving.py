"""Checkpoints of a whole run: every learner, the data cursor, trust and the step, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlprm.actors.group import WorkerGroup
from rlprm.core.gates import TrustState
from rlprm.data.prompt_source import PromptSource
from rlprm.errors import Stopped
from rlprm.run.alarms import Alarms
from rlprm.run.checkpoint import Checkpointer
from rlprm.run.stopping import Stopping


class Checkpoints:
    """Saves when it is due, and puts a saved run back together."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        *,
        groups: tuple[WorkerGroup, ...],
        prompts: PromptSource,
        sources: Any,
        recorder: Any,
        alarms: Alarms,
        stopping: Stopping,
        every: int,
        last_step: int,
    ) -> None:
        self._checkpointer = checkpointer
        self._groups = groups
        self._prompts = prompts
        self._sources = sources
        self._recorder = recorder
        self._alarms = alarms
        self._stopping = stopping
        self._every = every
        self._last_step = last_step

    def save(self, step: int) -> None:
        """Write everything that the next step depends on, if this step is due or the last.

        Raises:
            AlarmRaised: an alarm ends the run with this step; what it has is written first, due or not.
            Stopped: the run was asked to end; the same.
        """
        due = self._due(step) or self._alarms.stopping
        if due:
            self._write(step)
        self._alarms.stop()
        asked = self._stopping.asked  # read once: what comes later ends the next step
        if asked and not due:
            self._write(step)
        if asked and step < self._last_step:  # a run that has no more steps ends by itself
            raise Stopped(f"stopped after step {step}, which is saved")
        self._stopping.over(step)

    def _due(self, step: int) -> bool:
        return step == self._last_step or (self._every > 0 and step % self._every == 0)

    def _write(self, step: int) -> None:
        self._recorder.flush()
        folder = self._checkpointer.begin(step)
        files: dict[str, int] = {}
        for group in self._groups:
            for each in group.get(group.all(lambda worker: worker.save, str(folder)), "save"):
                files |= each
        self._checkpointer.commit(step, self.state(step), files)

    def state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "version": self._recorder.version,
            "rollouts_total": self._recorder.rollouts_total,
            "tokens_total": self._recorder.tokens_total,
            "prompts": self._prompts.state(),
            "alarms": self._alarms.state(),
            "trust": {name: trust.to_dict() for name, trust in self._sources.trust.items()},
        }

    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was saved."""
        self._prompts.restore(state["prompts"])
        self._sources.trust = {name: TrustState.from_dict(saved) for name, saved in state["trust"].items()}
        if "alarms" in state:  # a checkpoint from before there were alarms has none
            self._alarms.restore(state["alarms"])
        for group in self._groups:
            group.get(group.all(lambda worker: worker.load, str(folder)), "load")
