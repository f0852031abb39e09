"""Rollout engines that are killed and come back: the same tokens, the same weights, and a clear end where too few stay."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest

from rlprm import driver
from rlprm.errors import WorkerLost
from rlprm.roles import Request, Rollout
from tests.integration.scripted_engines import Scripted, Source
from tests.integration.support import TRANSFORMERS, Done, train
from tests.unit.made import prompt

pytestmark = pytest.mark.integration


def process_of(log: Path) -> psutil.Process:
    """The process whose output is in ``log``."""
    for process in psutil.Process().children(recursive=True):
        try:
            if os.readlink(f"/proc/{process.pid}/fd/1") == str(log.resolve()):
                return process
        except OSError:  # it has ended meanwhile
            continue
    raise AssertionError(f"nobody writes to {log}")


# -- engines that need no model ----------------------------------------------------------------------------------------


@pytest.fixture
def roles(ray_once: None, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes `Rollouts` over scripted engines, and ends them."""
    import ray

    from rlprm.actors.rollout import RolloutActor, Rollouts

    made = []

    def engine(number: int) -> Any:
        log = str(tmp_path / f"rollout{number}.log")
        return ray.remote(RolloutActor).options(num_cpus=0).remote(Scripted, log)

    def role(count: int, least: int) -> Any:
        engines = [engine(number) for number in range(count)]
        ray.get([each.ready.remote() for each in engines])
        found = Rollouts(
            engines, seed=0, temperature=1.0, max_tokens=4, samples=2, greedy=False, timeout_s=60.0,
            restart=engine, min_engines=least, logs=str(tmp_path),
        )  # fmt: skip
        made.append(found)
        return found

    yield role
    for each in made:
        each.engines.drop_helpers()
        for one in each.engines:
            ray.kill(one)


def fetched(finished: Any) -> dict[int, list[Rollout]]:
    import ray

    return {index: ray.get(reference) for index, reference in finished}


def test_too_few_that_are_left_end_the_run_with_who_is_gone_and_what_to_do(roles: Any, tmp_path: Path) -> None:
    role = roles(2, 2)
    asked = [replace(prompt(number), question="die" if number == 3 else "") for number in range(6)]
    with pytest.raises(WorkerLost) as caught:
        fetched(role.sample(role.requests(asked, 1, 0)))
    said = str(caught.value)
    assert said.startswith("rollout engine 1 on node ")
    assert f"(log: {tmp_path}/rollout1.log) is gone: " in said
    assert "1 of 2 rollout engines are left, and recovery.min_engines asks for 2. The same command continues" in said


def test_a_question_that_kills_engines_ends_the_run_and_is_named(roles: Any) -> None:
    role = roles(4, 1)
    asked = [replace(prompt(number), question="die" if number == 2 else "") for number in range(3)]
    with pytest.raises(
        WorkerLost, match=r"3 rollout engines died one after the other .*\(prompts a/2\); the last was "
    ):
        fetched(role.sample(role.requests(asked, 1, 0)))


def test_a_source_goes_on_with_the_engines_that_are_there(roles: Any, tmp_path: Path) -> None:
    import ray

    from rlprm.actors.services import EngineService

    role = roles(2, 1)
    source = (
        ray.remote(Source)
        .options(num_cpus=0)
        .remote(EngineService(role.engines, timeout_s=60.0, what="rollout engines (for a source)"))
    )
    requests = role.requests([prompt(number) for number in range(5)], 1, 0)
    before = ray.get(source.sample.remote(requests))
    process_of(tmp_path / "rollout0.log").kill()
    assert ray.get(source.sample.remote(requests)) == before  # it finds out by itself
    assert len(role.engines) == 2  # the driver has not asked anybody yet
    fetched(role.sample(requests))
    role.renew()
    ray.wait([role.engines._loading[0].ready], timeout=60.0)
    role.renew()
    process_of(tmp_path / "rollout1.log").kill()  # the last of those that it was made with
    assert ray.get(source.sample.remote(requests)) == before
    assert ray.get(source.logprobs.remote()) == [[3.0]]
    metrics = role.take_metrics()
    assert (metrics["rollout/engines_lost"], metrics["rollout/engines_joined"]) == (1.0, 1.0)
    assert metrics["rollout/resampled_for_sources"] == 3.0 + 2.0  # of five requests: 0, 2, 4 and then 1, 3


# -- whole runs --------------------------------------------------------------------------------------------------------

ONE_GROUP_AT_A_TIME = ("rollout.engine.max_num_seqs=4",)  # the batch of an engine: so "in mid-sampling" is that
STEPS = ("method=outcome_grpo", *TRANSFORMERS, *ONE_GROUP_AT_A_TIME, "steps=3", "tracker.rollout_groups=4")


class Killing:
    """The run's own rollouts; in ``step`` the engine that writes to ``log`` dies when the first group has come."""

    def __init__(self, inner: Any, log: Path, step: int) -> None:
        self._inner = inner
        self._log = log
        self._step = step
        self._key = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def requests(self, prompts: Any, step: int, turn: int) -> list[Request]:
        self._key = step
        return self._inner.requests(prompts, step, turn)

    def sample(self, requests: list[Request]) -> Any:
        finished = self._inner.sample(requests)
        if self._key == self._step:
            self._key = 0
            return After(finished, process_of(self._log).kill)
        return finished


class After:
    """An iterator that calls ``then`` when its first item has come."""

    def __init__(self, inner: Any, then: Callable[[], None]) -> None:
        self._inner = inner
        self._then: Callable[[], None] | None = then
        self.again = inner.again

    def __iter__(self) -> After:
        return self

    def __next__(self) -> Any:
        found = next(self._inner)
        if self._then is not None:
            self._then()
            self._then = None
        return found


class Patient:
    """The run's own transfer of the run's own ``rollouts``; it begins when every replacement that was started answers."""

    def __init__(self, inner: Any, rollouts: Any) -> None:
        self._inner = inner
        self._rollouts = rollouts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def publish(self, policy: Any, rollouts: Any) -> None:
        import ray

        for loading in self._rollouts.engines._loading.values():
            assert ray.wait([loading.ready], timeout=60.0)[0]
        self._inner.publish(policy, self._rollouts)


def with_a_loss(folder: Path, model: str, step: int, *overrides: str) -> Done:
    """A run in which engine 1 is killed in mid-sampling."""
    loop = driver.train

    def unlucky(run: driver.Run) -> None:
        log = Path(run.rollouts.engines.log(1))
        loop(replace(run, rollouts=Killing(run.rollouts, log, step), transfer=Patient(run.transfer, run.rollouts)))

    with patch.object(driver, "train", unlucky):
        return train(folder, model, *overrides)


@pytest.fixture(scope="module")
def undisturbed(ray_once: None, model: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Three steps with one engine that lives."""
    return train(tmp_path_factory.mktemp("undisturbed"), model, *STEPS)


@functools.cache
def _runs() -> dict[str, Done]:
    return {}


@pytest.fixture(params=["gloo", pytest.param("object_store", marks=pytest.mark.long)])
def survived(request: Any, ray_once: None, model: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The same with two engines, of which one is killed in the first step and replaced."""
    runs = _runs()
    if request.param not in runs:
        runs[request.param] = with_a_loss(
            tmp_path_factory.mktemp("survived"), model, 1, *STEPS, "placement.engines=2", "recovery=elastic",
            f"placement.weight_transport={request.param}",
        )  # fmt: skip
    return runs[request.param]


def test_the_tokens_are_those_of_a_run_without_the_loss(undisturbed: Done, survived: Done) -> None:
    assert survived.rollouts == undisturbed.rollouts  # every token, log-prob, reward and advantage of three steps
    assert survived.rows == undisturbed.rows


def test_the_replacement_joins_with_the_weights_of_its_publish(survived: Done) -> None:
    assert [len(publication.engines) for publication in survived.published] == [2, 1, 2, 2]
    assert max(publication.gap for publication in survived.published) < 1e-5
    assert [publication.version for publication in survived.published] == [0, 1, 2, 3]


def test_what_came_and_went_is_in_the_metrics(survived: Done) -> None:
    names = ("engines", "engines_lost", "engines_joined", "engines_failed")
    rows = [[row[f"rollout/{name}"] for name in names] for row in survived.metrics_of_steps]
    assert rows == [[1, 1, 0, 0], [2, 0, 1, 0], [2, 0, 0, 0]]
    again = [row["rollout/resampled_groups"] for row in survived.metrics_of_steps]
    assert again[0] >= 1
    assert again[1:] == [0, 0]
    assert "rollout engine 1 on node " in survived.screen
    assert "going on with 1 of 2 rollout engines" in survived.screen


@pytest.mark.long
def test_where_all_engines_are_needed_the_loss_of_one_ends_the_run(ray_once: None, model: str, tmp_path: Path) -> None:
    with pytest.raises(WorkerLost) as caught:
        with_a_loss(tmp_path, model, 1, *STEPS, "placement.engines=2")
    said = str(caught.value)
    assert said.startswith("rollout engine 1 on node ")
    assert "rollout1.log) is gone: " in said
    assert "1 of 2 rollout engines are left, and all 2 of placement.engines are needed" in said
    assert "recovery=elastic" in said
