"""Restarts after a loss: how many, from where, with what, and when the run ends after all."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlprm.actors.nodes import Failed, Node
from rlprm.cli.compose import Composed, composed
from rlprm.config import TrainConfig, validated
from rlprm.errors import AlarmRaised, ConfigError, NoLearningSignal, NonFinite, StaleWeights, Stopped, WorkerLost
from rlprm.run import supervisor
from rlprm.run.progress import Progress
from rlprm.run.stopping import Stopping
from rlprm.run.training import run_folder

TWO_NODES = (
    "placement=cpu_two_ranks", "placement.nodes=2", "placement.ray_address=127.0.0.1:1", "keep.min_prompts=4",
)  # fmt: skip


def configured(folder: Path, *overrides: str) -> tuple[TrainConfig, Composed]:
    made = composed("train", [f"output_dir={folder}", "model.path=m", "recovery.restarts=10", *overrides])
    return validated(TrainConfig, made.values), made


def node(index: int, gpus: float = 0.0) -> Node:
    return Node(index=index, id=str(index), name=f"n{index}", address=f"10.0.0.{index}", cpus=8.0, gpus=gpus)


class Fake:
    """Stands for :func:`train`: each start reaches a step, and then something happens."""

    def __init__(self, *plan: tuple[int, Exception | None]) -> None:
        self.plan = list(plan)
        self.started: list[TrainConfig] = []
        self.shown: list[Composed] = []
        self.lost: list[str | None] = []
        self.asked = False  # to end, while the step goes on

    def __call__(
        self, config: TrainConfig, made: Composed, progress: Progress, *, lost: str | None, stopping: Stopping
    ) -> Path:
        self.started.append(config)
        self.shown.append(made)
        self.lost.append(lost)
        stopping.asked = self.asked
        step, error = self.plan.pop(0)
        folder = run_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        if step >= 0:
            (folder / "metrics.jsonl").write_text(json.dumps({"step": step}) + '\n{"step": 9')
        if error is not None:
            raise error
        return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Fake, str, Exception | None]]:
    """A supervised run over a plan; what was started, said, and raised."""

    def go(
        plan: list[Any], *overrides: str, there: list[list[Node]] | None = None, asked: bool = False
    ) -> tuple[Fake, str, Any]:
        fake, screen, raised = Fake(*plan), io.StringIO(), None
        fake.asked = asked
        seen = iter(there or [])
        last: list[Node] = []

        def nodes() -> tuple[Node, ...]:
            last[:] = next(seen, list(last))
            return tuple(last)

        @contextmanager
        def cluster(**kwargs: Any) -> Iterator[None]:
            yield

        clock = iter(range(0, 10_000, 10))
        monkeypatch.setattr(supervisor, "train", fake)
        monkeypatch.setattr(supervisor, "answering", nodes)
        monkeypatch.setattr(supervisor, "cluster", cluster)
        monkeypatch.setattr(supervisor.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(supervisor.time, "monotonic", lambda: float(next(clock)))
        config, made = configured(tmp_path, *overrides)
        progress = Progress(Console(file=screen, width=500), patience=1e9)
        try:
            supervisor.supervised(config, made, progress)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
            raised = error
        return fake, screen.getvalue(), raised

    return go


LOST = WorkerLost("policy rank 1 on node n1 (10.0.0.1): its process died")


def test_a_run_without_loss_is_started_once(run: Any) -> None:
    fake, screen, raised = run([(5, None)])
    assert (len(fake.started), fake.lost, screen, raised) == (1, [None], "", None)
    assert fake.started[0].resume == "never"


def test_a_loss_restarts_and_says_what_was_lost_and_with_what_it_goes_on(run: Any, tmp_path: Path) -> None:
    (tmp_path / "train" / "seed0" / "checkpoints" / "step_000004").mkdir(parents=True)
    fake, screen, raised = run([(5, LOST), (9, None)])
    assert raised is None
    assert fake.lost == [None, str(LOST)]
    assert [config.resume for config in fake.started] == ["never", "auto"]
    assert f"lost: {LOST}" in screen
    assert "restart 1 of 10: on from the checkpoint of step 4, with all ranks" in screen


def test_before_the_first_checkpoint_it_begins_anew(run: Any) -> None:
    _, screen, raised = run([(0, StaleWeights("engines [1] received other bytes")), (9, None)])
    assert raised is None
    assert "anew, for there is no checkpoint yet" in screen


def test_restarts_are_counted_and_the_original_error_ends_the_run(run: Any) -> None:
    errors = [WorkerLost(str(number)) for number in range(3)]
    fake, _, raised = run([(number, error) for number, error in enumerate(errors)], "recovery.restarts=2")
    assert len(fake.started) == 3
    assert raised is errors[2]


def test_without_recovery_nothing_restarts(run: Any) -> None:
    fake, screen, raised = run([(5, LOST)], "recovery.restarts=0")
    assert (len(fake.started), screen, raised) == (1, "", LOST)


def test_three_restarts_without_progress_end_the_run(run: Any) -> None:
    errors = [WorkerLost(str(number)) for number in range(9)]
    # to step 6, back to 6, further to 7, and then three times no further
    steps = [6, 6, 7, 7, 5, 7]
    fake, screen, raised = run(list(zip(steps, errors, strict=False)))
    assert len(fake.started) == 6
    assert raised is errors[5]
    assert "3 restarts in a row have not come past step 7" in screen


def test_a_start_that_never_works_ends_after_three_restarts(run: Any) -> None:
    fake, _, raised = run([(-1, LOST)] * 9)
    assert (len(fake.started), raised) == (4, LOST)


@pytest.mark.parametrize("kind", [ConfigError, NoLearningSignal, NonFinite, AlarmRaised])
def test_what_would_happen_again_ends_the_run(run: Any, kind: type[Exception]) -> None:
    fake, _, raised = run([(5, kind("as it is"))])
    assert len(fake.started) == 1
    assert isinstance(raised, kind)


def test_nodes_that_come_back_in_time_restart_with_all_ranks(run: Any) -> None:
    fake, screen, raised = run(
        [(5, LOST), (9, None)], *TWO_NODES, "recovery.wait_s=60", "recovery.min_policy_ranks=1",
        there=[[node(0)], [node(0)], [node(0), node(1)]],
    )  # fmt: skip
    assert raised is None
    assert screen.count("waiting up to") == 1
    assert "1 of 2 nodes are there (n0 (10.0.0.0))" in screen
    assert (fake.started[1].placement.nodes, fake.started[1].placement.policy_ranks) == (2, 2)


def test_nodes_that_stay_away_leave_fewer_ranks(run: Any) -> None:
    fake, screen, raised = run(
        [(5, LOST), (9, None)], *TWO_NODES, "recovery.wait_s=60", "recovery.min_policy_ranks=1",
        "placement.policy_nodes=[0,1]", there=[[node(0)]],
    )  # fmt: skip
    assert raised is None
    placement = fake.started[1].placement
    assert (placement.nodes, placement.policy_ranks, placement.prm_ranks, placement.policy_nodes) == (1, 1, 1, [0])
    assert "placement.policy_ranks=1 (of 2)" in screen
    values, origins = fake.shown[1].values, fake.shown[1].origins
    assert (values["placement"]["policy_ranks"], origins["placement.policy_ranks"]) == (1, "recovery")
    assert "policy_ranks: 1" in fake.shown[1].yaml()


def test_the_next_restart_asks_for_all_ranks_again(run: Any) -> None:
    fake, _, raised = run(
        [(5, LOST), (7, LOST), (9, None)], *TWO_NODES, "recovery.min_policy_ranks=1",
        there=[[node(0)], [node(0), node(1)]],
    )  # fmt: skip
    assert raised is None
    assert [config.placement.policy_ranks for config in fake.started] == [2, 1, 2]


def test_too_little_is_left(run: Any) -> None:
    fake, screen, raised = run([(5, LOST)], *TWO_NODES, there=[[node(0)]])
    assert (len(fake.started), raised) == (1, LOST)
    assert "too little to go on with" in screen


EIGHT = (
    "placement=gpu8", "placement.nodes=2", "placement.policy_ranks=8", "placement.prm_ranks=4", "placement.engines=4",
    "placement.ray_address=127.0.0.1:1", "rollout=vllm_gpu", "keep.min_prompts=8", "recovery=elastic",
)  # fmt: skip


def test_with_gpus_every_role_gives_up_about_the_same_share(tmp_path: Path) -> None:
    config, made = configured(tmp_path, *EIGHT)
    there = [node(0, gpus=8.0)]
    assert supervisor.fits(config, made, [node(0, 8.0), node(1, 8.0)], {})
    assert not supervisor.fits(config, made, there, {})
    assert supervisor.fewer(config, made, there) == {"nodes": 1, "policy_ranks": 4, "prm_ranks": 2, "engines": 2}


def test_numbers_of_ranks_whose_shards_need_more_prompts_than_a_batch_has_are_not_tried(tmp_path: Path) -> None:
    """5 GPUs hold 3 + 1 + 1, and 3 policy ranks beside 2 PRM ranks would need 6 shards."""
    config, made = configured(tmp_path, *EIGHT, "placement.engines=1", "keep.min_prompts=4",
                              "placement.policy_ranks=4")  # fmt: skip
    found = supervisor.fewer(config, made, [node(0, gpus=6.0)])
    assert found is not None
    numbers = {"policy_ranks": 4, "prm_ranks": 4, **found}
    assert (numbers["policy_ranks"], numbers["prm_ranks"]) != (3, 2)
    assert supervisor.fits(config, made, [node(0, gpus=6.0)], found)


def test_a_node_that_is_listed_and_does_not_answer_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "nodes", lambda: (node(0), node(1), node(2)))
    answers = [True, Failed(reason="no answer within 15 s"), True]
    monkeypatch.setattr(supervisor, "on_each", lambda *asked, **how: answers)
    assert [(each.name, each.index) for each in supervisor.answering()] == [("n0", 0), ("n2", 1)]


def test_a_run_that_was_asked_to_end_is_not_started_again(run: Any) -> None:
    fake, screen, raised = run([(5, LOST), (9, None)], asked=True)
    assert (len(fake.started), raised) == (1, LOST)
    assert "asked to end, so the run is not started again; what was saved last counts" in screen
    fake, _, raised = run([(5, Stopped("stopped after step 5, which is saved")), (9, None)], asked=True)
    assert len(fake.started) == 1
    assert isinstance(raised, Stopped)
