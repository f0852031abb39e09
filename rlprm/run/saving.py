"""Checkpoints of a whole run: every learner, the data cursor, trust and the step, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlprm.actors.group import WorkerGroup
from rlprm.core.gates import TrustState
from rlprm.data.prompt_source import PromptSource
from rlprm.run.checkpoint import Checkpointer


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
        every: int,
        last_step: int,
    ) -> None:
        self._checkpointer = checkpointer
        self._groups = groups
        self._prompts = prompts
        self._sources = sources
        self._recorder = recorder
        self._every = every
        self._last_step = last_step

    def save(self, step: int) -> None:
        """Write everything that the next step depends on, if this step is due or the last."""
        if step != self._last_step and (self._every == 0 or step % self._every):
            return
        self._recorder.flush()
        folder = self._checkpointer.begin(step)
        for group in self._groups:
            group.get(group.all(lambda worker: worker.save, str(folder)), "save")
        self._checkpointer.commit(step, self.state(step))

    def state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "version": self._recorder.version,
            "rollouts_total": self._recorder.rollouts_total,
            "tokens_total": self._recorder.tokens_total,
            "prompts": self._prompts.state(),
            "trust": {name: trust.to_dict() for name, trust in self._sources.trust.items()},
        }

    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was saved."""
        self._prompts.restore(state["prompts"])
        self._sources.trust = {name: TrustState.from_dict(saved) for name, saved in state["trust"].items()}
        for group in self._groups:
            group.get(group.all(lambda worker: worker.load, str(folder)), "load")
