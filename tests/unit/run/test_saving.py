"""A run that an alarm ends, or that is asked to end, is saved first, whether that was due or not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rlprm.core.alarms import Rule
from rlprm.core.gates import TrustState
from rlprm.data.datasets import Row
from rlprm.data.prompt_source import PromptSource, Source
from rlprm.errors import AlarmRaised, Stopped
from rlprm.run.alarms import Alarms
from rlprm.run.checkpoint import Checkpointer
from rlprm.run.saving import Checkpoints
from rlprm.run.stopping import Stopping

RULE = Rule(
    name="length", metric="response_length/mean", low=None, high=1.0, fall=None, rise=None, patience=1, action="stop",
    advice="Look.",
)  # fmt: skip


class Run:
    """What is saved, as far as it is not a model."""

    def __init__(self, folder: Path) -> None:
        self.sources = SimpleNamespace(trust={"process": TrustState.start(0.9)}, brake=1.0)
        self.alarms = Alarms(
            [RULE], decay=0.9, warmup=1, brake_factor=0.5, brake_recovery=0.5, canary_every=0, canaries=list,
            brake=lambda factor: setattr(self.sources, "brake", factor), say=lambda words: None,
        )  # fmt: skip
        rows = [Row(id=str(n), question=str(n), gold="1", source="a.jsonl:1") for n in range(4)]
        self.prompts = PromptSource(
            [Source("a", rows, 1.0)], lambda question: (question, [1]), seed=0, max_prompt_tokens=8
        )
        self.flushed = 0
        self.stopping = Stopping(lambda words: None)
        self.checkpointer = Checkpointer(folder, keep_last=2)
        self.checkpoints = Checkpoints(
            self.checkpointer,
            groups=(),
            prompts=self.prompts,
            sources=self.sources,
            recorder=SimpleNamespace(flush=self._flush, version=1.0, rollouts_total=2.0, tokens_total=3.0),
            alarms=self.alarms,
            stopping=self.stopping,
            every=10,
            last_step=20,
        )

    def _flush(self) -> None:
        self.flushed += 1


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "checkpoints")


def saved(run: Run) -> list[str]:
    return sorted(path.name for path in run.checkpointer.folder.iterdir())


def test_a_quiet_run_is_saved_when_it_is_due(run: Run) -> None:
    for step in (1, 10, 11):
        run.alarms.check(step, {RULE.metric: 1.0})
        run.checkpoints.save(step)
    assert saved(run) == ["step_000010"]


def test_an_alarm_saves_first_and_the_next_run_knows_of_it(run: Run, tmp_path: Path) -> None:
    run.prompts.take(3)
    run.alarms.check(3, {RULE.metric: 2.0})
    with pytest.raises(AlarmRaised, match="response_length/mean is 2 at step 3, above 1"):
        run.checkpoints.save(3)
    assert saved(run) == ["step_000003"]
    assert run.flushed == 1  # its metrics are on disk, too
    folder, state = run.checkpointer.latest_valid()
    again = Run(tmp_path / "checkpoints")
    again.checkpoints.restore(folder, state)
    assert again.alarms.state() == run.alarms.state()
    assert again.prompts.state() == run.prompts.state()


def test_a_wish_to_end_saves_first(run: Run) -> None:
    run.checkpoints.save(2)
    run.stopping.asked = True
    with pytest.raises(Stopped, match=r"^stopped after step 3, which is saved$"):
        run.checkpoints.save(3)
    assert saved(run) == ["step_000003"]
    with pytest.raises(Stopped, match="step 10"):
        run.checkpoints.save(10)  # which is due, and is written once
    assert run.flushed == 2


def test_a_run_whose_last_step_is_over_has_not_been_stopped(run: Run) -> None:
    run.stopping.asked = True
    run.checkpoints.save(20)
    assert saved(run) == ["step_000020"]


def test_an_alarm_goes_before_a_wish(run: Run) -> None:
    run.stopping.asked = True
    run.alarms.check(3, {RULE.metric: 2.0})
    with pytest.raises(AlarmRaised):
        run.checkpoints.save(3)
    assert (saved(run), run.flushed) == (["step_000003"], 1)


def test_a_checkpoint_from_before_there_were_alarms_is_read(run: Run, tmp_path: Path) -> None:
    run.checkpoints.save(10)
    folder, state = run.checkpointer.latest_valid()
    before = {key: value for key, value in state.items() if key != "alarms"}
    run.checkpoints.restore(folder, before)
    assert run.alarms.state()["watched"] == {}
